"""Two thousand damaged images through `classify`, `encode` and `train`: each is read or named, and nothing ends.

Bytes flipped, overwritten, left out and cut off, in every format that Pillow writes here, behind a whole header or not.
"""

import io
import json
import random
import re

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image, features
from tiny import tiny_kl, tiny_pipeline

from latent_egc.commands import main

pytestmark = pytest.mark.faults

NUM_IMAGES = 200  # a seed, in two classes
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "DDS", "PCX", "SGI"]
FORMATS += ["AVIF"] if features.check("avif") else []
DAMAGES = ("flip", "header", "cut", "leave out", "zero", "exif")


def whole_file(kind: str, rng: random.Random) -> bytes:
    """An image file with an EXIF orientation where the format has one, in one of several modes."""
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    mode = rng.choice(["RGB", "RGBA", "L", "P"]) if kind in ("PNG", "TIFF", "GIF") else "RGB"
    exif = Image.Exif()
    exif[0x0112] = rng.randrange(1, 9)  # the orientation
    options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF") else {}
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A file's content with one kind of damage."""
    content, damage = bytearray(content), rng.choice(DAMAGES)
    header = min(64, len(content))
    first = rng.randrange(len(content))
    length = rng.randrange(1, 1 + min(32, len(content) - first))
    if damage == "flip":
        for _ in range(rng.randrange(1, 9)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif damage == "header":
        for _ in range(rng.randrange(1, 5)):
            content[rng.randrange(header)] = rng.randrange(256)
    elif damage == "cut":
        del content[first:]
    elif damage == "leave out":
        del content[first : first + length]
    elif damage == "zero":
        content[first : first + length] = bytes(length)
    else:  # where the EXIF data lie, or anywhere
        start = max(0, content.find(b"II*\0"))
        for _ in range(3):
            content[min(start + rng.randrange(32), len(content) - 1)] = rng.randrange(256)
    return bytes(content)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(10))
def test_damaged_images_are_read_or_named(seed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rng = random.Random(seed)
    for number in range(NUM_IMAGES):
        kind = rng.choice(FORMATS)
        path = tmp_path / "images" / f"class {number % 2}" / f"{number:03d}.png"  # Pillow goes by the content
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damaged(whole_file(kind, rng), rng))
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    tiny_kl().save_pretrained(tmp_path / "vae")

    main(["classify", str(tmp_path / "pipeline"), str(tmp_path / "images"), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == NUM_IMAGES
    for row in rows:
        if "error" in row:
            assert re.match(r"corrupt image: .*\d\d\d\.png", row["error"]), row
        else:
            assert np.isfinite([row["energy"], *row["probabilities"]]).all(), row
    readable = sum("error" not in row for row in rows)
    assert 20 < readable < NUM_IMAGES - 20

    model = {"sample_size": 4, "in_channels": 2, "num_classes": 2, "block_out_channels": [8, 16]}
    section = {"dataset": "imagefolder", "data_dir": str(tmp_path / "images"), "image_size": 8, "skip_corrupt": True}
    values = {
        "model": model | {"layers_per_block": 1, "attention_levels": [1], "norm_num_groups": 4},
        "autoencoder": {"path": str(tmp_path / "vae")},
        "data": section | {"num_views": 1},
        "training": {"max_steps": 10, "train_batch_size": 20, "sample_every": 1000, "trackers": []},  # an epoch
        "sampling": {"num_inference_steps": 2, "num_images_per_label": 1},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    config, cache = str(tmp_path / "config.yaml"), tmp_path / "cache"
    assert main(["encode", config, f"data.latent_cache={cache}"]) == 0
    shards = [datasets.load_from_disk(str(shard)) for shard in cache.glob("*/[0-9]*") if any(shard.iterdir())]
    assert sum(map(len, shards)) == readable
    assert main(["train", config]) == 0
