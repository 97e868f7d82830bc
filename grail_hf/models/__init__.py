"""What a model is: where its projections are, as data, and as groups of a live layer.

Model types are known here and nowhere else. Which units go is decided in `methods`, on statistics
from `calibration`.
"""
