"""A run's folder: what is kept, what is refused, and that a failure loses nothing."""

import pytest
from accelerate.state import AcceleratorState
from tiny_runs import losses, run_config, run_values

from latent_egc.atomic import CheckpointError, replace_folder
from latent_egc.config import ConfigError, parse_config
from latent_egc.training.checkpoints import (
    best_checkpoint,
    checkpoint_folders,
    read_record,
)
from latent_egc.training.loop import train


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    from accelerate import Accelerator

    save_state, calls = Accelerator.save_state, []

    def full_on_the_second_call(self, folder, **options):
        save_state(self, folder, **options)
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", full_on_the_second_call)
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


def test_newest_and_best_checkpoints_are_kept(tmp_path):
    from latent_egc.training.checkpoints import CheckpointRecord, prune_checkpoints, write_record

    for step, score in ((1, 0.9), (2, 0.9), (3, 0.5), (4, None), (5, 0.6)):
        checkpoint = tmp_path / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        write_record(checkpoint, CheckpointRecord(step, score))
    prune_checkpoints(tmp_path, keep=2)
    assert [read_record(folder).global_step for folder in checkpoint_folders(tmp_path)] == [2, 4, 5]
    assert read_record(best_checkpoint(tmp_path)).global_step == 2
    (tmp_path / "checkpoints/step-00000005/checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match="step-00000005 cannot be read"):
        best_checkpoint(tmp_path)
