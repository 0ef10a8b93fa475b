"""What the demo opens where nothing is named, and training images where they are at hand."""

import json
import sys
from importlib.resources import as_file, files
from pathlib import Path

from latent_egc.config import Config, ConfigError, load_config, load_data_config
from latent_egc.data.encoding import encode
from latent_egc.demo.references import References, read_references
from latent_egc.pipelines import EGCPipeline
from latent_egc.training.build import resolve_model
from latent_egc.training.loop import train

INDEX = "model_index.json"  # what tells a pipeline's folder
QUICKSTART = Path("runs/quickstart")  # where `make quickstart` writes it, too
RELEASED = Path("release")  # of a checkout: networks that come with it


def names_at_hand() -> list[str]:
    """Networks below the current folder: the quickstart's where it is trained, then those that came with a checkout.

    One whose autoencoder is only named, and may have to be downloaded, is left to those who ask for it; a line on
    standard error says so.
    """
    found = [str(QUICKSTART)] if (QUICKSTART / "pipeline" / INDEX).is_file() else []
    for index in sorted(RELEASED.glob(f"*/{INDEX}")):
        autoencoder = json.loads(index.read_text()).get("autoencoder")
        if autoencoder is None:
            found.append(str(index.parent))
        else:
            ask = f"latent-egc demo {index.parent}"
            print(f"{ask} opens another one, with the autoencoder {autoencoder}", file=sys.stderr)
    return found


def quickstart_config(folder: Path = QUICKSTART) -> Config:
    """The quickstart's run, which goes on where it was stopped."""
    with as_file(files("latent_egc") / "assets" / "digits.yaml") as path:
        return load_config(path, [f"output_dir={folder}", "training.resume=auto"])


def trained_quickstart(config: Config) -> str:
    """The folder of the quickstart's run, trained first where it has no pipeline yet.

    Raises:
        ConfigError: the folder holds something else.
        CheckpointError: it could not be written.
    """
    folder = Path(config.output_dir)
    if not (folder / "pipeline" / INDEX).is_file():
        print(f"no network in {folder} yet: training one on digits, about 4 minutes on two CPU cores", file=sys.stderr)
        encode(config.data, config.autoencoder, resolve_model(config.model)["num_classes"])
        train(config)
    return str(folder)


def references_at_hand(pipeline: EGCPipeline, name: str, data: Path | None, count: int) -> References | None:
    """Training images, of those that a YAML file's data section or a run's own config.yaml says; else None.

    Where a run's own cannot be read, a line on standard error says why, and the demo does without.

    Raises:
        ConfigError: `data` cannot be used.
    """
    own_config = Path(name) / "config.yaml"
    if count == 0 or (data is None and not own_config.is_file()):
        return None
    try:
        return read_references(pipeline, load_data_config(data or own_config), count)
    except ConfigError as error:
        if data is not None:
            raise
        print(f"without training images, {own_config} names none that are here: {error}", file=sys.stderr)
        return None
