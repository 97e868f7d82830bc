"""Recovery: a compressed model learns the dense model's predictions by gradient steps.

No labels are used. Nothing here selects or repairs units, and nothing else of the package trains.
"""
