"""Align text-to-image flow models with reward models: dense, branching and region credit for GRPO."""
