"""What will be done and what it costs: widths, refusals, memory, disk, arithmetic.

Nothing is changed here: `compress` carries a plan out.
"""
