"""A run's folder: marked as one, locked while it is written, resumed or overwritten; no other file is touched.

RUN/run.lock  config.yaml  metrics.jsonl  curves.png  samples/  logs/  checkpoints/  pipeline/
"""

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any

from accelerate import Accelerator
from diffusers import ModelMixin

from latent_egc.atomic import finish_replacing, remove, replace_file, try_lock
from latent_egc.config import Config, ConfigError, expanded, parse_config, read_sections
from latent_egc.data.autoencoders import fingerprint, load_autoencoder
from latent_egc.renamed_keys import with_new_names
from latent_egc.training.build import LAUNCHER_VARIABLES, resolve_model
from latent_egc.training.checkpoints import checkpoint_folders

LOCK = "run.lock"  # is there in every run's folder, and so marks it
STEP = "step-" + 8 * "[0-9]"
# What training writes, and all that overwriting deletes; evaluations and probes are not among it.
WRITTEN = ("config.yaml", "metrics.jsonl", "curves.png", "pipeline", "logs/latent-egc")
WRITTEN += (f"samples/{STEP}.png", f"checkpoints/{STEP}")
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

# What belongs to one call of `train` and not to the run: its first weights are in the checkpoint by now.
OF_ONE_CALL = {"model": {"init_from"}, "training": {"resume", "overwrite"}}
# Section -> the key that says what its other keys are about: with another value they are another thing's.
ABOUT = {"model": "backbone", "autoencoder": "path", "data": "dataset"}


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """`load_config`; for a run to go on with, what the file and the overrides do not say is as in its config.yaml.

    A default may change between versions; a run that began under another goes on as it began.

    Raises:
        ConfigError: as `load_config`.
    """
    values = read_sections(path, overrides)
    config = parse_config(values)
    run = Path(config.output_dir)
    if config.training.resume != "auto" or not checkpoint_folders(run):
        return config
    try:
        stored = _stored_sections(run)
    except (ValueError, TypeError, KeyError):
        return config  # damaged: `prepare_run_folder` says so
    return parse_config(_completed(values, stored))


def _completed(values: Mapping[str, Any], stored: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """`values` with the keys that only `stored` has, section by section; `values` stand last, as they win."""
    completed = dict(values)
    for section, before in stored.items():
        given = values.get(section) or {}
        about = ABOUT.get(section)
        if about in given and _comparable(given[about], section) != _comparable(before.get(about), section):
            continue
        left_out = set(given) | OF_ONE_CALL.get(section, set())
        if section == "training":
            # "no" is also what `accelerate launch` says where nobody chose.
            left_out |= {key for key, name in LAUNCHER_VARIABLES.items() if os.environ.get(name, "no") != "no"}
        completed[section] = {key: value for key, value in before.items() if key not in left_out} | dict(given)
    return completed


def _comparable(value: Any, section: str) -> Any:
    return expanded(value, section) if isinstance(value, str) else value


def _stored_sections(run: Path) -> dict[str, dict[str, Any]]:
    """What a run's config.yaml says. Raises ValueError, TypeError or KeyError where it is damaged."""
    before = with_new_names(read_sections(run / "config.yaml"), warn=False)  # its user did not write it
    sections = {name: dict(before[name]) for name in ("model", "autoencoder", "data", "objective", "training")}
    # Runs from before recorded it as it was given.
    sections["autoencoder"]["path"] = expanded(sections["autoencoder"].get("path"), "autoencoder.path")
    sections["objective"].setdefault("timestep_log_normal", None)  # there was nothing but uniform timesteps
    return sections | {"sampling": dict(before["sampling"])}


def prepare_run_folder(
    config: Config, vae: ModelMixin | None, accelerator: Accelerator
) -> AbstractContextManager[IO[str] | None]:
    """Makes `output_dir` ready: checkpoints in it afterwards are those to go on from. For every process to call.

    Returns:
        The lock, in the main process; leaving it lets others write into the folder.

    Raises:
        ConfigError: the folder holds a run and neither `training.resume` nor `training.overwrite` says what to do with
            it, or other files; another process trains into it; or the run to resume has another model than the resolved
            one of `config`, or another autoencoder than `vae`.
    """
    run, training, lock = Path(config.output_dir), config.training, nullcontext()
    if accelerator.is_main_process:
        if run.exists() and not run.is_dir():
            raise ConfigError(f"output_dir: {run} is a file")
        if training.overwrite and training.resume == "auto":
            raise ConfigError("training.overwrite and training.resume=auto contradict each other")
        if run.exists() and any(run.iterdir()):
            _check_occupied(run, training.resume == "auto", training.overwrite)
        run.mkdir(parents=True, exist_ok=True)
        lock = _lock(run)
        for path in _written(run):
            if training.overwrite:
                remove(path)
            elif path.suffix in (".tmp", ".old"):
                finish_replacing(path.with_suffix(""))
        if checkpoints := checkpoint_folders(run):
            _compare(run, config)
            _compare_autoencoder(checkpoints[-1], config, vae)
        (run / "samples").mkdir(exist_ok=True)
        replace_file(run / "config.yaml", config.save)
    accelerator.wait_for_everyone()
    return lock


def _written(run: Path) -> set[Path]:
    """What training wrote into a folder, unfinished files and replaced folders too."""
    return {path for name in WRITTEN for suffix in ("", ".tmp", ".old") for path in run.glob(name + suffix)}


def _check_occupied(run: Path, resume: bool, overwrite: bool) -> None:
    """Raises ConfigError where what lies in a folder is neither a run to go on with, nor one that may be deleted."""
    if not resume and not overwrite:
        raise ConfigError(
            f"output_dir: {run} already holds files; go on with training.resume=auto, delete them with "
            "training.overwrite=true, or choose another folder"
        )
    written = _written(run)
    # Runs from before the lock have both of these files.
    is_run = (run / LOCK).is_file() or ((run / "config.yaml").is_file() and (run / "metrics.jsonl").is_file())
    if not is_run and (overwrite or written):
        raise ConfigError(f"output_dir: {run} does not look like a run (no {LOCK}), it is left alone")
    if overwrite:
        folders = {run, *(run / name for name in ("samples", "logs", "checkpoints") if (run / name).is_dir())}
        ours = written | folders | {run / LOCK}
        others = sorted(path for folder in folders for path in folder.iterdir() if path not in ours)
        if others:
            raise ConfigError(
                f"training.overwrite: {run} holds what training did not write, nothing was deleted: "
                + ", ".join(str(path.relative_to(run)) for path in others)
            )


def _lock(run: Path) -> IO[str]:
    """Locks a run's folder until the file is closed, or this process is no more. Raises ConfigError."""
    lock = try_lock(run / LOCK)
    if lock is None:
        raise ConfigError(f"output_dir: another process is training into {run}")
    return lock


def differences(run: Path, config: Config) -> list[tuple[str, str, Any, Any]]:
    """(section, key, was, now) of each setting that a run's config.yaml says otherwise, but for those of sampling.

    Args:
        run: its folder.
        config: a resolved one.

    Raises:
        ValueError, TypeError, KeyError: config.yaml is damaged.
    """
    sections, now = _stored_sections(run), config.to_dict()
    del sections["sampling"]  # it decides nothing that is trained
    model_defaults = resolve_model({key: now["model"][key] for key in ("backbone",) if key in now["model"]})
    found = []
    for section, values in sections.items():
        for key, value in now[section].items():
            # A key that was not there yet had the effect of its default.
            default = model_defaults[key] if section == "model" else getattr(getattr(Config, section), key)
            was = values.get(key, list(default) if isinstance(default, tuple) else default)
            if was != value:
                found.append((section, key, was, value))
    return found


def _compare(run: Path, config: Config) -> None:
    """Refuses another model or autoencoder than the run to resume has; warns of another kind of run."""
    try:
        found = differences(run, config)
    except (ValueError, TypeError, KeyError) as error:  # a ConfigError is a ValueError
        warnings.warn(f"{run / 'config.yaml'} is damaged, it is written anew and not compared: {error}", stacklevel=4)
        return
    for section, key, was, value in found:
        if key in MAY_CHANGE:
            continue
        if section in ("model", "autoencoder"):
            raise ConfigError(f"training.resume: {section}.{key} was {was!r} in {run}, now it is {value!r}")
        warnings.warn(
            f"resuming with {section}.{key}={value!r}, it was {was!r}: this will not be the run that was never "
            "interrupted",
            stacklevel=4,
        )


def _compare_autoencoder(checkpoint: Path, config: Config, vae: ModelMixin | None) -> None:
    """Raises ConfigError where `vae` is another than the one in a checkpoint's pipeline, by weights or settings."""
    if vae is None:
        return
    section = dataclasses.replace(config.autoencoder, path=str(checkpoint / "pipeline" / "vae"), subfolder=None)
    before, now = fingerprint(load_autoencoder(section)), fingerprint(vae)
    if before != now:
        raise ConfigError(
            f"training.resume: the autoencoder at autoencoder.path={config.autoencoder.path} is not the one that "
            f"{checkpoint.parents[1]} was trained with: {now}, it was {before}"
        )
