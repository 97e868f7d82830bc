"""Exports of checkpoints for other programs: another model type, padded layers, GGUF.

Checkpoints that transformers is to load need no export.
"""
