"""The best linear probe as a classifier that others load: its layer, beside the network whose features it reads."""

from pathlib import Path

import numpy as np
from huggingface_hub import ModelCard, ModelCardData

from latent_egc.atomic import check_unoccupied, replace_folder
from latent_egc.config import ConfigError
from latent_egc.exchange.export import LinearHead, add_transformers_files
from latent_egc.measuring.probe_context import ProbeContext
from latent_egc.measuring.probe_heads import linear_layer
from latent_egc.models import EnergyModel
from latent_egc.pipelines import EGCPipeline

CARD = """\
# {name}

A linear layer on the frozen features of an energy network, at {place}: {accuracy} of {num_images} validation images
right, after a fit on {num_train_images}. Made with latent-egc.

```python
from transformers import pipeline

classify = pipeline("image-classification", model="{name}", trust_remote_code=True)
extract = pipeline("image-feature-extraction", model="{name}", trust_remote_code=True)
print(classify(image, top_k=1))
features = extract(image, pool=True)
```

The folder is also a pipeline of diffusers, of the network itself.
"""


def check_can_save(context: ProbeContext, folder: Path) -> None:
    """Raises ConfigError where `save_probe` could not save: another network, a class without images, a full folder."""
    check_unoccupied(folder)
    if not isinstance(context.denoiser.network, EnergyModel):
        raise ConfigError(f"--save needs an energy network, got {type(context.denoiser.network).__name__}")
    present = np.unique(context.train_labels)
    missing = [name for i, name in enumerate(context.class_names) if i not in present]
    if missing:
        raise ConfigError(f"--save needs a training image of every class, there is none of {', '.join(missing)}")


def save_probe(context: ProbeContext, folder: Path) -> None:
    """Writes the linear probe at the chosen place, fitted on all training rows, as a model of transformers.

    Args:
        context: whose features have been computed, and that `check_can_save` did not refuse.
        folder: what to write.

    Raises:
        CheckpointError: writing failed; nothing half-written stays.
    """
    place = context.place
    score, features = context.score(place), context.features("train", place)
    layer = linear_layer(features, context.train_labels, score.c, context.settings.linear.max_iter)
    head = LinearHead(*layer, context.class_names, place.block, place.timestep, place.pooling)
    text = CARD.format(
        name=folder.name,
        place=place,
        accuracy=f"{100 * score.accuracy:.1f} %",
        num_images=len(context.labels),
        num_train_images=len(context.train_labels),
    )
    data = ModelCardData(library_name="transformers", pipeline_tag="image-classification", tags=["latent-egc"])

    def write(unfinished: Path) -> None:
        pipeline = EGCPipeline.from_pretrained(context.denoiser.source)
        pipeline.save_pretrained(unfinished)
        add_transformers_files(unfinished, pipeline, head)
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(unfinished / "README.md")

    replace_folder(folder, write)
