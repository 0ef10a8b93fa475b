"""A network to try by hand, tiny."""

from pathlib import Path

from tiny import tiny_pipeline, write_images

from latent_egc.demo.network import Network
from latent_egc.demo.references import read_references

NAMES = ("cat", "cow", "dog")


def tiny_network(folder: Path, references: bool = True, count: int = 8, **options) -> Network:
    """On random weights, with `count` of 14 training images and 7 held-out ones from a folder that is written."""
    pipeline = tiny_pipeline(names=NAMES, **options)
    return Network(pipeline, read_references(pipeline, write_images(folder), count) if references else None)
