"""`recover_checkpoint`: a compressed checkpoint learns the dense model's predictions, in place."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grail_hf.calibration.tokens import Calibration, TokenBatches
from grail_hf.checkpoints.folders import check_replaceable, replaced_when_whole
from grail_hf.checkpoints.loading import load_model, load_tokenizer
from grail_hf.checkpoints.sources import meta_model
from grail_hf.models.architectures import find_architecture
from grail_hf.models.decoder import vocabulary_size
from grail_hf.recovery.adapters import check_peft
from grail_hf.recovery.config import RecoveryConfig
from grail_hf.recovery.recover import Task, check_trainable, stopped_run, with_rank
from grail_hf.recovery.report import RecoveryReport
from grail_hf.report import REPORT_FILE, CompressionReport
from grail_hf.runtime import processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel
_FOLDER = "the model's folder"


def recover_checkpoint(
    folder: str | Path,
    dense: str,
    calibration: Calibration | TokenBatches = "c4",
    config: RecoveryConfig | dict[str, Any] | None = None,
    *,
    watch: Calibration | TokenBatches | None = None,
    resume: bool = False,
    progress: bool = True,
    **overrides: Any,
) -> RecoveryReport:
    """Train a checkpoint that `compress` has made towards the dense model's predictions.

    The dense model's predictions go to disk first, and it is freed before the compressed model is
    loaded. The checkpoint is replaced, as a whole, only by a better one. A run that is stopped can
    be resumed from its last evaluation; its files are beside the folder, in `.<name>.recovery`.

    Args:
        folder: of the compressed model, with its grail.json.
        dense: folder of the dense model, or its name on the hub.
        calibration, config, watch, progress, overrides: as in `recover`.
        resume: go on with the run that was stopped; starts one where there is none.

    Raises:
        FileNotFoundError: the folder has no compressed model.
        ValueError, TypeError: bad input, before anything costly starts; a run that was stopped and
            is not to be resumed, or has other settings.
        OSError: the folder cannot be replaced, or the disk is full.
    """
    config = RecoveryConfig.resolve(config, **overrides)
    folder = Path(folder).resolve()
    if not (folder / REPORT_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {REPORT_FILE}: give the folder of a model that grail_hf compressed"
        )
    check_replaceable(folder)
    report = CompressionReport.load(folder)
    skeleton = meta_model(str(folder))
    architecture = find_architecture(skeleton.config.model_type)
    work = folder.with_name(f".{folder.name}.recovery")
    config = with_rank(config, skeleton, architecture, stopped_run(work, resume))
    check_peft(config.rank)
    task = Task(config, architecture, work, resume, progress and processes.is_first())
    tokenizer = load_tokenizer(str(folder)) or load_tokenizer(dense)
    lesson = task.lesson(dense, tokenizer, calibration, watch, vocabulary_size(skeleton))
    model = load_model(str(folder))
    check_trainable(model)
    recovered = task.learn_(model, lesson)
    report.recovery = recovered.to_dict()
    processes.once(partial(_keep, model, report, folder, recovered.kept), _FOLDER)
    processes.once(partial(shutil.rmtree, work), _FOLDER)
    return recovered


def _keep(model: PreTrainedModel, report: CompressionReport, folder: Path, better: bool) -> None:
    """Replace the checkpoint by the model where it is better, and in any case its report."""
    if not better:
        report.save(folder)
        return
    with replaced_when_whole(folder) as new:
        model.save_pretrained(new)
        for path in folder.iterdir():
            weights = path.name.endswith((".safetensors", ".safetensors.index.json"))
            if path.is_file() and not weights and not (new / path.name).exists():
                shutil.copy2(path, new / path.name)
        report.save(new)
