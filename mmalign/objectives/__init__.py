"""Objectives that learn from finished images by regression, beside the policy gradient of `mmalign.learn`.

An objective gives rows to learn from and what to replay them with; the update is the same for all.
"""
