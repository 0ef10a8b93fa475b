"""Trains a plain classifier of the same trunk as a run's network, for comparison under attack.

    python scripts/train_plain_classifier.py runs/imagenette64 runs/imagenette64_plain
    latent-egc evaluate runs/imagenette64 --suite robustness --set robustness.plain=runs/imagenette64_plain

Network, starting weights, data, augmentation, batch, steps, learning rate and average are the run's own; the loss is
the cross entropy of clean latents at timestep 0 and nothing else, so that nothing denoises and no noise is seen. The
result is saved as a pipeline, whose samples mean nothing. One process.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from latent_egc.atomic import check_unoccupied, replace_folder
from latent_egc.config import load_config
from latent_egc.data.autoencoders import encode_moments, latent_shape, latents_from_moments, load_autoencoder
from latent_egc.data.stream import BatchSchedule, TrainingSamples
from latent_egc.data.views import PixelViews
from latent_egc.training.loop import build_data, build_model, build_pipeline, learning_rate_at
from latent_egc.training.validation import validation_latents
from latent_egc.training.warm_start import load_initial_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run whose trunk and settings are taken, by its config.yaml")
    parser.add_argument("folder", type=Path, help="for the pipeline; it must not hold anything yet")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="such as training.max_steps=200")
    options = parser.parse_args()

    check_unoccupied(options.folder)
    config = load_config(options.run / "config.yaml", options.overrides)
    training, accelerator = config.training, Accelerator()
    device = accelerator.device
    torch.manual_seed(training.seed)
    vae = load_autoencoder(config.autoencoder)
    model = build_model(config, vae)
    if config.model.init_from is not None:
        load_initial_weights(model, config.model.init_from)
    views, validation_rows, class_names, source = build_data(config, vae)
    for network in filter(None, (model, vae)):
        network.to(device)
    accelerator.print(f"{source}; {training.max_steps} steps of {training.train_batch_size}")

    shape, num_timesteps = latent_shape(vae, config.data.image_size), model.config.num_train_timesteps
    samples = TrainingSamples(views, training.seed, shape, num_timesteps, label_drop=0.0)
    schedule = BatchSchedule(0, training.max_steps, training.train_batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), training.learning_rate, betas=training.adam_betas, weight_decay=training.weight_decay
    )
    ema = EMAModel(model.parameters(), decay=training.ema_decay)
    model.train()
    loader = DataLoader(samples, batch_sampler=schedule, num_workers=config.data.num_workers)
    progress = tqdm(loader, desc="train")
    for step, batch in enumerate(progress):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, training)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        moments = encode_moments(vae, batch["clean_view"]) if isinstance(views, PixelViews) else batch["clean_view"]
        noise = batch["clean_posterior_noise"] if config.autoencoder.sample_posterior else None
        logits, labels = model(latents_from_moments(vae, moments, noise), 0).logits, batch["class_labels"]
        smoothing = config.objective.label_smoothing
        # The mean over all rows, as in training: a row without label adds 0.
        loss = F.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=smoothing, reduction="sum") / len(
            labels
        )
        loss.backward()
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    ema.copy_to(model.parameters())

    pipeline = build_pipeline(config, model.eval(), vae, class_names)
    replace_folder(options.folder, pipeline.save_pretrained)
    accelerator.print(f"pipeline written: {options.folder}")
    latents, labels, _ = validation_latents(config, vae, validation_rows, accelerator)
    with torch.no_grad():
        predicted = [model(part.to(device), 0).logits.argmax(dim=1).cpu() for part in latents.split(64)]
    labelled = labels >= 0
    accuracy = (torch.cat(predicted) == labels)[labelled].double().mean()
    accelerator.print(f"validation accuracy {accuracy:.1%} of {int(labelled.sum())} images")


if __name__ == "__main__":
    main()
