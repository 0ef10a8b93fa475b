"""The verb certify, run in this process on a tiny pipeline."""

import json

import numpy as np
import pytest
from command_line import fails
from PIL import Image
from tiny import tiny_pipeline

from latent_egc.commands import main
from latent_egc.data.stream import noise_generator

FAST = ["--n0=4", "--n=20", "--alpha=0.4", "--sigma=0.5"]


@pytest.fixture
def given(tmp_path) -> tuple[str, str]:
    """A saved pipeline, and a folder with two images and a damaged one between them."""
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png", "c.png"):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    damaged = tmp_path / "images" / "b.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    return str(tmp_path / "pipeline"), str(tmp_path / "images")


@pytest.mark.parametrize("noise", ["pixels", "latents"])
def test_json_is_the_pipelines_own_and_the_picture_is_drawn(given, tmp_path, noise, capsys):
    _, images = given
    picture = tmp_path / "new" / "certificates.png"
    arguments = ["certify", *given, *FAST, f"--noise={noise}", "--json", "--seed=3", "--output", str(picture)]
    assert main(arguments) == 1  # for the damaged one
    rows = json.loads(capsys.readouterr().out)
    assert [row["file"] for row in rows] == [f"{images}/{name}.png" for name in "abc"]
    assert "error" in rows[1]
    output = tiny_pipeline().certify(
        [Image.open(rows[i]["file"]) for i in (0, 2)],
        sigma=0.5,
        n0=4,
        n=20,
        alpha=0.4,
        noise=noise,
        generator=[noise_generator(3, i) for i in (0, 2)],
    )
    for row, label, radius, votes in zip(rows[::2], output.labels, output.radius, output.votes, strict=True):
        assert (row["label"], row["space"]) == (label, noise)
        assert row["radius"] == pytest.approx(float(radius))
        expected = {name: int(count) for name, count in zip(("cat", "dog", "cow"), votes, strict=True) if count}
        assert dict(row["votes"]) == expected
        assert [count for _, count in row["votes"]] == sorted(expected.values(), reverse=True)
    width, height = Image.open(picture).size
    assert min(width, height) > 100
    assert not list(picture.parent.glob("*.tmp"))


def test_table(given, capsys):
    assert main(["certify", *given, *FAST]) == 1
    header, first, damaged, _ = capsys.readouterr().out.splitlines()
    assert header.split() == ["file", "radius", "class", "votes"]
    file, radius, label, *votes = first.split()
    assert (file, label in {"cat", "dog", "cow", "(abstains)"}) == (f"{given[1]}/a.png", True)
    assert float(radius) >= 0
    assert sum(map(int, votes[1::2])) == 20
    assert damaged.startswith(f"{given[1]}/b.png")


def test_errors(given, tmp_path, capsys):
    command = ["certify", *given]
    fails(capsys, [*command, "--sigma=0"], "sigma must be positive")
    fails(capsys, [*command, "--sigma=100", "--noise=latents"], "sigma must be in [0.0292, 25.15]", "got 100")
    fails(capsys, [*command, "--sigma=1", "--alpha=1"], "alpha must be in (0, 1)")
    fails(capsys, ["certify", given[0], tmp_path / "nothing", "--sigma=1"], "no such file or folder")
    with pytest.raises(SystemExit):
        main(command)
    assert "--sigma" in capsys.readouterr().err
