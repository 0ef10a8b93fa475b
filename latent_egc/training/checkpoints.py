"""A run's folder and its checkpoints.

RUN/config.yaml  metrics.jsonl  curves.png  samples/  logs/
RUN/checkpoints/step-00000500/{state/, pipeline/, checkpoint.json}      what a resumed run needs, and an EGCPipeline
RUN/pipeline/                                                           the EGCPipeline that training ended with
"""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.distributed.optim import ZeroRedundancyOptimizer

from latent_egc.atomic import CheckpointError, replace_file, replace_folder, replace_text
from latent_egc.config import Config, ConfigError

# What a resumed run may change without becoming another run.
MAY_CHANGE = {
    "init_from",
    "num_workers",
    "max_steps",
    "log_every",
    "validate_every",
    "sample_every",
    "checkpoint_every",
}
MAY_CHANGE |= {"keep_checkpoints", "num_validation_images", "check_gradients", "trackers", "resume", "overwrite"}


@dataclass(frozen=True)
class CheckpointRecord:
    """What `checkpoint.json` says."""

    global_step: int  # optimiser steps done
    # Higher is better: validation accuracy, or minus the denoising loss; None where training stopped in between.
    score: float | None


def checkpoint_folders(run: str | Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(path.parent for path in Path(run).glob("checkpoints/step-*[0-9]/checkpoint.json"))


def read_record(checkpoint: Path) -> CheckpointRecord:
    """What `checkpoint.json` says. Raises CheckpointError where it cannot be read."""
    try:
        return CheckpointRecord(**json.loads((checkpoint / "checkpoint.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {error}") from error


def best_checkpoint(run: str | Path) -> Path | None:
    """The checkpoint with the highest score, the later of equals; None if none has a score."""
    scored = [
        (record.score, record.global_step, path) for path in checkpoint_folders(run) if (record := read_record(path))
    ]
    scored = [entry for entry in scored if entry[0] is not None]
    return max(scored)[2] if scored else None


def resolve_pipeline(name: str | Path) -> str | Path:
    """Where the pipeline lies that a name means, as `from_pretrained` takes it: a folder with a model_index.json, or a
    string that names no folder, a Hub id, as it is. A run's folder means its last pipeline, else that of its best or
    else of its newest checkpoint.

    Raises:
        FileNotFoundError: a path where nothing is, or a folder that holds neither.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        if isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise FileNotFoundError(f"no such run or pipeline: {name}")
        return name
    best = best_checkpoint(folder)
    checkpoints = [best] if best else checkpoint_folders(folder)[-1:]
    for candidate in (folder, folder / "pipeline", *(checkpoint / "pipeline" for checkpoint in checkpoints)):
        if (candidate / "model_index.json").is_file():
            return candidate
    raise FileNotFoundError(f"{name} holds no pipeline (model_index.json) and no run with a checkpoint")


def write_record(folder: Path, record: CheckpointRecord) -> None:
    """Writes `checkpoint.json`, which makes a folder a checkpoint."""
    replace_text(folder / "checkpoint.json", json.dumps(asdict(record)))


def prune_checkpoints(run: str | Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints and the best one."""
    best = best_checkpoint(run)
    for folder in checkpoint_folders(run)[:-keep]:
        if folder != best:
            shutil.rmtree(folder)


def save_checkpoint(
    run: Path,
    record: CheckpointRecord,
    accelerator: Accelerator,
    optimizer: AcceleratedOptimizer,
    save_pipeline: Callable[[Path], None],
    keep: int,
) -> None:
    """Writes a checkpoint and deletes those that are no longer kept; for every process to call.

    Raises CheckpointError where writing failed; the earlier checkpoints are as they were.
    """
    if isinstance(optimizer.optimizer, ZeroRedundancyOptimizer):
        optimizer.optimizer.consolidate_state_dict(to=0)  # the main process writes the whole state

    def write(unfinished: Path) -> None:
        accelerator.save_state(str(unfinished / "state"))
        save_pipeline(unfinished / "pipeline")
        write_record(unfinished, record)

    if accelerator.is_main_process:
        replace_folder(run / "checkpoints" / f"step-{record.global_step:08d}", write)
        prune_checkpoints(run, keep)
    accelerator.wait_for_everyone()


def load_checkpoint(run: Path, accelerator: Accelerator) -> int:
    """Goes back to a run's newest checkpoint; returns the steps done, 0 where there is none. Raises CheckpointError."""
    checkpoints = checkpoint_folders(run)
    if not checkpoints:
        return 0
    record = read_record(checkpoints[-1])
    try:
        accelerator.load_state(str(checkpoints[-1] / "state"))
    except Exception as error:  # torch, safetensors and pickle have no common error for a damaged file
        raise CheckpointError(
            f"checkpoint {checkpoints[-1]} is damaged: {error}; delete that folder to resume from the one before it"
        ) from error
    return record.global_step


def prepare_run_folder(config: Config, accelerator: Accelerator) -> None:
    """Makes `output_dir` ready: checkpoints in it afterwards are those to go on from. For every process to call.

    Raises ConfigError: the folder holds a run and neither `training.resume` nor `training.overwrite` says what to do
    with it, or the run to resume has another model than the resolved one of `config`.
    """
    run, training = Path(config.output_dir), config.training
    if accelerator.is_main_process:
        if run.exists() and not run.is_dir():
            raise ConfigError(f"output_dir: {run} is a file")
        if training.overwrite and training.resume == "auto":
            raise ConfigError("training.overwrite and training.resume=auto contradict each other")
        if run.exists() and any(run.iterdir()) and training.resume != "auto":
            if not training.overwrite:
                raise ConfigError(
                    f"output_dir: {run} already holds files; go on with training.resume=auto, delete them with "
                    "training.overwrite=true, or choose another folder"
                )
            if not (run / "config.yaml").is_file():
                raise ConfigError(
                    f"training.overwrite: {run} does not look like a run (no config.yaml), it is left alone"
                )
            shutil.rmtree(run)
        if checkpoint_folders(run) and (run / "config.yaml").is_file():
            _compare(run, config.to_dict())
        (run / "samples").mkdir(parents=True, exist_ok=True)
        replace_file(run / "config.yaml", config.save)
    accelerator.wait_for_everyone()


def _compare(run: Path, now: dict[str, Any]) -> None:
    """Refuses another model or autoencoder than the run to resume has; warns of another kind of run."""
    before = yaml.safe_load((run / "config.yaml").read_text())
    for section in ("model", "autoencoder", "data", "objective", "training"):
        for key in [key for key in now[section] if key not in MAY_CHANGE]:
            was, value = before[section].get(key), now[section][key]
            if was == value:
                continue
            if section in ("model", "autoencoder"):
                raise ConfigError(f"training.resume: {section}.{key} was {was!r} in {run}, now it is {value!r}")
            warnings.warn(
                f"resuming with {section}.{key}={value!r}, it was {was!r}: this will not be the run that was never "
                "interrupted",
                stacklevel=4,
            )


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl; a last line cut off by a kill is left out."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsLog:
    """A run's metrics: to the trackers, and to metrics.jsonl, one JSON object a line, each with its step.

    Every process has one; the main process writes. Resuming forgets the steps that come again.
    """

    def __init__(self, path: Path, global_step: int, accelerator: Accelerator) -> None:
        self.path, self.accelerator = path, accelerator
        accelerator.init_trackers("latent-egc")
        if accelerator.is_main_process:
            rows = [row for row in read_metrics(path) if row["step"] <= global_step] if path.exists() else []
            replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Appends one row."""
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
