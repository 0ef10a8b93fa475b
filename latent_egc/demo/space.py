"""A Space of the Hub that shows the demo of a pipeline: app.py, requirements.txt, README.md, perhaps the weights."""

from pathlib import Path

import yaml

from latent_egc import EGCPipeline, __version__
from latent_egc.atomic import check_unoccupied, replace_folder
from latent_egc.training.checkpoints import resolve_pipeline

GRADIO_VERSION = "6.31.0"  # what the tests ran with; the Hub wants one
COPIED = "pipeline"

APP = """\
from latent_egc.commands import main

raise SystemExit(main(["demo", {pipeline!r}, "--host", "0.0.0.0", "--port", "7860"]))
"""
README = """\
---
{front_matter}---

# {title}

One energy network that classifies and paints images. This Space is `latent-egc demo` and nothing else.
"""


def write_space(name: str, folder: Path) -> bool:
    """Writes the folder of a Space.

    Args:
        name: of the pipeline: a run's folder or a pipeline's, which is copied in, or a Hub id, which the Space names.
        folder: must not exist, or be empty.

    Returns:
        Whether the pipeline was copied in.

    Raises:
        FileNotFoundError: no pipeline in a folder of this name.
        ConfigError: `folder` holds something.
        CheckpointError: writing failed; nothing half-written stays.
    """
    source = resolve_pipeline(name)
    check_unoccupied(folder)
    copied = isinstance(source, Path)
    title = f"latent-egc: {Path(name).resolve().name if copied else name}"

    def write(unfinished: Path) -> None:
        if copied:
            EGCPipeline.from_pretrained(source).save_pretrained(unfinished / COPIED)
        (unfinished / "app.py").write_text(APP.format(pipeline=f"./{COPIED}" if copied else name))
        (unfinished / "requirements.txt").write_text(f"latent-egc[demo]=={__version__}\n")
        facts = {"title": title, "sdk": "gradio", "sdk_version": GRADIO_VERSION, "app_file": "app.py"}
        facts |= {} if copied else {"models": [name]}
        front_matter = yaml.safe_dump(facts, sort_keys=False)
        (unfinished / "README.md").write_text(README.format(title=title, front_matter=front_matter))

    replace_folder(folder, write)
    return copied
