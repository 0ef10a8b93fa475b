"""Judges a run of configs/imagenette64.yaml: accuracy, class agreement of guided samples, FD-SqueezeNet, a sample grid.

    python scripts/evaluate_imagenette64.py runs/imagenette64 --scales 1 2 4 6

The judge of the samples is a logistic regression on SqueezeNet 1.1 features of the real training images, decoded
through the run's own autoencoder as the samples are; its accuracy on the validation images, decoded likewise, is
printed beside. FD-SqueezeNet is the Frechet distance between such features (512 of them); it is not the published FID.
"""

import argparse
from pathlib import Path

import einops
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from latent_egc import EGCPipeline
from latent_egc.config import Config, load_config
from latent_egc.data import ImageTable, central_view, load_splits
from latent_egc.evaluation.features import frechet_distance
from latent_egc.figures import sample_rows, save_grid

FEATURES = Path("../shared/weights/squeezenet1_1_features.pt")


def features(extractor: torch.nn.Module, images: torch.Tensor) -> np.ndarray:
    """Images (N, 3, H, W) in [0, 1] -> (N, 512) float64."""
    with torch.no_grad():
        batches = [extractor(batch) for batch in tqdm(images.split(100), desc="features", leave=False)]
    return torch.cat(batches).double().numpy()


def real_images(table: ImageTable, size: int) -> torch.Tensor:
    """The split's centre crops, (N, 3, size, size) in [0, 1]."""
    rows = tqdm(range(len(table)), desc=f"read {table.name}", leave=False)
    return torch.stack([central_view(table.image(i), size) for i in rows]) / 2 + 0.5


def reconstruct(pipeline: EGCPipeline, images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] through the autoencoder and back, as samples are decoded."""
    batches = tqdm(images.split(50), desc="autoencoder", leave=False)
    with torch.no_grad():
        return torch.cat([pipeline.decode(pipeline.encode(2 * batch - 1)) for batch in batches]).clamp(-1, 1) / 2 + 0.5


def sample(pipeline: EGCPipeline, config: Config, images_per_class: int, scale: float) -> np.ndarray:
    """(classes, images_per_class, H, W, 3) in [0, 1], the same starting noise at every scale."""
    steps, classes = config.sampling.num_inference_steps, range(len(pipeline.id2label))
    return sample_rows(pipeline, classes, images_per_class, steps, scale, seed=1, batch_size=100)


def agreement(judge: Pipeline, extractor: torch.nn.Module, images: np.ndarray) -> float:
    """The share of samples to which the judge gives the requested class."""
    flat = torch.from_numpy(einops.rearrange(images, "r c h w d -> (r c) d h w"))
    return float(
        (judge.predict(features(extractor, flat)) == np.repeat(np.arange(len(images)), images.shape[1])).mean()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--features", type=Path, default=FEATURES, help=f"the feature extractor (default {FEATURES})")
    parser.add_argument("--scales", type=float, nargs="*", default=[], help="guidance scales besides the default one")
    parser.add_argument("--judge-images", type=int, default=4000, help="training images of the judge (default all)")
    parser.add_argument(
        "--fd-samples-per-class", type=int, default=100, help="samples for FD, at least 52 (default 100)"
    )
    options = parser.parse_args()
    if options.fd_samples_per_class < 52:
        parser.error(
            f"--fd-samples-per-class must be at least 52 for 512 feature dimensions, got {options.fd_samples_per_class}"
        )

    config = load_config(options.run / "config.yaml")
    pipeline = EGCPipeline.from_pretrained(options.run / "pipeline")
    extractor = torch.jit.load(options.features).eval()
    splits = load_splits(config.data, len(pipeline.id2label))
    train, validation = (real_images(table, pipeline.image_size) for table in (splits.train, splits.validation))

    logits = torch.cat([pipeline.classify(batch).logits for batch in validation.split(100)])
    accuracy = (logits.argmax(dim=1).numpy() == splits.validation.labels).mean()
    print(f"accuracy on {len(validation)} validation images: {accuracy:.1%}", flush=True)

    chosen = np.random.default_rng(0).permutation(len(train))[: options.judge_images]
    train_decoded = features(extractor, reconstruct(pipeline, train[chosen]))
    validation_decoded = features(extractor, reconstruct(pipeline, validation))
    judge = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    judge.fit(train_decoded, splits.train.labels[chosen])
    score = judge.score(validation_decoded, splits.validation.labels)
    print(f"the judge's own accuracy on them, decoded: {score:.1%}, trained on {len(chosen)} images", flush=True)

    default = pipeline.config.default_guidance_scale
    for scale in dict.fromkeys([default, *options.scales]):
        is_default = scale == default
        images = sample(pipeline, config, options.fd_samples_per_class if is_default else 20, scale)
        share = agreement(judge, extractor, images[:, :20])
        note = " (the default)" if is_default else ""
        print(f"class agreement of {20 * len(images)} samples at guidance {scale:g}{note}: {share:.1%}", flush=True)
        if is_default:
            names = [name.split("_", 1)[-1].replace("_", " ") for name in pipeline.id2label.values()]
            title = f"guidance {scale:g}, {config.sampling.num_inference_steps} DDIM steps"
            save_grid(images[:, :8], options.run / "samples.png", names, title)
            real = features(extractor, train)
            flat = torch.from_numpy(einops.rearrange(images, "r c h w d -> (r c) d h w"))
            distance = frechet_distance(real, features(extractor, flat))
            print(f"FD-SqueezeNet to {len(real)} training images, {len(flat)} samples: {distance:.2f}")
            floor = frechet_distance(real, validation_decoded)
            print(
                f"  the same for {len(validation)} validation images through the autoencoder: {floor:.2f}", flush=True
            )


if __name__ == "__main__":
    main()
