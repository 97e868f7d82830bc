"""Make decoder-only language models narrower, and repair them in closed form (GRAIL).

report = grail_hf.compress(model, tokenizer, sparsity=0.3)
model.save_pretrained("out")
report.save("out")
"""

from importlib.metadata import version

from grail_hf.compress import compress
from grail_hf.config import GrailConfig
from grail_hf.disk_to_disk import StoppedError, compress_checkpoint
from grail_hf.evaluation import evaluate, perplexity
from grail_hf.exports.export import Export, export
from grail_hf.job import PartlyCompressedError
from grail_hf.methods.allocation import ALLOCATIONS
from grail_hf.methods.selectors import SELECTORS, Selector
from grail_hf.models.architectures import ARCHITECTURES
from grail_hf.models.infer import infer_architecture
from grail_hf.models.modeling_grail import install_hook
from grail_hf.models.schema import Architecture
from grail_hf.models.source import architecture_source
from grail_hf.recover_checkpoint import recover_checkpoint
from grail_hf.recovery.config import RecoveryConfig
from grail_hf.recovery.recover import recover
from grail_hf.recovery.report import RecoveryReport
from grail_hf.report import CompressionReport

__all__ = [
    "ALLOCATIONS",
    "ARCHITECTURES",
    "SELECTORS",
    "Architecture",
    "CompressionReport",
    "Export",
    "GrailConfig",
    "PartlyCompressedError",
    "RecoveryConfig",
    "RecoveryReport",
    "Selector",
    "StoppedError",
    "architecture_source",
    "compress",
    "compress_checkpoint",
    "evaluate",
    "export",
    "infer_architecture",
    "perplexity",
    "recover",
    "recover_checkpoint",
]
__version__ = version("grail-hf")

# Checkpoints whose layers differ load like any other from here on.
install_hook()
