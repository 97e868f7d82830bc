"""Make decoder-only language models narrower, and repair them in closed form (GRAIL).

report = grail_hf.compress(model, tokenizer, sparsity=0.3)
model.save_pretrained("out")
report.save("out")
"""

from importlib.metadata import version

from grail_hf.allocation import ALLOCATIONS
from grail_hf.architectures import ARCHITECTURES, Architecture
from grail_hf.compress import PartlyCompressedError, compress
from grail_hf.config import GrailConfig
from grail_hf.disk_to_disk import StoppedError, compress_checkpoint
from grail_hf.evaluation import evaluate, perplexity
from grail_hf.export import Export, export
from grail_hf.infer import architecture_source, infer_architecture
from grail_hf.modeling_grail import install_hook
from grail_hf.report import CompressionReport
from grail_hf.selectors import SELECTORS

__all__ = [
    "ALLOCATIONS",
    "ARCHITECTURES",
    "SELECTORS",
    "Architecture",
    "CompressionReport",
    "Export",
    "GrailConfig",
    "PartlyCompressedError",
    "StoppedError",
    "architecture_source",
    "compress",
    "compress_checkpoint",
    "evaluate",
    "export",
    "infer_architecture",
    "perplexity",
]
__version__ = version("grail-hf")

# Checkpoints whose layers differ load like any other from here on.
install_hook()
