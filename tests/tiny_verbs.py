"""What the verbs are given, tiny, and the files that they wrote."""

from pathlib import Path

import torch
import yaml
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from tiny import tiny_kl, tiny_pipeline, write_images
from tiny_studies import FAST_EVALUATION, FAST_PROBE, Brightness

EVALUATE = "classification,calibration,generation,likelihood"
FAST_SUITES = ["likelihood.num_images=10", "likelihood.num_steps=3", "generation.num_samples=40"]
FAST_SUITES += ["generation.num_inference_steps=5", "generation.kid_subset_size=20", "generation.num_judge_images=30"]


def write_things(folder: Path, per_class: int) -> None:
    """Below `folder`: images, vae, dit, pipeline, features.pt, and two runs' configurations, cached and pixels."""
    data = write_images(folder / "images", per_class=per_class)
    tiny_kl().save_pretrained(folder / "vae")
    dit = DiTTransformer2DModel(2, 8, in_channels=2, num_layers=1, sample_size=4, num_embeds_ada_norm=3)
    scheduler = DDIMScheduler(prediction_type="epsilon", clip_sample=False)
    DiTPipeline(dit, tiny_kl(), scheduler).save_pretrained(folder / "dit")
    tiny_pipeline(names=("cat", "cow", "dog")).save_pretrained(folder / "pipeline")
    torch.jit.script(Brightness()).save(folder / "features.pt")
    model = {"sample_size": 4, "in_channels": 2, "num_classes": 3, "block_out_channels": [8, 16]}
    section = {"dataset": "imagefolder", "data_dir": data.data_dir, "image_size": 8, "validation_fraction": 1 / 3}
    values = {
        "model": model | {"layers_per_block": 1, "attention_levels": [1], "norm_num_groups": 4},
        "autoencoder": {"path": str(folder / "vae")},
        "data": section | {"horizontal_flip": True},
        "training": {
            "max_steps": 60,
            "train_batch_size": 4,
            "learning_rate": 1e-3,
            "log_every": 1,
            "validate_every": 15,
            "sample_every": 30,
            "checkpoint_every": 6,
            "num_validation_images": 8,
            "trackers": [],
            "resume": "auto",
        },
        "sampling": {"num_inference_steps": 2, "num_images_per_label": 1},
    }
    (folder / "pixels.yaml").write_text(yaml.safe_dump(values))
    values["data"] |= {"latent_cache": str(folder / "cache"), "num_views": 2}
    (folder / "cached.yaml").write_text(yaml.safe_dump(values))


def arguments(verb: str, things: Path, output: Path) -> list[str]:
    """The command line of a verb that writes `output`."""
    pipeline, pixels = str(things / "pipeline"), str(things / "pixels.yaml")
    study = ["--output", str(output), "--set"]
    evaluation = ["--suite", EVALUATE, "--features", str(things / "features.pt"), *study]
    return {
        "encode": ["encode", str(things / "cached.yaml"), f"data.latent_cache={output}", "--batch-size=8"],
        "train": ["train", str(things / "cached.yaml"), f"output_dir={output}"],
        "evaluate": ["evaluate", pipeline, "--data", pixels, *evaluation, *FAST_EVALUATION, *FAST_SUITES],
        "probe": ["probe", pipeline, "--data", pixels, "--suite", "heatmap,pooling", *study, *FAST_PROBE],
        "sample": ["sample", pipeline, "--num-images-per-label=1", "--steps=2", "--output", str(output)],
        "export": ["export", pipeline, str(output)],
        "convert": ["convert", "--from-dit", str(things / "dit"), str(output)],
        "benchmark": ["benchmark", pixels, "--repeats=1", "--output", str(output / "numbers.json")],
    }[verb]
