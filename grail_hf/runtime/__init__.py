"""Placement and execution: devices, hidden states, layers, processes, memory, progress.

The semi-private uses of accelerate are in `hooks`.
"""
