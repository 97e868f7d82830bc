"""A compressed checkpoint for other programs: another model type, padded layers, GGUF.

Ordinary checkpoints need none of this: transformers loads them as they are.
"""
