"""A run's folder: what is kept, what is refused, and that a failure loses nothing."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_runs import losses, run_config, run_values

from latent_egc.atomic import CheckpointError, replace_file, replace_folder
from latent_egc.commands import main
from latent_egc.config import ConfigError, parse_config
from latent_egc.training.checkpoints import (
    CheckpointRecord,
    MetricsLog,
    best_checkpoint,
    checkpoint_folders,
    prune_checkpoints,
    read_metrics,
    read_record,
    write_record,
)
from latent_egc.training.loop import train


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    save, calls = torch.save, []

    def full_on_the_second_call(state, file):
        save(state, file)
        calls.append(file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_on_the_second_call)
    with pytest.raises(CheckpointError, match=r"step-00000002 could not be written.*No space left on device"):
        train(run_config(tmp_path / "run", checkpoint_every=1, validate_every=1))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.undo()
    train(run_config(tmp_path / "run", checkpoint_every=1, validate_every=1, resume="auto"))
    assert set(losses(tmp_path / "run")) == {1, 2, 3, 4}


def test_replacing_a_folder_keeps_the_old_one_on_failure(tmp_path):
    replace_folder(tmp_path / "a", lambda folder: (folder / "x").write_text("old"))

    def fail(folder):
        (folder / "x").write_text("new")
        raise OSError("disk full")

    with pytest.raises(CheckpointError, match="disk full"):
        replace_folder(tmp_path / "a", fail)
    assert (tmp_path / "a" / "x").read_text() == "old"
    replace_folder(tmp_path / "a", lambda folder: (folder / "x").write_text("new"))
    assert (tmp_path / "a" / "x").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_a_kill_left_beside_a_folder_does_not_stop_the_next_writing(tmp_path):
    for name in ("a", "a.tmp", "a.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
        (tmp_path / name / f"of {name}").write_text("left behind")
    replace_folder(tmp_path / "a", lambda folder: (folder / "x").write_text("new"))
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"a", "a/x"}
    assert (tmp_path / "a" / "x").read_text() == "new"


def test_a_run_is_not_overwritten_without_being_told(tmp_path):
    folder = train(run_config(tmp_path / "run", max_steps=1))
    before = (folder / "metrics.jsonl").read_text()
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ConfigError, match="already holds files"):
        train(run_config(folder))
    assert (folder / "metrics.jsonl").read_text() == before
    with pytest.raises(ConfigError, match="contradict"):
        train(run_config(folder, overwrite=True, resume="auto"))
    train(run_config(folder, max_steps=2, overwrite=True))
    assert set(losses(folder)) == {1, 2}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ConfigError, match="does not look like a run"):
        train(run_config(tmp_path / "mine", overwrite=True))
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_resuming_with_another_model_or_a_damaged_checkpoint(tmp_path):
    folder = train(run_config(tmp_path / "run", max_steps=1))
    AcceleratorState._reset_state(reset_partial_state=True)
    values = run_values(folder, max_steps=2, resume="auto")
    values["model"]["block_out_channels"] = [8, 24]
    with pytest.raises(ConfigError, match=r"model\.block_out_channels was \[8, 16\]"):
        train(parse_config(values))
    AcceleratorState._reset_state(reset_partial_state=True)
    values = run_values(folder, max_steps=2, resume="auto") | {"autoencoder": {"sample_posterior": False}}
    with pytest.raises(ConfigError, match=r"autoencoder\.sample_posterior was True"):
        train(parse_config(values))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.warns(UserWarning, match=r"training\.seed=5, it was 0"):
        train(run_config(folder, max_steps=1, resume="auto", seed=5))
    AcceleratorState._reset_state(reset_partial_state=True)
    weights = next((checkpoint_folders(folder)[-1] / "state").glob("model*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"step-00000001 is damaged.*delete that folder"):
        train(run_config(folder, max_steps=2, resume="auto", seed=5))


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path, capsys):
    folder = train(run_config(tmp_path / "run", max_steps=2, checkpoint_every=1, keep_checkpoints=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(run_config(folder, max_steps=2, resume="auto"))
    assert "resumed at step 2\n" in capsys.readouterr().out


def test_newest_and_best_checkpoints_are_kept(tmp_path):
    for step, score in ((1, 0.9), (2, 0.9), (3, 0.5), (4, None), (5, 0.6)):
        scored_checkpoint(tmp_path, step, score)
    prune_checkpoints(tmp_path, keep=2)
    assert [read_record(folder).global_step for folder in checkpoint_folders(tmp_path)] == [2, 4, 5]
    assert read_record(best_checkpoint(tmp_path)).global_step == 2


class Payload:
    """What a hostile pickle is: a call that happens on loading."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    "name",
    [
        "state/optimizer.bin",
        "state/random_states_0.pkl",
        "state/custom_checkpoint_0.pkl",
        "state/pytorch_model.bin",
        "state/scaler.pt",
        "state/model.safetensors",
        "pipeline/energy_model/diffusion_pytorch_model.safetensors",
        "pipeline/energy_model/diffusion_pytorch_model.bin",
        "checkpoint.json",
    ],
)
def test_no_file_of_a_checkpoint_can_run_code(tmp_path, name):
    folder = train(run_config(tmp_path / "run", max_steps=1))
    AcceleratorState._reset_state(reset_partial_state=True)
    (checkpoint,) = checkpoint_folders(folder)
    torch.save({"x": Payload(tmp_path / "ran")}, checkpoint / name)
    (tmp_path / "ran").unlink(missing_ok=True)
    if name.endswith("energy_model/diffusion_pytorch_model.bin"):
        (checkpoint / name).with_suffix(".safetensors").unlink()
    if name == "state/pytorch_model.bin":
        (checkpoint / "state" / "model.safetensors").unlink()
    try:
        train(run_config(folder, max_steps=2, resume="auto"))
        refused = False
    except CheckpointError as error:
        refused = "step-00000001 is damaged" in str(error)
    assert not (tmp_path / "ran").exists()
    assert refused == ((checkpoint / name).stem not in ("random_states_0", "custom_checkpoint_0", "scaler"))


def scored_checkpoint(run, step, score):
    checkpoint = run / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    write_record(checkpoint, CheckpointRecord(step, score))
    return checkpoint


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"global_step": "2", "score": 1}', '{"global_step": 2, "score": "a"}']
)
def test_a_damaged_record_is_skipped_with_a_warning(tmp_path, text):
    for step, score in ((1, 0.9), (2, 1.0), (3, 0.5), (4, 0.2)):
        scored_checkpoint(tmp_path, step, score)
    (tmp_path / "checkpoints/step-00000002/checkpoint.json").write_text(text)
    with pytest.warns(UserWarning, match="step-00000002 cannot be read: .*; it is skipped"):
        assert best_checkpoint(tmp_path).name == "step-00000001"
    with pytest.warns(UserWarning, match="step-00000002 cannot be read"):
        prune_checkpoints(tmp_path, keep=1)
    assert sorted(path.name[-1] for path in (tmp_path / "checkpoints").iterdir()) == ["1", "4"]


def test_a_damaged_record_does_not_stop_info_or_export(tmp_path, capsys):
    folder = train(run_config(tmp_path / "run", max_steps=2, checkpoint_every=1))
    shutil.rmtree(folder / "pipeline")
    (folder / "checkpoints/step-00000001/checkpoint.json").write_text("{")
    for verb in (["info", str(folder)], ["export", str(folder), str(tmp_path / "hub")]):
        with pytest.warns(UserWarning, match="step-00000001 cannot be read"):
            assert main(verb) == 0
    assert (tmp_path / "hub" / "model_index.json").is_file()


def test_pruning_ends_what_it_began(tmp_path):
    for step in range(1, 5):
        scored_checkpoint(tmp_path, step, step / 10)
    (tmp_path / "checkpoints/step-00000002/checkpoint.json").unlink()
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name[-1] for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_damaged_lines_of_metrics_are_skipped_and_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo\n\x00\xff\n[3]\n{"step": "4"}\n{"step": 5}\n')
    with pytest.warns(UserWarning, match="is damaged, it is skipped") as warned:
        assert [row["step"] for row in read_metrics(path)] == [1, 5]
    for number, warning in zip((2, 3, 4, 5), warned, strict=True):
        assert str(warning.message).startswith(f"{path}, line {number} is damaged")


def test_a_full_disk_is_named_and_leaves_files_as_they_were(tmp_path):
    """/dev/full stands for the disk: every write to it fails."""
    path = tmp_path / "config.yaml"
    path.write_text("whole")
    with pytest.raises(CheckpointError, match=r"config\.yaml could not be written, it is as it was before"):
        replace_file(path, lambda unfinished: Path("/dev/full").write_text("new"))
    assert path.read_text() == "whole"
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, Accelerator(cpu=True))
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: step 3 could not be written"):
        log.add(3, {"loss": 1.0})
