"""A run's folder and its checkpoints.

    RUN/config.yaml  metrics.jsonl  curves.png  samples/  logs/
    RUN/checkpoints/step-00000500/{state/, pipeline/, checkpoint.json}      what a resumed run needs, and an EGCPipeline
    RUN/pipeline/                                                           the EGCPipeline that training ended with

Whatever is written appears under its name only when it is whole: first a temporary folder, then a rename.
"""

import json
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from latent_egc.atomic import CheckpointError
from latent_egc.config import Config, ConfigError

# What a resumed run may change without becoming another run.
MAY_CHANGE = {
    "init_from",
    "num_workers",
    "max_steps",
    "log_every",
    "evaluate_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "num_evaluation_samples",
    "trackers",
    "resume",
    "overwrite",
}


@dataclass(frozen=True)
class CheckpointRecord:
    """What `checkpoint.json` says.

    Args:
        global_step: optimiser steps done.
        score: higher is better: validation accuracy, or minus the denoising loss of an unlabelled model; None where
            training was stopped between evaluations.
    """

    global_step: int
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
    """Where the pipeline lies that a name means, as `from_pretrained` takes it.

    Args:
        name: a pipeline's own folder; a run's folder, which means its last pipeline, else its best or else its newest
            checkpoint's; or, as a string, a Hub id.

    Returns:
        A folder with a model_index.json; or the Hub id as it is.

    Raises:
        FileNotFoundError: nothing is there, or a folder that holds neither.
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
    (folder / "checkpoint.json").write_text(json.dumps(asdict(record)))


def prune_checkpoints(run: str | Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints and the best one."""
    best = best_checkpoint(run)
    for folder in checkpoint_folders(run)[:-keep]:
        if folder != best:
            shutil.rmtree(folder)


def prepare_run_folder(config: Config) -> Path | None:
    """Makes `output_dir` ready and returns the checkpoint to go on from, if any.

    Raises:
        ConfigError: the folder holds a run and neither `training.resume` nor `training.overwrite` says what to do with
            it, or the run to resume has another model.
    """
    run, training = Path(config.output_dir), config.training
    if run.exists() and not run.is_dir():
        raise ConfigError(f"output_dir: {run} is a file")
    holds_run = run.exists() and any(run.iterdir())
    if training.overwrite and training.resume == "auto":
        raise ConfigError("training.overwrite and training.resume=auto contradict each other")
    if holds_run and training.resume != "auto":
        if not training.overwrite:
            raise ConfigError(
                f"output_dir: {run} already holds files; go on with training.resume=auto, delete them with "
                "training.overwrite=true, or choose another folder"
            )
        if not (run / "config.yaml").is_file():
            raise ConfigError(f"training.overwrite: {run} does not look like a run (no config.yaml), it is left alone")
        shutil.rmtree(run)
    checkpoints = checkpoint_folders(run) if run.exists() else []
    if checkpoints and (run / "config.yaml").is_file():
        before = yaml.safe_load((run / "config.yaml").read_text())
        now = config.to_dict()
        for section in ("model", "autoencoder"):
            for key in now[section]:
                if key not in MAY_CHANGE and before[section].get(key) != now[section][key]:
                    raise ConfigError(
                        f"training.resume: {section}.{key} was {before[section].get(key)!r} in {run}, now it is "
                        f"{now[section][key]!r}"
                    )
        for section in ("data", "objective", "training"):
            for key in now[section].keys() - MAY_CHANGE:
                if before[section].get(key) != now[section][key]:
                    warnings.warn(
                        f"resuming with {section}.{key}={now[section][key]!r}, it was {before[section].get(key)!r}: "
                        "this will not be the run that was never interrupted",
                        stacklevel=2,
                    )
    run.mkdir(parents=True, exist_ok=True)
    (run / "samples").mkdir(exist_ok=True)
    config.save(run / "config.yaml")
    return checkpoints[-1] if checkpoints else None


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
    """A run's metrics.jsonl: one JSON object a line, each with its step. Resuming forgets the steps that come again."""

    def __init__(self, path: Path, global_step: int) -> None:
        self.path = path
        rows = [row for row in read_metrics(path) if row["step"] <= global_step] if path.exists() else []
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Appends one row."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
