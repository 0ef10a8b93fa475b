"""Grey images in folders and parquet files."""

import io

import datasets
from PIL import Image

from latent_egc.config import DataConfig


def png(value: int, width: int = 10, height: int = 8) -> bytes:
    """A grey PNG file's content."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (value,) * 3).save(file, "PNG")
    return file.getvalue()


def write_folder(folder, per_class: int = 5, classes: tuple[str, ...] = ("cat", "dog")) -> DataConfig:
    """One folder a class, of grey images that all differ."""
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            (folder / name / f"{i}.png").write_bytes(png(20 * (c * per_class + i)))
    return DataConfig(dataset="imagefolder", data_dir=str(folder), image_size=8)


def write_parquet(path, labels: list, feature=None, column: str = "label", image_column: str = "image") -> DataConfig:
    """A parquet file with one image a label, its content inside the file."""
    images = [{"bytes": png(i), "path": None} for i in range(len(labels))]
    features = None
    if feature is not None:
        features = datasets.Features({image_column: datasets.Image(), column: feature})
    table = datasets.Dataset.from_dict({image_column: images, column: labels}, features=features)
    table.to_parquet(path)
    return DataConfig(dataset="parquet", data_files=str(path), image_size=8)
