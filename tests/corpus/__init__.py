"""Hostile and odd input, one module a kind, as small generators; each says what it is and what must come of it.

A new report is one more entry. Tests import what they need: `from corpus import pictures`.
"""
