"""The quickstart: train on digits, reload, sample and classify; the samples are judged by an independent classifier.

    python examples/quickstart.py            (what `make quickstart` runs)

Writes runs/quickstart/ with samples.png and curves.png and prints test accuracy, the share of 200 guided samples that a
support vector classifier, trained on real digits, gives the class that was asked for, and seconds.
"""

import shutil
import time
from pathlib import Path

import einops
import numpy as np
from sklearn.svm import SVC

from latent_egc import EGCPipeline
from latent_egc.config import Config, load_config
from latent_egc.data.encoding import encode
from latent_egc.data.sources import ImageTable, load_splits
from latent_egc.training.build import resolve_model
from latent_egc.training.figures import sample_rows, save_grid
from latent_egc.training.loop import train

ROOT = Path(__file__).resolve().parents[1]
SAMPLES_PER_CLASS = 20


def grey_pixels(images: np.ndarray) -> np.ndarray:
    """Images (N, 32, 32, 3) in [0, 1] -> (N, 64): the digits' own 8x8 pixels, as the judge sees them."""
    return einops.reduce(images, "n (h p) (w q) d -> n (h w)", "mean", p=4, q=4)


def real_images(table: ImageTable) -> np.ndarray:
    """Real digits, enlarged as they are for training: (N, 32, 32, 3) in [0, 1]."""
    return np.stack([np.asarray(table.image(i).resize((32, 32))) / 255 for i in range(len(table))])


def run(config: Config) -> None:
    """Everything, with a fresh run folder."""
    start = time.perf_counter()
    encode(config.data, config.autoencoder, resolve_model(config.model)["num_classes"])
    folder = train(config)
    trained = time.perf_counter()

    pipeline = EGCPipeline.from_pretrained(folder / "pipeline")
    splits = load_splits(config.data, num_classes=10)
    test_images = [splits.validation.image(i) for i in range(len(splits.validation))]
    predicted = pipeline.classify(test_images).logits.argmax(dim=1).numpy()
    accuracy = (predicted == splits.validation.labels).mean()

    steps = config.sampling.num_inference_steps
    images = sample_rows(pipeline, range(10), SAMPLES_PER_CLASS, steps, seed=1, batch_size=100)
    judge = SVC().fit(grey_pixels(real_images(splits.train)), splits.train.labels)
    judge_accuracy = judge.score(grey_pixels(real_images(splits.validation)), splits.validation.labels)
    requested = np.repeat(np.arange(10), SAMPLES_PER_CLASS)
    agreement = (judge.predict(grey_pixels(einops.rearrange(images, "r c h w d -> (r c) h w d"))) == requested).mean()
    title = f"digits, guidance {pipeline.config.default_guidance_scale:g}, {steps} steps"
    save_grid(images[:, :10], folder / "samples.png", list(pipeline.id2label.values()), title)

    print(f"test accuracy                  {accuracy:.1%} of {len(test_images)} held-out digits")
    print(f"samples of the requested class {agreement:.1%} of {len(requested)} guided samples")
    print(f"  judged by an SVC with        {judge_accuracy:.1%} on the held-out digits")
    print(f"seconds                        {time.perf_counter() - start:.0f}, of them {trained - start:.0f} training")
    print(f"pictures                       {folder}/samples.png, {folder}/curves.png")
    print("your own images                latent-egc init photos/ > my.yaml")


if __name__ == "__main__":
    quickstart_folder = ROOT / "runs" / "quickstart"
    shutil.rmtree(quickstart_folder, ignore_errors=True)
    run(load_config(ROOT / "configs" / "digits.yaml", [f"output_dir={quickstart_folder}"]))
