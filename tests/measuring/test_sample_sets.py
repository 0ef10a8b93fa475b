"""Sets of samples: by any number of processes, in any batches, stopped anywhere, the same images, each drawn once."""

import json
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import fails
from PIL import Image
from tiny import generator, tiny_pipeline

from latent_egc.commands import main
from latent_egc.config import ConfigError
from latent_egc.measuring import sample_sets
from latent_egc.measuring.sample_sets import draw_sample_set

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
DRAW = {"seed": 5, "num_inference_steps": 2}
COMMAND = ["--seed=5", "--steps=2"]  # the same


def images(folder) -> dict[str, np.ndarray]:
    assert not list(folder.glob("*.tmp"))
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


def assert_same(found, expected):
    """The same images up to one level of 255."""
    assert found.keys() == expected.keys()
    for name, image in expected.items():
        assert np.abs(found[name] - image).max() <= 1, name


@pytest.fixture
def drawn(monkeypatch):
    """The noise's number of every image that was asked of a pipeline, in order."""
    numbers, noise_generator = [], sample_sets.noise_generator
    monkeypatch.setattr(
        sample_sets, "noise_generator", lambda seed, number: numbers.append(number) or noise_generator(seed, number)
    )
    return numbers


def test_images_by_hand_with_balanced_classes(tmp_path):
    pipeline = tiny_pipeline(names=("cat", "sea lion/seal", "cow"))
    assert draw_sample_set(pipeline, tmp_path / "set", 8, [1, 2, 0], **DRAW) == tmp_path / "set"
    found = images(tmp_path / "set")
    classes = ("sea_lion_seal", "cow", "cat")
    assert list(found) == [f"{i:06d}_{classes[i % 3]}.png" for i in range(8)]
    for i, image in enumerate(found.values()):
        seeded = generator(5 * 2**20 + i)
        expected = pipeline([1, 2, 0][i % 3], num_inference_steps=2, generator=seeded, output_type="np").images[0]
        assert np.abs(image - 255 * expected).max() <= 1
    assert len({image.tobytes() for image in found.values()}) == 8


def test_two_processes_draw_what_one_draws_in_other_batches(tmp_path, drawn):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    command = [sys.executable, *TORCHRUN, "-m", "latent_egc", "sample", tmp_path / "pipeline", *COMMAND]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command += ["--num-images=7", "--batch-size=2", "--out", tmp_path / "two"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("7 images written") == 1
    draw_sample_set(tiny_pipeline(), tmp_path / "one", 7, [0, 1, 2], batch_size=7, **DRAW)
    assert_same(images(tmp_path / "two"), images(tmp_path / "one"))
    drawn.clear()
    # The record of the two processes' set fits, and they left nothing to draw.
    draw_sample_set(tiny_pipeline(), tmp_path / "two", 7, [0, 1, 2], guidance_interval=(0, 1), **DRAW)
    assert drawn == []


def test_shares_are_disjoint_and_together_all(tmp_path, drawn, monkeypatch):
    draw_sample_set(tiny_pipeline(), tmp_path / "one", 8, [0, 1, 2], **DRAW)
    drawn.clear()
    for index in (0, 2, 1):
        process = {"process_index": index, "is_main_process": index == 0, "wait_for_everyone": lambda: None}
        monkeypatch.setattr(sample_sets, "start_processes", partial(SimpleNamespace, num_processes=3, **process))
        monkeypatch.setattr(sample_sets, "_check_complete", lambda *arguments: None)
        draw_sample_set(tiny_pipeline(), tmp_path / "three", 8, [0, 1, 2], batch_size=2, **DRAW)
    assert drawn == [0, 3, 6, 2, 5, 1, 4, 7]
    assert_same(images(tmp_path / "three"), images(tmp_path / "one"))


def test_what_other_processes_wrote_elsewhere_is_missed(tmp_path, monkeypatch):
    process = {"process_index": 0, "is_main_process": True, "wait_for_everyone": lambda: None}
    monkeypatch.setattr(sample_sets, "start_processes", lambda: SimpleNamespace(num_processes=2, **process))
    with pytest.raises(ConfigError, match=r"lacks 2 images that other processes wrote, the first is 000001_dog\.png"):
        draw_sample_set(tiny_pipeline(), tmp_path / "set", 4, [0, 1, 2], **DRAW)


@pytest.mark.parametrize("as_npz", [False, True])
def test_a_killed_job_draws_what_is_not_there_whole(tmp_path, drawn, monkeypatch, as_npz):
    options = {"batch_size": 2, "as_npz": as_npz, **DRAW}
    expected = draw_sample_set(tiny_pipeline(), tmp_path / "whole", 7, [0, 1, 2], **options)
    calls, call = [], type(tiny_pipeline()).__call__

    def killed(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return call(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(type(tiny_pipeline()), "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            draw_sample_set(tiny_pipeline(), tmp_path / "set", 7, [0, 1, 2], **options)
    assert list(images(tmp_path / "set")) == ["000000_cat.png", "000001_dog.png", "000002_cow.png", "000003_cat.png"]
    damaged = tmp_path / "set" / "000001_dog.png"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    (tmp_path / "set" / "000004_dog.png.tmp").write_bytes(b"half")
    drawn.clear()
    found = draw_sample_set(tiny_pipeline(), tmp_path / "set", 7, [0, 1, 2], **options)
    assert drawn == [1, 4, 5, 6]
    if as_npz:
        assert sorted(path.name for path in found.parent.iterdir()) == ["samples.json", "samples.npz"]
        with np.load(found) as first, np.load(expected) as second:
            assert np.abs(first["arr_0"].astype(int) - second["arr_0"]).max() <= 1
    else:
        assert_same(images(found), images(expected))


def test_npz_is_in_the_layout_of_adms_evaluator(tmp_path, drawn):
    pipeline = tiny_pipeline()
    draw_sample_set(pipeline, tmp_path / "files", 5, [2, 0], **DRAW)
    archive = draw_sample_set(pipeline, tmp_path / "set", 5, [2, 0], as_npz=True, **DRAW)
    with np.load(archive) as found:
        assert list(found) == ["arr_0", "arr_1"]
        assert (found["arr_0"].shape, found["arr_0"].dtype) == ((5, 8, 8, 3), np.uint8)
        assert (found["arr_1"].tolist(), found["arr_1"].dtype) == ([2, 0, 2, 0, 2], np.int64)
        assert np.array_equal(found["arr_0"], np.stack(list(images(tmp_path / "files").values())))
    (tmp_path / "set" / "000000_cow.png").write_bytes(b"left by a kill behind the packing")
    drawn.clear()
    assert draw_sample_set(pipeline, tmp_path / "set", 5, [2, 0], as_npz=True, **DRAW) == archive
    assert drawn == []
    assert len(list((tmp_path / "set").iterdir())) == 2
    archive = draw_sample_set(pipeline, tmp_path / "unlabelled", 3, as_npz=True, **DRAW)
    with np.load(archive) as found:
        assert list(found) == ["arr_0"]


def test_a_set_drawn_otherwise_is_refused(tmp_path):
    draw_sample_set(tiny_pipeline(), tmp_path / "set", 2, [0], **DRAW)
    before = images(tmp_path / "set")
    for changes, message in (
        ({"num_inference_steps": 3}, "num_inference_steps=2, asked for 3"),
        ({"seed": 6}, "seed=5, asked for 6"),
        ({"guidance_scale": 3.0}, r"guidance_scale=its default, asked for 3\.0"),
        ({"class_ids": [1]}, r"classes=\['cat'\], asked for \['dog'\]"),
        ({"num_images": 3}, "num_images=2, asked for 3"),
        ({"as_npz": True}, "files=png, asked for samples.npz"),
        ({"pipeline": tiny_pipeline(randomise=False)}, "network="),
    ):
        arguments = {"pipeline": tiny_pipeline(), "num_images": 2, "class_ids": [0]} | DRAW | changes
        with pytest.raises(ConfigError, match=message):
            draw_sample_set(folder=tmp_path / "set", **arguments)
    own = tiny_pipeline()
    own.register_to_config(default_num_inference_steps=2)
    draw_sample_set(own, tmp_path / "set", 2, [0], **{**DRAW, "num_inference_steps": None})  # the same number of steps
    own.register_to_config(default_num_inference_steps=3)
    with pytest.raises(ConfigError, match="num_inference_steps=2, asked for 3"):
        draw_sample_set(own, tmp_path / "set", 2, [0], **{**DRAW, "num_inference_steps": None})
    assert_same(images(tmp_path / "set"), before)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already holds something"):
        draw_sample_set(tiny_pipeline(), tmp_path / "other", 2, [0], **DRAW)


def test_what_the_pipeline_refuses_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="guidance_scale must be finite and not negative"):
        draw_sample_set(tiny_pipeline(), tmp_path / "set", 2, [0], guidance_scale=-1.0, **DRAW)
    assert not (tmp_path / "set").exists()


def test_command(tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    arguments = ["sample", str(tmp_path / "pipeline"), "--out", str(tmp_path / "set"), *COMMAND]
    assert main([*arguments, "--num-images=4", "--npz", "--guidance-interval", "0", "0.5"]) == 0
    captured = capsys.readouterr()
    assert f"4 images written: {tmp_path / 'set' / 'samples.npz'}" in captured.out
    assert "4/4" in captured.err
    record = json.loads((tmp_path / "set" / "samples.json").read_text())
    assert record["guidance_interval"] == [0, 0.5]
    assert record["classes"] == ["cat", "dog", "cow"]
    fails(capsys, [*arguments, "--npz"], "--npz", "--num-images")
    fails(capsys, [*arguments, "--num-images=4", "--npz"], "guidance_interval=[0.0, 0.5], asked for its default")
    with pytest.raises(SystemExit):
        main([*arguments, "--num-images=4", "--num-images-per-label=2"])
