"""What is on disk: sources, weights, the journal of a run, folders that are whole or not there.

What becomes of the weights is not known here.
"""
