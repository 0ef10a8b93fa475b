"""The command line, run in this process on a tiny pipeline."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from command_line import fails
from fake_hub import serve
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from tiny import tiny_kl, tiny_pipeline

import latent_egc.training.proposal
from latent_egc import EGCPipeline
from latent_egc.commands import FIRST_COMMANDS, VERBS, main, train_main
from latent_egc.config import parse_config
from latent_egc.pipelines.schedulers import solver
from latent_egc.training.build import build_network
from latent_egc.training.figures import sample_rows

MODEL = {
    "sample_size": 4,
    "in_channels": 2,
    "num_classes": 2,
    "block_out_channels": [8, 16],
    "attention_levels": [1],
    "norm_num_groups": 4,
}


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    """`datasets` prepares its tables below the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def pipeline(tmp_path) -> str:
    """A saved pipeline with the classes cat, dog and cow; 8x8 images."""
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    return str(tmp_path / "pipeline")


@pytest.fixture
def images(tmp_path):
    """A folder with two images, one of them in a folder below, and a text file."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (8, 8, 3)), ("more/b.JPG", (20, 10, 3))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def config(tmp_path):
    """A config file of a tiny run on two classes of noise."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(5):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    tiny_kl().save_pretrained(tmp_path / "vae")
    values = {
        "model": MODEL,
        "autoencoder": {"path": str(tmp_path / "vae")},
        "data": {"dataset": "imagefolder", "data_dir": str(tmp_path / "data"), "image_size": 8},
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_holds_an_example(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    assert f"example: latent-egc {verb} " in capsys.readouterr().out


def test_help_lists_the_verbs(capsys):
    assert {"encode", "train", "sample", "classify", "evaluate", "probe", "info", "export", "convert"} < set(VERBS)
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    assert FIRST_COMMANDS in out


def test_without_a_verb_four_commands_are_shown_that_follow_from_each_other(tmp_path, monkeypatch, capsys):
    """The first as printed, in an empty folder; the others with what takes minutes left out."""
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    shown = capsys.readouterr().err
    init, train, sample, classify = (line.strip() for line in shown.splitlines() if line.startswith("  latent-egc "))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latent_egc.training.proposal, "measure_step", lambda *arguments: 1.0)
    monkeypatch.setattr(latent_egc.training.proposal, "measure_encoding", lambda *arguments: 1.0)
    init, _, config_file = init.partition(" > ")
    assert main(shlex.split(init)[1:]) == 0
    Path(config_file).write_text(capsys.readouterr().out)
    assert main([*shlex.split(train)[1:], "--dry-run"]) == 0
    run = yaml.safe_load(capsys.readouterr().out)["output_dir"]
    digits = tuple(str(digit) for digit in range(10))
    tiny_pipeline(names=digits, num_classes=10).save_pretrained(f"{run}/pipeline")
    assert main([*shlex.split(sample)[1:], "--steps=2", "--num-images-per-label=1"]) == 0
    assert main(shlex.split(classify)[1:]) == 0
    assert "row00_3_000.png" in capsys.readouterr().out


def test_help_loads_no_torch():
    """One process for all of them: what no verb has loaded, none has."""
    script = """
import sys
import latent_egc
from latent_egc.commands import VERBS, main
for verb in ["", *VERBS]:
    try:
        main([*verb.split(), "--help"])
    except SystemExit as end:
        assert end.code == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize(
    "launcher",
    [["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "-m", "latent_egc"], ["-m", "latent_egc.cli"]],
    ids=["accelerate", "former name"],
)
def test_the_package_is_a_command(launcher, pipeline):
    done = subprocess.run([sys.executable, *launcher, "info", pipeline], capture_output=True, text=True, check=True)
    assert "3: cat, dog, cow" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
@pytest.mark.parametrize("verb", ["sample", "classify"])
def test_a_device_that_is_not_there_is_named(pipeline, images, verb, capsys):
    arguments = [verb, pipeline, *([images] if verb == "classify" else []), "--device"]
    fails(capsys, [*arguments, "cuda"], "--device cuda cannot be used here")
    fails(capsys, [*arguments, "gpu"], "--device gpu cannot be used here")


@pytest.mark.parametrize("file", ["model_index.json", "energy_model/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", ["[1, 2]", '{"a": ', "null", ""])
def test_a_pipeline_with_a_broken_file_is_named(pipeline, file, content, capsys):
    (Path(pipeline) / file).write_text(content)
    fails(capsys, ["info", pipeline], "the pipeline", pipeline, "cannot be loaded")


# --- sample ---------------------------------------------------------------------------------------------------------


def test_sample_writes_a_grid_and_single_images(pipeline, tmp_path, capsys):
    output = tmp_path / "samples"
    arguments = ["sample", pipeline, "--num-images-per-label", "2", "--steps", "2", "--output", str(output)]
    assert main([*arguments, "--classes", "dog", "2"]) == 0
    files = sorted(path.name for path in output.iterdir())
    assert files == ["grid.png", "row00_dog_000.png", "row00_dog_001.png", "row01_cow_000.png", "row01_cow_001.png"]
    assert Image.open(output / "row00_dog_000.png").size == (8, 8)
    assert "4 images and grid.png written to" in capsys.readouterr().out


def test_sample_takes_all_classes_by_default_and_the_same_seed_gives_the_same_images(pipeline, tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        output = str(tmp_path / name)
        assert (
            main(["sample", pipeline, "--num-images-per-label=1", "--steps=2", f"--seed={seed}", "--output", output])
            == 0
        )
    assert len(list((tmp_path / "a").glob("row*.png"))) == 3
    first, same, other = (np.asarray(Image.open(tmp_path / name / "row00_cat_000.png")) for name in "abc")
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_a_class_asked_for_twice_is_written_twice(pipeline, tmp_path):
    """By the number's former name."""
    arguments = ["sample", pipeline, "--classes", "cat", "cat", "--images-per-class=1", "--steps=2"]
    assert main([*arguments, "--output", str(tmp_path / "samples")]) == 0
    assert len(list((tmp_path / "samples").glob("row*.png"))) == 2


def test_sample_takes_a_solver_and_candidates(pipeline, tmp_path):
    options = ["--solver", "Heun", "--num-candidates", "2", "--select-by", "density"]
    arguments = ["sample", pipeline, "--classes", "cat", "--num-images-per-label=2", "--steps=2", *options]
    assert main([*arguments, "--output", str(tmp_path / "samples")]) == 0
    loaded = EGCPipeline.from_pretrained(pipeline)
    loaded.scheduler = solver("Heun", loaded.scheduler)
    expected = sample_rows(loaded, [0], 2, 2, num_candidates=2, select_by="density")
    found = np.asarray(Image.open(tmp_path / "samples" / "row00_cat_001.png"))
    assert np.array_equal(found, (expected[0, 1] * 255).round().astype(np.uint8))


def test_sample_unlabelled(pipeline, tmp_path):
    tiny_pipeline(num_classes=None, energy_channels=3).save_pretrained(tmp_path / "unlabelled")
    for source, flags in ((pipeline, ["--unlabelled"]), (tmp_path / "unlabelled", [])):
        output = tmp_path / f"of-{len(flags)}"
        arguments = ["sample", str(source), "--num-images-per-label=2", "--steps=2", "--output", str(output), *flags]
        assert main(arguments) == 0
        assert len(list(output.glob("row*.png"))) == 4


def test_sample_composes_classes_with_a_corrector(pipeline, tmp_path, capsys):
    grids = []
    for flags in (["--all-of", "cat", "2", "--none-of", "dog"], ["--all-of", "cat", "2"], ["--any-of", "cat", "2"]):
        output = tmp_path / f"samples{len(grids)}"
        arguments = ["sample", pipeline, "--num-images-per-label=2", "--steps=2", "--corrector=mala", *flags]
        assert main([*arguments, "--output", str(output)]) == 0
        assert len(list(output.glob("row*.png"))) == 4
        grids.append((output / "grid.png").read_bytes())
    assert len(set(grids)) == 3
    capsys.readouterr()
    fails(capsys, ["sample", pipeline, "--all-of", "cta"], "unknown class name 'cta' in all_of")
    fails(capsys, ["sample", pipeline, "--all-of", "cat", "--classes", "dog"], "--none-of exclude --classes")


def test_sample_errors(pipeline, tmp_path, capsys):
    fails(capsys, ["sample", pipeline, "--classes", "cta"], "unknown class name 'cta'", "did you mean 'cat'")
    fails(capsys, ["sample", pipeline, "--classes", "3"], "[0, 3)", "3")
    fails(capsys, ["sample", pipeline, "--steps", "5000"], "num_inference_steps", "5000")
    fails(capsys, ["sample", pipeline, "--guidance-scale=0"], "guidance_scale=0")
    fails(capsys, ["sample", pipeline, "--solver", "RK4"], "there is no solver 'RK4'", "UniPC")
    fails(capsys, ["sample", tmp_path / "nothing"], "no such run or pipeline", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    fails(capsys, ["sample", tmp_path / "empty"], "holds no pipeline (model_index.json)")
    tiny_pipeline(num_classes=None, energy_channels=3).save_pretrained(tmp_path / "unlabelled")
    fails(capsys, ["sample", tmp_path / "unlabelled", "--classes", "cat"], "trained without classes")
    wrong = [["--seed", "-1"], ["--seed", str(2**63)], ["--num-images-per-label", str(10**20)]]
    for flags in (["--num-images-per-label", "0"], ["--classes", "cat", "--unlabelled"], *wrong):
        with pytest.raises(SystemExit) as end:
            main(["sample", pipeline, *flags])
        assert end.value.code == 2
        assert flags[0] in capsys.readouterr().err


# --- classify -------------------------------------------------------------------------------------------------------


def test_classify_prints_a_table(pipeline, images, capsys):
    assert main(["classify", pipeline, str(images), str(images / "a.png"), "--top-k", "2"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["file", "energy", "classes"]
    assert [row.split()[0] for row in rows] == [str(images / name) for name in ("a.png", "more/b.JPG", "a.png")]
    for row in rows:
        _, energy, first, first_share, second, second_share = row.split()
        assert np.isfinite(float(energy))
        assert {first, second} < {"cat", "dog", "cow"}
        assert 1 >= float(first_share) >= float(second_share) >= 0


def test_classify_prints_nothing_but_json(pipeline, images, capsys):
    """The same numbers as the pipeline's own, whatever the batches."""
    assert main(["classify", pipeline, str(images), "--json", "--top-k", "3", "--batch-size", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)
    files = [images / "a.png", images / "more" / "b.JPG"]
    output = tiny_pipeline().classify([Image.open(file) for file in files], top_k=3)
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert [row["labels"] for row in rows] == output.labels
    expected = output.probabilities.sort(descending=True).values.numpy()
    np.testing.assert_allclose([row["probabilities"] for row in rows], expected, rtol=1e-4)
    np.testing.assert_allclose([row["energy"] for row in rows], output.energy.numpy(), rtol=1e-4)


def test_classify_errors(pipeline, images, tmp_path, capsys):
    fails(capsys, ["classify", pipeline, images / "c.png"], "no such file or folder", images / "c.png")
    (tmp_path / "empty").mkdir()
    fails(capsys, ["classify", pipeline, tmp_path / "empty"], "no image in", tmp_path / "empty")
    fails(capsys, ["classify", pipeline, images / "more", "--top-k", "4"], "top_k must be in [1, 3], got 4")
    tiny_pipeline(num_classes=None, energy_channels=3).save_pretrained(tmp_path / "unlabelled")
    fails(capsys, ["classify", tmp_path / "unlabelled", images / "more"], "without classes")


@pytest.mark.parametrize("batch_size", ["1", "64"])
def test_an_image_that_cannot_be_read_is_a_row_with_its_error_and_not_the_end(pipeline, images, batch_size, capsys):
    """Whatever its damage; the others' numbers are as without it, and the exit status is 1."""
    assert main(["classify", pipeline, str(images), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    (images / "b.png").write_bytes((images / "a.png").read_bytes()[:60])
    arguments = ["classify", pipeline, str(images), str(images / "notes.txt"), "--batch-size", batch_size]
    assert main([*arguments, "--json"]) == 1
    first, bad, second, text = json.loads(capsys.readouterr().out)
    for row, expected in zip((first, second), whole, strict=True):
        assert row["labels"] == expected["labels"]
        np.testing.assert_allclose(row["energy"], expected["energy"], rtol=1e-5)
    for row, file in ((bad, images / "b.png"), (text, images / "notes.txt")):
        assert row.keys() == {"file", "error"}
        assert row["file"] == str(file)
        assert f"corrupt image: {file}: " in row["error"]
    assert main(arguments) == 1
    assert f"  corrupt image: {images / 'b.png'}: " in capsys.readouterr().out


def test_classify_skips_what_is_no_regular_file_and_says_so(pipeline, images, capsys):
    """Reading a FIFO would wait for ever."""
    os.mkfifo(images / "pipe.png")
    assert main(["classify", pipeline, str(images), "--json"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 2
    assert f"skipped, it is not a regular file: {images / 'pipe.png'}" in captured.err


# --- info -----------------------------------------------------------------------------------------------------------


def test_info(pipeline, tmp_path, capsys):
    assert main(["info", pipeline]) == 0
    out = capsys.readouterr().out
    for part in ("EGCUNet", "map, Gaussian part", "AutoencoderKL", "8 x 8 px", "2 x 4 x 4", "3: cat, dog, cow", "2 by"):
        assert part in out
    tiny_pipeline(vae=False, num_classes=None, head="inner").save_pretrained(tmp_path / "pixels")
    assert main(["info", str(tmp_path / "pixels")]) == 0
    out = capsys.readouterr().out
    for part in ("inner", "none, pixel space", "classes       none"):
        assert part in out


def test_info_says_where_a_run_stands_what_was_measured_and_under_which_licence(pipeline, tmp_path, capsys):
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000003"
    shutil.copytree(pipeline, run / "pipeline")
    shutil.copytree(pipeline, checkpoint / "pipeline")
    (checkpoint / "checkpoint.json").write_text('{"global_step": 3, "score": null}')
    rows = [{"step": step, "validation_denoising_loss": 1 / step, "validation_denoising_loss_q1": 9} for step in (2, 4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 5, "loss": 1.0}]))
    metric = {"value": 0.625, "interval": None, "percent": True}
    (run / "evaluation").mkdir()
    report = {"subject": {}, "suites": {"classification": {"metrics": {"top-1 accuracy": metric}}}}
    (run / "evaluation" / "report.json").write_text(json.dumps(report))
    (run / "config.yaml").write_text("sampling:\n  num_inference_steps: 7\n")

    def info(name) -> str:
        assert main(["info", str(name)]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""  # no bar of loaded components either
        return captured.out

    of_run = info(run)
    assert f"from          run {run}, its last pipeline, step 5\n" in of_run
    assert "measured      validation_denoising_loss 0.25 (metrics.jsonl, step 4)\n" in of_run
    assert "measured      top-1 accuracy 62.50 % (classification, evaluation/report.json)\n" in of_run
    assert "licence       not stated\n" in of_run
    (run / "evaluation" / "report.json").write_text("[]")
    assert "report.json is no report" in info(run)
    of_checkpoint = info(checkpoint)
    assert f"from          run {run}, checkpoint of step 3\n" in of_checkpoint
    assert "validation_denoising_loss 0.5 (metrics.jsonl, step 2)" in of_checkpoint
    assert "report.json" not in of_checkpoint
    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    assert capsys.readouterr().err == ""
    card = tmp_path / "exported" / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nlicense: cc-by-4.0\n", 1))
    of_folder = info(tmp_path / "exported")
    assert f"from          folder {tmp_path / 'exported'}\n" in of_folder
    assert "measured      validation_denoising_loss 0.25 (model card)\n" in of_folder
    assert "licence       cc-by-4.0\n" in of_folder


def test_info_asks_the_hub_for_the_card(pipeline, tmp_path, monkeypatch, capsys):
    serve(pipeline, tmp_path / "downloaded", monkeypatch.setattr)
    card = ModelCard("---\nlicense: mit\n---\n\n## Measured\n\n| validation_accuracy | 0.875 |\n\n## The run\n")
    monkeypatch.setattr(ModelCard, "load", lambda name: card)
    assert main(["info", "someone/digits"]) == 0
    out = capsys.readouterr().out
    for line in ("from          Hub id someone/digits", "measured      validation_accuracy 0.875", "licence       mit"):
        assert line in out
    others = "### a, b\n\n| x | y |\n|---|---|\n\n### c, d\n\n| z |\n|---|\n| 1 |\n"  # tables of someone else's
    monkeypatch.setattr(ModelCard, "load", lambda name: ModelCard(f"---\nlicense: mit\n---\n\n## Measured\n\n{others}"))
    assert main(["info", "someone/digits"]) == 0
    assert "measured      nothing that is written down there" in capsys.readouterr().out

    def load(name):
        raise EntryNotFoundError("no README.md")

    monkeypatch.setattr(ModelCard, "load", load)
    assert main(["info", "someone/digits"]) == 0
    assert "licence       not stated" in capsys.readouterr().out


# --- encode and train -----------------------------------------------------------------------------------------------


def test_encode_writes_the_cache_that_the_config_names(config, tmp_path, capsys):
    cache = f"data.latent_cache={tmp_path / 'cache'}"
    assert main(["encode", str(config), cache, "data.num_views=1", "--batch-size", "3", "--device", "cpu"]) == 0
    assert f"latent cache written: {tmp_path / 'cache'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["complete"]


def test_encode_for_a_run_to_go_on_with_reads_what_is_left_out_from_its_config(config, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text("{}")
    before = {"objective": {}, "training": {}, "sampling": {}} | yaml.safe_load(config.read_text())
    before["data"]["num_views"] = 3
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(before))
    options = [f"data.latent_cache={tmp_path / 'cache'}", "training.resume=auto"]
    assert main(["encode", str(config), *options, "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["data.num_views"] == 3


def test_encode_errors(config, tmp_path, capsys):
    fails(capsys, ["encode", config], "data.latent_cache must name the folder")
    fails(capsys, ["encode", tmp_path / "none.yaml"], "config file not found", "none.yaml")
    fails(capsys, ["encode", config, "data.num_view=2"], "unknown key data.num_view; did you mean num_views?")
    fails(capsys, ["encode", config, f"data.latent_cache={config}"], str(config))
    (tmp_path / "data" / "cat" / "1.png").write_bytes(b"no image")
    fails(capsys, ["encode", config, f"data.latent_cache={tmp_path / 'cache'}"], "corrupt image", "cat/1.png")


@pytest.mark.parametrize("call", [train_main, lambda arguments: main(["train", *arguments])])
def test_dry_run_prints_the_resolved_config_and_the_size_and_writes_nothing(call, config, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert call([str(config), "training.max_steps=7", "--dry-run"]) == 0
    out = capsys.readouterr().out
    values = yaml.safe_load(out)
    assert values["training"]["max_steps"] == 7
    model = build_network(parse_config(values).model)
    assert f"# EGCUNet: {sum(p.numel() for p in model.parameters()):,} parameters" in out
    assert "GiB activations at train_batch_size 64" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_train_takes_flags_before_overrides(config, capsys):
    assert train_main([str(config), "--dry-run", "training.max_steps=7"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["training"]["max_steps"] == 7


def test_train_errors(config, capsys):
    fails(capsys, ["train", config, "model.sample_size=8"], "model.sample_size must be 4", "got 8")
    fails(capsys, ["train", config, "model.in_channels=4"], "model.in_channels must be 2", "got 4")
    fails(capsys, ["train", config, "model.norm_num_groups=3"], "model: norm_num_groups=3 must divide")
