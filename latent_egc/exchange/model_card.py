"""The model card of an exported folder: what the network is, how it is used, what was measured of it and how.

The numbers are those of the run's report, RUN/evaluation/report.json, where `latent-egc evaluate` has written one of
these very weights, else those of its last validation, and the picture is of the same origin.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from latent_egc.data.autoencoders import fingerprint
from latent_egc.pipelines import EGCPipeline
from latent_egc.training.checkpoints import read_metrics, read_record

CARD = """\
# {name}

One energy network over {latents}: its forward pass classifies, its input gradient denoises, so the same weights
classify images and sample them. Made with latent-egc, after EGC (Guo et al., ICCV 2023, arXiv 2304.02012).

{picture}
```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
image = pipe({label}).images[0]
{classify_call}```

With latent-egc installed, `EGCPipeline.from_pretrained("{name}")` does the same and runs no code from the repository.
{weights}
For transformers it is {as_transformers}:

```python
from transformers import pipeline

extract = pipeline("image-feature-extraction", model="{name}", trust_remote_code=True)
features = extract(image, pool=True)
{transformers_call}```
{training_data}
## Measured

{measured}

## The run

```yaml
{config}```
"""

TRANSFORMERS_CALL = """\
classify = pipeline("image-classification", model="{name}", trust_remote_code=True)
print(classify(image, top_k=1))
"""

NAMED_AUTOENCODER = """
The autoencoder is `{autoencoder}`. Its weights are not in this folder and not under its licence, but under that of
their authors; they are loaded from there, unless `vae=` gives them.
"""
HALF_FLOATS = """
The weights are stored as float16 and loaded as float32; `.to(torch.float16)` makes them half floats again. The numbers
below were measured before they were rounded.
"""
TRAINING_DATA = """
## Trained on

{training_data}
"""
METRICS_HEAD = "| | value | 95 % interval |\n|---|---|---|"


def write_card(
    folder: Path,
    pipeline: EGCPipeline,
    run: Path,
    source: Path,
    name: str,
    license: str | None = None,
    training_data: str | None = None,
) -> None:
    """Writes README.md into an exported folder, and samples.png where the run has samples.

    Args:
        folder: where `pipeline` was saved.
        pipeline: what was saved, perhaps with an autoencoder that is only named, or of half floats.
        run: the run that it is of.
        source: the pipeline's folder in it.
        name: of the model, as it is loaded.
        license, training_data: see `latent_egc.exchange.export.export`.
    """
    config = (run / "config.yaml").read_text() if (run / "config.yaml").is_file() else ""
    report = read_report_of(source, run / "evaluation" / "report.json")
    picture = run / "evaluation" / "figures" / "generation_samples.png"
    if report is None or not picture.is_file():
        last_step, pictures = _last_step(source), sorted((run / "samples").glob("step-*.png"))
        pictures = [path for path in pictures if last_step is None or int(path.stem.partition("-")[2]) <= last_step]
        picture = pictures[-1] if pictures else None
    if picture is not None:
        shutil.copy(picture, folder / "samples.png")

    named = pipeline.config.autoencoder
    model_config, names = pipeline.energy_model.config, list(pipeline.id2label.values())
    size = f"{model_config.in_channels}x{model_config.sample_size}x{model_config.sample_size}"
    space = "pixels" if pipeline.vae is None else "latents of a pretrained autoencoder"
    weights = "" if named is None else NAMED_AUTOENCODER.format(autoencoder=named)
    weights += HALF_FLOATS if pipeline.dtype == torch.float16 else ""
    card = CARD.format(
        name=name,
        latents=f"{size} {space}, {pipeline.image_size} px images",
        picture="" if picture is None else "![Samples, the first ones drawn](samples.png)\n",
        label=repr(names[0]) if names else "",
        classify_call="print(pipe.classify(image, top_k=1).labels)\n" if names else "",
        weights=weights,
        as_transformers="an image classifier and a backbone" if names else "a backbone",
        transformers_call=TRANSFORMERS_CALL.format(name=name) if names else "",
        training_data="" if training_data is None else TRAINING_DATA.format(training_data=training_data),
        measured=_said_by_run(run, source) if report is None else _said_by_report(report),
        config=config,
    )
    data = ModelCardData(
        library_name="diffusers",
        license=license,
        pipeline_tag="image-classification" if names else "unconditional-image-generation",
        tags=["latent-egc", "energy-based-model", "image-generation", "image-classification"],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card}").save(folder / "README.md")


def _last_step(source: Path) -> int | None:
    """Of the checkpoint that a pipeline's folder is in; None for a finished run's."""
    return read_record(source.parent).global_step if (source.parent / "checkpoint.json").is_file() else None


def read_report_of(source: Path, report: Path) -> dict[str, Any] | None:
    """A report's suites, where it is of the weights in a pipeline's folder.

    Returns:
        Name of a suite -> what report.json has of it; None without a report, and, with a warning, where it is damaged
        or of other weights.
    """
    if not report.is_file():
        return None
    try:
        content = json.loads(report.read_text())
        suites, of = dict(content["suites"]), content["subject"]["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{report} is no report, the card does without: {error!r}", stacklevel=2)
        return None
    pipeline = EGCPipeline.from_pretrained(source)
    is_of = f"{fingerprint(pipeline.energy_model)} with {fingerprint(pipeline.vae)}"
    if of != is_of:
        warnings.warn(f"{report} is of other weights ({of}) than {source} ({is_of}): not in the card", stacklevel=2)
        return None
    return suites


def _said_by_report(suites: dict[str, Any]) -> str:
    """A table a suite, with its notes."""
    parts = []
    for suite, record in suites.items():
        rows = [
            f"| {name} | {_number(metric['value'], metric)} | {_interval(metric)} |"
            for name, metric in record["metrics"].items()
        ]
        notes = "\n".join(f"- {note}" for note in record["notes"])
        heading = f"### {suite}, n = {record['num_samples']:,}"
        parts.append("\n".join([heading, "", METRICS_HEAD, *rows]) + (f"\n\n{notes}" if notes else ""))
    return "\n\n".join(parts)


def _number(value: float, metric: dict[str, Any]) -> str:
    return f"{100 * value:.1f} %" if metric["percent"] else f"{value:.4g}"


def _interval(metric: dict[str, Any]) -> str:
    """Both ends, or nothing where there are none."""
    return "" if metric["interval"] is None else " to ".join(_number(end, metric) for end in metric["interval"])


def _said_by_run(run: Path, source: Path) -> str:
    """The last validation's numbers; of an unfinished run, the last before its checkpoint."""
    metrics = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    last_step = _last_step(source)
    metrics = [row for row in metrics if last_step is None or row["step"] <= last_step]
    evaluations = [row for row in metrics if "validation_denoising_loss" in row]
    if not evaluations:
        return "No evaluation was recorded."
    rows = "\n".join(f"| {key} | {value:.4g} |" for key, value in evaluations[-1].items())
    return f"On the validation split, averaged weights:\n\n| | |\n|---|---|\n{rows}"
