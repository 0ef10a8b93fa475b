"""A run's checkpoints, its metrics, and what its name means where a pipeline is asked for.

RUN/checkpoints/step-00000500/state/            weights and optimiser, of which a resumed run goes on
RUN/checkpoints/step-00000500/pipeline/         an EGCPipeline with the averaged weights; they are the run's averages
RUN/checkpoints/step-00000500/checkpoint.json   what makes the folder a checkpoint

Nothing of it is unpickled freely: weights are safetensors, the optimiser's state is read as weights only. Random states
are not kept, since everything random is a function of (seed, sample number).
"""

import json
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from latent_egc.atomic import CheckpointError, remove, replace_folder, replace_text
from latent_egc.objective import EGCObjective
from latent_egc.pipelines import EGCPipeline
from latent_egc.training.sharding import averaged_weights, load_whole_optimizer, load_whole_weights, whole_state


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
        record = CheckpointRecord(**json.loads((checkpoint / "checkpoint.json").read_text()))
        if type(record.global_step) is not int or type(record.score) not in (int, float, type(None)):
            raise ValueError(f"{record} has other types than it should")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {error}") from error
    return record


def readable_checkpoints(run: str | Path) -> dict[Path, CheckpointRecord]:
    """Checkpoints and what they say, oldest first; a warning names each whose checkpoint.json cannot be read."""
    readable = {}
    for folder in checkpoint_folders(run):
        try:
            readable[folder] = read_record(folder)
        except CheckpointError as error:
            warnings.warn(f"{error}; it is skipped", stacklevel=2)
    return readable


def _best(checkpoints: dict[Path, CheckpointRecord]) -> Path | None:
    scored = [
        (record.score, record.global_step, path)
        for path, record in checkpoints.items()
        if record.score is not None and math.isfinite(record.score)
    ]
    return max(scored)[2] if scored else None


def best_checkpoint(run: str | Path) -> Path | None:
    """The readable checkpoint with the highest score, the later of equals; None if none has a score."""
    return _best(readable_checkpoints(run))


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
    candidates = [folder, folder / "pipeline"]
    if checkpoints := readable_checkpoints(folder):
        candidates.append((_best(checkpoints) or [*checkpoints][-1]) / "pipeline")
    for candidate in candidates:
        if (candidate / "model_index.json").is_file():
            return candidate
    raise FileNotFoundError(f"{name} holds no pipeline (model_index.json) and no run with a checkpoint")


def write_record(folder: Path, record: CheckpointRecord) -> None:
    """Writes `checkpoint.json`, which makes a folder a checkpoint."""
    replace_text(folder / "checkpoint.json", json.dumps(asdict(record)))


def prune_checkpoints(run: str | Path, keep: int) -> None:
    """Deletes all but the newest `keep` readable checkpoints and the best one, half deleted ones too."""
    checkpoints = readable_checkpoints(run)
    oldest = ([*checkpoints][-keep:] or [Path()])[0]
    for folder in Path(run).glob("checkpoints/step-*[0-9]"):
        if folder < oldest and folder != _best(checkpoints):
            remove(folder)


def save_checkpoint(
    run: Path,
    record: CheckpointRecord,
    accelerator: Accelerator,
    objective: nn.Module,
    optimizer: AcceleratedOptimizer,
    average: EMAModel,
    pipeline: EGCPipeline,
    keep: int,
) -> None:
    """Writes a checkpoint and deletes those that are no longer kept; for every process to call.

    The pipeline is written with the average of the weights, and with their log Z where the time score is trained. All
    is whole: any number of processes goes on from it. Raises CheckpointError where writing failed; the earlier
    checkpoints are as they were.
    """
    weights, optimizer_state = whole_state(accelerator.unwrap_model(objective), optimizer.optimizer, accelerator)

    def write(unfinished: Path) -> None:
        (unfinished / "state").mkdir()
        save_file(weights, unfinished / "state" / "model.safetensors")
        with (unfinished / "state" / "optimizer.bin").open("wb") as file:  # a file of torch's own would not say "full"
            torch.save(optimizer_state, file)
        pipeline.save_pretrained(unfinished / "pipeline")
        write_record(unfinished, record)

    with averaged_weights(pipeline.energy_model, average):
        if accelerator.is_main_process:
            if accelerator.unwrap_model(objective).time_score_weight > 0:
                pipeline.fit_log_normalizer()
            replace_folder(run / "checkpoints" / f"step-{record.global_step:08d}", write)
            prune_checkpoints(run, keep)
    accelerator.wait_for_everyone()


def load_checkpoint(run: Path, objective: EGCObjective, optimizer: AcceleratedOptimizer, average: EMAModel) -> int:
    """Goes back to a run's newest checkpoint; returns the steps done, 0 where there is none. Raises CheckpointError."""
    checkpoints = checkpoint_folders(run)
    if not checkpoints:
        return 0
    newest, model = checkpoints[-1], objective.energy_model
    try:
        step = read_record(newest).global_step
        averaged = type(model).from_pretrained(newest / "pipeline" / "energy_model", use_safetensors=True)
        load_whole_weights(model, averaged.state_dict())  # checks names and shapes
        average.load_state_dict({"optimization_step": step, "shadow_params": [p.detach() for p in model.parameters()]})
        load_whole_weights(objective, load_file(newest / "state" / "model.safetensors"))
        state = torch.load(newest / "state" / "optimizer.bin", map_location="cpu", weights_only=True)
        for group in state["param_groups"]:  # as this loop makes it, which did not always
            group["fused"] = True
        load_whole_optimizer(optimizer.optimizer, state)
    except Exception as error:  # torch, safetensors and pickle have no common error for a damaged file
        raise CheckpointError(
            f"checkpoint {newest} is damaged: {error}; delete that folder to resume from the one before it"
        ) from error
    return step


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl; a damaged line, such as one cut off by a kill, is skipped with a warning."""
    rows = []
    for number, line in enumerate(Path(path).read_text(errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
            if type(row["step"]) is not int:
                raise TypeError(f"step is {row['step']!r}")
            rows.append(row)
        except (ValueError, TypeError, KeyError) as error:
            warnings.warn(f"{path}, line {number} is damaged, it is skipped: {error}", stacklevel=2)
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
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps({"step": step, **values}) + "\n")
            except OSError as error:
                raise CheckpointError(f"{self.path}: step {step} could not be written: {error}") from error
