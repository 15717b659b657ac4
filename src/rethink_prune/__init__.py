"""Prune and fine-tune, or train from scratch: controlled comparisons of network pruning."""
