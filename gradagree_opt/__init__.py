"""Gradient Agreement in place of the average over tasks, for meta-learning in PyTorch."""
