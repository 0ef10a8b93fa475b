"""Trains a plain classifier of the same trunk as a run's network, for comparison under attack.

    python scripts/train_plain_classifier.py runs/imagenette64 runs/imagenette64_plain
    latent-egc evaluate runs/imagenette64 --suite robustness --set robustness.plain=runs/imagenette64_plain

Network, data, augmentation, batch, steps, learning rate and average are the run's own; the loss is the cross entropy of
clean latents at timestep 0 and nothing else, so that nothing denoises and no noise is seen. The result is saved as a
pipeline, whose samples mean nothing.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from latent_egc.autoencoders import encode_moments, latent_shape, latents_from_moments, load_autoencoder
from latent_egc.config import load_config
from latent_egc.data import BatchSchedule, PixelViews, TrainingSamples
from latent_egc.training import build_data, build_model, build_pipeline, learning_rate_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run whose trunk and settings are taken, by its config.yaml")
    parser.add_argument("folder", type=Path, help="for the pipeline")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="such as training.max_steps=200")
    options = parser.parse_args()

    config = load_config(options.run / "config.yaml", options.overrides)
    training = config.training
    torch.manual_seed(training.seed)
    vae = load_autoencoder(config.autoencoder)
    model = build_model(config, vae).train()
    views, _, class_names, _ = build_data(config, vae)
    shape, num_timesteps = latent_shape(vae, config.data.image_size), model.config.num_train_timesteps
    samples = TrainingSamples(views, training.seed, shape, num_timesteps, label_drop=0.0)
    schedule = BatchSchedule(0, training.max_steps, training.train_batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), training.learning_rate, betas=training.adam_betas, weight_decay=training.weight_decay
    )
    ema = EMAModel(model.parameters(), decay=training.ema_decay)
    progress = tqdm(DataLoader(samples, batch_sampler=schedule), desc="train")
    for step, batch in enumerate(progress):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, training)
        moments = encode_moments(vae, batch["clean_view"]) if isinstance(views, PixelViews) else batch["clean_view"]
        noise = batch["clean_posterior_noise"] if config.autoencoder.sample_posterior else None
        logits = model(latents_from_moments(vae, moments, noise), 0).logits
        loss = F.cross_entropy(
            logits, batch["class_labels"], ignore_index=-1, label_smoothing=config.objective.label_smoothing
        )
        loss.backward()
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        progress.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
    ema.copy_to(model.parameters())
    build_pipeline(config, model.eval(), vae, class_names).save_pretrained(options.folder)
    print(f"pipeline written: {options.folder}")


if __name__ == "__main__":
    main()
