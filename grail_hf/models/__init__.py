"""Models: where a type has its projections, as data, and the groups of a live decoder layer.

Model types are known here and nowhere else. The semi-private uses of transformers are in
`modeling_grail` and `decoder` (building models), `quantization`, and `experts` (fused experts).
"""
