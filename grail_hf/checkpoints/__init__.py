"""Checkpoints on disk: sources, weights, the journal of a run, folders replaced as a whole.

The semi-private uses of transformers' weight conversion are in `converter`.
"""
