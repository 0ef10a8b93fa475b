"""The verb edit, run in this process on a tiny pipeline."""

import numpy as np
import pytest
from command_line import fails
from PIL import Image
from tiny import tiny_pipeline

from latent_egc.commands import main


@pytest.fixture
def things(tmp_path):
    """pipeline (classes cat, dog and cow; 8x8 images), a.png, b.png and mask.png."""
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


CALLS = {
    "image-to-image": (["a.png", "b.png", "--class=dog", "--strength=0.5"], 2, " -> "),
    "inpaint": (["a.png", "mask.png", "--num-images=2", "--class=2"], 2, "largest change outside the mask: 0 of 255"),
    "interpolate": (["a.png", "b.png", "--num-images=3"], 3, "classified along the way: "),
    "reconstruct": (["a.png", "b.png"], 2, "of the autoencoder alone"),
    "class": (["a.png", "--class=cow"], 1, "-> "),
    "counterfactual": (["a.png", "b.png", "--distance-scale=1"], 2, "(the autoencoder alone "),
}


@pytest.mark.parametrize("action", CALLS)
def test_an_action_writes_its_images_and_a_picture_and_prints_numbers(action, things, capsys):
    arguments, count, printed = CALLS[action]
    arguments = [str(things / entry) if entry.endswith(".png") else entry for entry in arguments]
    output = things / "edited"
    assert main(["edit", action, str(things / "pipeline"), *arguments, "--steps=2", "--output", str(output)]) == 0
    numbers = [f"{number:03d}.png" for number in range(count)]
    assert sorted(path.name for path in output.iterdir()) == [*numbers, "grid.png"]
    assert Image.open(output / "000.png").size == (8, 8)
    width, height = Image.open(output / "grid.png").size
    assert min(width, height) > 60
    out = capsys.readouterr().out
    assert printed in out
    assert f"{count} images and grid.png written to {output}" in out
    if action == "inpaint":
        before, after = (np.asarray(Image.open(path)) for path in (things / "a.png", output / "000.png"))
        assert np.array_equal(before[4:], after[4:])


def test_edit_without_classes(things, capsys):
    tiny_pipeline(num_classes=None, energy_channels=3).save_pretrained(things / "unlabelled")
    given = [str(things / "unlabelled"), str(things / "a.png")]
    output = ["--steps=2", "--output", str(things / "edited")]
    assert main(["edit", "image-to-image", *given, *output]) == 0
    assert main(["edit", "interpolate", *given, given[1], *output]) == 0
    capsys.readouterr()
    fails(capsys, ["edit", "counterfactual", *given, *output], "trained without classes")


def test_edit_errors(things, capsys):
    given = [things / "pipeline", things / "a.png"]
    output = ["--steps=2", "--output", things / "edited"]
    fails(capsys, ["edit", "image-to-image", *given, "--strength=2", *output], "strength must be in [0, 1], got 2")
    fails(capsys, ["edit", "class", *given, "--class=cta", *output], "did you mean 'cat'")
    fails(capsys, ["edit", "reconstruct", given[0], things / "c.png", *output], things / "c.png")
    Image.new("L", (9, 8)).save(things / "mask.png")
    fails(capsys, ["edit", "inpaint", *given, things / "mask.png", *output], "mask_image must be as large as its image")
    assert not (things / "edited").exists()
    with pytest.raises(SystemExit) as end:
        main(["edit", "class", *map(str, given)])
    assert end.value.code == 2
    assert "--class" in capsys.readouterr().err
