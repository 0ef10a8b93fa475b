"""What the demo opens."""

import datasets
import pytest
import yaml
from tiny import ROOT, tiny_pipeline, write_images
from tiny_verbs import write_things

from latent_egc import EGCPipeline
from latent_egc.config import ConfigError, load_config
from latent_egc.demo.opening import names_at_hand, quickstart_config, references_at_hand, trained_quickstart
from latent_egc.demo.references import read_references


def test_the_packaged_settings_are_those_of_the_quickstart(tmp_path):
    packaged = ROOT / "latent_egc" / "assets" / "digits.yaml"
    assert packaged.read_bytes() == (ROOT / "configs" / "digits.yaml").read_bytes()
    config = quickstart_config(tmp_path / "quickstart")
    assert (config.output_dir, config.training.resume) == (str(tmp_path / "quickstart"), "auto")
    assert config.training.max_steps == load_config(packaged).training.max_steps


def test_at_hand_are_the_trained_quickstart_and_what_came_whole_with_the_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert names_at_hand() == []
    for folder, index in (
        ("runs/mine/pipeline", "{}"),
        ("runs/quickstart/logs", None),
        ("release/b", "{}"),
        ("release/a", '{"autoencoder": null}'),
        ("release/none", None),
        ("release/named", '{"autoencoder": "user/vae"}'),
    ):
        (tmp_path / folder).mkdir(parents=True)
        if index is not None:
            (tmp_path / folder / "model_index.json").write_text(index)
    assert names_at_hand() == ["release/a", "release/b"]
    said = capsys.readouterr().err
    assert said == "latent-egc demo release/named opens another one, with the autoencoder user/vae\n"
    (tmp_path / "runs" / "quickstart" / "pipeline").mkdir()
    (tmp_path / "runs" / "quickstart" / "pipeline" / "model_index.json").touch()
    assert names_at_hand() == ["runs/quickstart", "release/a", "release/b"]


def test_a_network_is_trained_where_there_is_none_and_then_opened(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    write_things(tmp_path, per_class=5)
    short = ["training.max_steps=2", "training.validate_every=2", "training.checkpoint_every=2"]
    config = load_config(tmp_path / "cached.yaml", [f"output_dir={tmp_path / 'run'}", *short])
    name = trained_quickstart(config)
    assert "no network in" in capsys.readouterr().err
    pipeline = EGCPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert len(references_at_hand(pipeline, name, None, 100).rows) == 10
    assert references_at_hand(pipeline, name, None, 0) is None
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert trained_quickstart(config) == name
    assert "no network in" not in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_images_that_are_gone_are_done_without_but_not_those_asked_for(tmp_path, capsys):
    pipeline = tiny_pipeline()
    assert references_at_hand(pipeline, "user/name", None, 10) is None
    (tmp_path / "run").mkdir()
    gone = {"data": {"dataset": "imagefolder", "data_dir": str(tmp_path / "gone"), "image_size": 8}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(gone))
    assert references_at_hand(pipeline, str(tmp_path / "run"), None, 10) is None
    assert "without training images" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="gone"):
        references_at_hand(pipeline, "user/name", tmp_path / "run" / "config.yaml", 10)


def test_references_leave_corrupt_images_out(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    pipeline, data = tiny_pipeline(), write_images(tmp_path / "images")
    whole = read_references(pipeline, data, 100)
    assert whole.rows == list(range(14))
    row = whole.train.rows[3]["image"]
    assert row["path"]
    with open(row["path"], "wb") as file:
        file.write(b"no image")
    found = read_references(pipeline, data, 100)
    assert 3 not in found.rows
    assert len(found.rows) == len(found.latents) == len(found.energies) == 13
    image, label = found.example(8)
    assert image.size == (8, 8)
    assert label in ("cat", "cow", "dog")
