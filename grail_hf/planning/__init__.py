"""Plans of a compression and their costs: widths, refusals, memory, disk, arithmetic.

Nothing is changed here: `compress` carries out a plan.
"""
