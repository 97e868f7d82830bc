"""The mathematics: pure functions on tensors, of torch alone.

Gram matrices, selectors, allocations of widths, ridge regression. No live module, no file and no
process is known here: those are in `models`, `checkpoints` and `runtime`.
"""
