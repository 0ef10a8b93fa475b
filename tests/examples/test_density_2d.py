"""The example in the plane runs, with few steps."""

import runpy

from PIL import Image
from tiny import ROOT


def test_a_picture_is_drawn(tmp_path):
    main = runpy.run_path(str(ROOT / "examples" / "density_2d.py"))["main"]
    main(max_steps=2, picture=tmp_path / "density_2d.png")
    width, height = Image.open(tmp_path / "density_2d.png").size
    assert width > 3 * height
