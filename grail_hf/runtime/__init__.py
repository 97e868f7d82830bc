"""Where things lie and run: devices, hidden states, layers, processes, memory, progress.

What is computed is not known here, nor what a checkpoint looks like on disk (`checkpoints`).
"""
