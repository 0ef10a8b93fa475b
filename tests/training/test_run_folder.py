"""A run's folder: only a run's own files are deleted or replaced, and one process at a time writes there."""

import dataclasses

import pytest
import yaml
from accelerate.state import AcceleratorState
from tiny import tiny_kl
from tiny_runs import finish, losses, run_config, run_values, start, wait_for_step

from latent_egc.atomic import finish_replacing, remove, replace_folder
from latent_egc.config import AutoencoderConfig, ConfigError, parse_config
from latent_egc.data.autoencoders import load_autoencoder
from latent_egc.training.build import resolve
from latent_egc.training.loop import train
from latent_egc.training.run_folder import load_run_config


@pytest.fixture
def run_folder(tmp_path):
    folder = train(run_config(tmp_path / "run", max_steps=1, trackers=["tensorboard"], sample_every=1))
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.mark.parametrize("name", ["thesis.txt", "evaluation/report.json", "samples/best.png", "checkpoints/mine/a.pt"])
def test_overwriting_deletes_nothing_where_other_files_lie(run_folder, name):
    other = run_folder / name
    other.parent.mkdir(exist_ok=True)
    other.write_text("precious")
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=f"what training did not write.*{name.rpartition('/')[0] or name}"):
        train(run_config(run_folder, overwrite=True))
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before


def test_overwriting_deletes_what_a_run_wrote(run_folder):
    (run_folder / "pipeline.old").mkdir()
    (run_folder / "checkpoints" / "step-00000007.tmp").mkdir()
    train(run_config(run_folder, max_steps=2, checkpoint_every=2, overwrite=True))
    assert set(losses(run_folder)) == {1, 2}
    assert [path.name for path in (run_folder / "checkpoints").iterdir()] == ["step-00000002"]
    names = {"checkpoints", "config.yaml", "curves.png", "logs", "metrics.jsonl", "pipeline", "run.lock", "samples"}
    assert {path.name for path in run_folder.iterdir()} == names
    assert [path.name for path in (run_folder / "samples").iterdir()] == ["step-00000002.png"]
    assert not any((run_folder / "logs").iterdir())


@pytest.mark.parametrize("choice", [{"overwrite": True}, {"resume": "auto"}])
def test_a_project_with_a_config_of_its_own_is_left_alone(tmp_path, choice):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.yaml").write_text("theme: dark")
    with pytest.raises(ConfigError, match="does not look like a run"):
        train(run_config(tmp_path / "project", **choice))
    assert [path.name for path in (tmp_path / "project").iterdir()] == ["config.yaml"]
    assert (tmp_path / "project" / "config.yaml").read_text() == "theme: dark"


@pytest.mark.parametrize(
    ("section", "key", "place"),
    [("data", "latent_cache", "cache"), ("data", "latent_cache", "."), ("model", "init_from", "pipeline")],
)
def test_a_run_is_not_written_around_what_it_reads(tmp_path, section, key, place):
    (tmp_path / "run" / place).mkdir(parents=True, exist_ok=True)
    values = run_values(tmp_path / "run", overwrite=True)
    values[section] = values.get(section, {}) | {key: str(tmp_path / "run" / place)}
    with pytest.raises(ConfigError, match=rf"output_dir=.*must not contain what the run reads, {section}\.{key}="):
        parse_config(values)


def test_one_process_at_a_time_writes_into_a_folder_and_a_dead_one_does_not_block(tmp_path):
    """The dead one's loader workers may live on for some seconds."""
    values = run_values(tmp_path / "run", max_steps=2000, checkpoint_every=2, validate_every=1000)
    values["data"] = {"num_workers": 1}
    process = start(values)
    wait_for_step(process, tmp_path / "run", 4)
    for choice in ({"resume": "auto"}, {"overwrite": True}):
        with pytest.raises(ConfigError, match="output_dir: another process is training into"):
            train(run_config(tmp_path / "run", **choice))
        AcceleratorState._reset_state(reset_partial_state=True)
    process.kill()
    process.wait()
    train(run_config(tmp_path / "run", max_steps=max(losses(tmp_path / "run")) + 1, resume="auto"))


def test_an_autoencoder_changed_at_the_same_path_is_noticed(tmp_path):
    vae = tiny_kl(latent_channels=4, block_out_channels=(4, 8))
    vae.save_pretrained(tmp_path / "vae")
    values = run_values(tmp_path / "run", max_steps=1)
    values["autoencoder"] = {"path": str(tmp_path / "vae")}
    values["data"] = {"image_size": 16}
    train(parse_config(values))
    AcceleratorState._reset_state(reset_partial_state=True)
    values["training"] |= {"max_steps": 2, "resume": "auto"}
    train(parse_config(values))
    AcceleratorState._reset_state(reset_partial_state=True)
    vae.encoder.conv_in.bias.data += 1e-3
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ConfigError, match=r"autoencoder\.path=.*/vae is not the one that .*/run was trained with"):
        train(parse_config(values))


def test_a_damaged_config_is_written_anew(run_folder):
    text = (run_folder / "config.yaml").read_text()
    for damaged in ("", text[: len(text) // 2], "a: b: c"):
        (run_folder / "config.yaml").write_text(damaged)
        with pytest.warns(UserWarning, match=r"config\.yaml is damaged, it is written anew and not compared"):
            train(run_config(run_folder, max_steps=1, resume="auto"))
        AcceleratorState._reset_state(reset_partial_state=True)
        assert yaml.safe_load((run_folder / "config.yaml").read_text())["training"]["max_steps"] == 1


def test_what_a_kill_left_half_done_is_ended_on_resume(run_folder):
    (run_folder / "pipeline").rename(run_folder / "pipeline.old")
    for name in ("pipeline.tmp", "checkpoints/step-00000001.tmp", "checkpoints/step-00000001.old"):
        (run_folder / name).mkdir()
    (run_folder / "samples" / "step-00000001.png.tmp").write_text("half")
    (run_folder / "notes.old").write_text("the user's")
    train(run_config(run_folder, max_steps=1, resume="auto"))
    assert (run_folder / "pipeline" / "model_index.json").is_file()
    left = [str(path.relative_to(run_folder)) for path in run_folder.rglob("*") if path.suffix in (".tmp", ".old")]
    assert left == ["notes.old"]


def test_a_replaced_folder_is_put_back_where_its_successor_did_not_come(tmp_path):
    (tmp_path / "a.old").mkdir()
    (tmp_path / "a.old" / "x").write_text("whole")

    def fail(folder):
        raise OSError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        replace_folder(tmp_path / "a", fail)
    assert (tmp_path / "a" / "x").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    finish_replacing(tmp_path / "a")
    assert (tmp_path / "a" / "x").exists()


def test_a_folder_half_deleted_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("whole")
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)  # killed here
    remove(tmp_path / "a")
    monkeypatch.undo()
    assert not (tmp_path / "a").exists()
    finish_replacing(tmp_path / "a")
    assert not any(tmp_path.iterdir())


def test_processes_that_would_each_train_alone_are_refused(tmp_path):
    """torchrun on a CPU, without the variable that makes Accelerate see its processes."""
    output = start(run_values(tmp_path / "run"), environment={"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "false"})
    text, _ = output.communicate(timeout=200)
    assert output.returncode == 2
    assert "error: the launcher started 2 processes (WORLD_SIZE), but Accelerate would train in 1" in text
    assert "ACCELERATE_USE_CPU=true" in text
    assert not (tmp_path / "run").exists()
    assert "resumed" not in finish(start(run_values(tmp_path / "run", max_steps=1), environment={"WORLD_SIZE": "1"}))


@pytest.mark.filterwarnings("error:resuming with")
def test_a_run_that_recorded_its_autoencoder_below_home_goes_on(tmp_path, monkeypatch):
    """As it was given, where now the whole path is recorded."""
    monkeypatch.setenv("HOME", str(tmp_path))
    values = run_values(tmp_path / "run", max_steps=1) | {"autoencoder": {"path": "~/vae"}}
    load_autoencoder(AutoencoderConfig()).save_pretrained(tmp_path / "vae")
    train(parse_config(values))
    file = tmp_path / "run" / "config.yaml"
    assert f"path: {tmp_path}/vae" in file.read_text()
    file.write_text(file.read_text().replace(f"path: {tmp_path}/vae", "path: ~/vae"))
    AcceleratorState._reset_state(reset_partial_state=True)
    values["training"] |= {"resume": "auto", "max_steps": 2}
    train(parse_config(values))
    assert sorted(losses(tmp_path / "run")) == [1, 2]


def resumed(tmp_path, values, *overrides):
    """What `latent-egc train my.yaml training.resume=auto` makes of a file."""
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(values))
    return load_run_config(tmp_path / "my.yaml", ["training.resume=auto", *overrides])


@pytest.mark.filterwarnings("error:resuming with")
def test_a_resumed_run_takes_what_its_file_does_not_say_from_its_own_config(tmp_path):
    """It began under other defaults: of the model, the loss, the optimiser, the data and the grids."""
    values = run_values(tmp_path / "run", max_steps=1, weight_decay=0.01, ema_decay=0.9, overwrite=True)
    values["data"] = {"random_resized_crop": [0.7, 0.9]}
    before = resolve(parse_config(values))
    train(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    short = {"training": {"max_steps": 2}, "model": {"num_classes": 10}, "output_dir": str(tmp_path / "run")}
    config = resumed(tmp_path, short, "training.trackers=[]")
    changed = dataclasses.replace(before.training, max_steps=2, resume="auto", overwrite=False)
    assert resolve(config) == dataclasses.replace(before, training=changed)
    train(config)
    assert sorted(losses(tmp_path / "run")) == [1, 2]


def test_what_a_resumed_runs_file_says_wins(run_folder, tmp_path, monkeypatch):
    values = {"model": {"num_classes": 10}, "output_dir": str(run_folder)}
    # Under its former name, too; the newer of two names is an override's.
    old = values | {"training": {"evaluate_every": 7}}
    with pytest.warns(UserWarning, match="training.evaluate_every is now training.validate_every"):
        assert resumed(tmp_path, old).training.validate_every == 7
    with pytest.warns(UserWarning, match="training.evaluate_every is now training.validate_every"):
        assert resumed(tmp_path, old, "training.validate_every=8").training.validate_every == 8
    # Another backbone has other keys.
    assert "block_out_channels" not in resumed(tmp_path, values | {"model": {"backbone": "transformer"}}).model
    assert resumed(tmp_path, values).training.mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert resumed(tmp_path, values).training.mixed_precision is None
    assert resumed(tmp_path, values).training.warmup_steps == 2


@pytest.mark.parametrize("damage", ["config.yaml", "checkpoints", "resume"])
def test_a_new_run_and_a_damaged_record_have_the_defaults(run_folder, tmp_path, damage):
    overrides = ["training.resume=never"] if damage == "resume" else []
    if damage == "checkpoints":
        remove(run_folder / "checkpoints")
    elif damage == "config.yaml":
        (run_folder / "config.yaml").write_text("model: {}")
    values = {"model": {"num_classes": 10}, "output_dir": str(run_folder)}
    assert resumed(tmp_path, values, *overrides).training == dataclasses.replace(
        parse_config(values).training, resume="never" if overrides else "auto"
    )
