"""Train the small digits autoencoder that ships inside ``latent_egc``.

The model is a ``diffusers.AutoencoderKL`` that maps the scikit-learn digits (shown as 32x32 RGB images) to 8x8 latents.
The training part of the split makes it and its scaling factor, the held-out part the printed numbers.

Command that made the shipped weights (about five minutes on one CPU core)::

    python experiments/train_digits_vae.py --output latent_egc/assets/digits_vae \
        --steps 800 --seed 0 --preview digits_vae_preview.png
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from tqdm.auto import trange

from latent_egc.config import DataConfig
from latent_egc.data.sources import load_splits
from latent_egc.data.views import central_view


def load_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the train and held-out digits as float images in [-1, 1], (N, 3, 32, 32)."""
    config = DataConfig(dataset="digits", image_size=32)
    splits = load_splits(config, num_classes=10)
    train, held_out = (
        torch.stack([central_view(table.image(i), config.image_size) for i in range(len(table))])
        for table in (splits.train, splits.validation)
    )
    return train, held_out


def build_model(latent_channels: int) -> AutoencoderKL:
    """Build the untrained autoencoder: three levels, so two halvings of the resolution."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
    )


def train(model: AutoencoderKL, images: torch.Tensor, args: argparse.Namespace) -> None:
    """Minimise mean squared error plus a lightly weighted KL term (mean over latent values).

    The decoder sees latents with extra noise, in each channel's own std: it becomes robust, and every channel stays in
    use, while the KL term alone lets redundant ones die.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-4)
    warmup = 50

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / args.steps)) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    progress = trange(args.steps, desc="train")
    for step in progress:
        batch = images[torch.randint(len(images), (args.batch_size,))]
        posterior = model.encode(batch).latent_dist
        latents = posterior.sample()
        spread = posterior.mean.std((0, 2, 3), keepdim=True)
        latents = latents + args.latent_noise * spread * torch.randn_like(latents)
        error = F.mse_loss(model.decode(latents).sample, batch)
        loss = error + args.kl_weight * posterior.kl().mean() / latents[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 25 == 0:
            progress.set_postfix(psnr=f"{10 * math.log10(4 / error.item()):.2f}")
    model.eval()


def psnr(images: torch.Tensor, reconstructions: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of images in [-1, 1]."""
    error = F.mse_loss(reconstructions.clamp(-1, 1), images).item()
    return 10 * math.log10(4 / error)


@torch.no_grad()
def standardise_latents(model: AutoencoderKL, images: torch.Tensor) -> None:
    """Give all latent channels mean 0 and one common std, without changing the reconstructions.

    The last layer of the encoder and the first one of the decoder are 1x1 convolutions, so the
    change of variables z -> (z - mean) * gain goes into the first, its inverse into the second.
    """
    means = model.encode(images).latent_dist.mean
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    gain = std.square().mean().sqrt() / std
    channels = len(mean)
    encoder, decoder = model.quant_conv, model.post_quant_conv
    encoder.weight[:channels] *= gain[:, None, None, None]
    encoder.bias[:channels] = (encoder.bias[:channels] - mean) * gain
    encoder.bias[channels:] += 2 * gain.log()  # this half of the output is the log variance
    decoder.bias += decoder.weight[:, :, 0, 0] @ mean
    decoder.weight /= gain[None, :, None, None]


@torch.no_grad()
def set_scaling(model: AutoencoderKL, images: torch.Tensor) -> None:
    """Set ``scaling_factor`` to 1 / std of the posterior means; print the latents' statistics."""
    posterior = model.encode(images).latent_dist
    scale = round(1 / posterior.mean.std().item(), 5)
    model.register_to_config(scaling_factor=scale)
    latents, dims = posterior.mean * scale, (0, 2, 3)
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean(dims)
    correlation = torch.corrcoef(latents.transpose(0, 1).flatten(1)) - torch.eye(len(kl))
    print(f"scaling_factor {scale}; below, the train latents after scaling, by channel")
    print("mean:", np.round(latents.mean(dims).tolist(), 3))
    print("std:", np.round(latents.std(dims).tolist(), 3))
    print("mean posterior std:", np.round((posterior.std * scale).mean(dims).tolist(), 3))
    print("KL, nats per latent value:", np.round(kl.tolist(), 3))
    print(f"largest absolute correlation of two channels: {correlation.abs().max():.3f}")
    print(f"range of all values: {latents.min():.2f} to {latents.max():.2f}")


@torch.no_grad()
def evaluate(model: AutoencoderKL, images: torch.Tensor, preview: Path | None) -> None:
    """Print the held-out PSNR, clean and with noisy latents, and save a preview if asked."""
    latents = model.encode(images).latent_dist.mean
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    rows = [images[:16]]
    for level in (0.0, 0.1, 0.3):
        noisy = latents + level * noise / model.config.scaling_factor
        decoded = model.decode(noisy).sample
        print(f"held-out PSNR, latent noise {level:.1f} std: {psnr(images, decoded):.2f} dB")
        rows.append(decoded[:16])
    if preview is not None:
        grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
        pixels = ((grid.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        preview.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(pixels)
        picture.resize((16 * 64, len(rows) * 64), Image.Resampling.NEAREST).save(preview)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small digits autoencoder.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--preview", type=Path, help="PNG: originals, noise 0, 0.1, 0.3 std")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--kl-weight", type=float, default=1e-4)
    parser.add_argument("--latent-noise", type=float, default=0.2)
    parser.add_argument("--latent-channels", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads used by torch")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train_images, held_out_images = load_images()
    print(f"{len(train_images)} train and {len(held_out_images)} held-out images")
    model = build_model(args.latent_channels)
    start = time.perf_counter()
    train(model, train_images, args)
    print(f"trained {args.steps} steps in {time.perf_counter() - start:.0f} s")
    standardise_latents(model, train_images)
    set_scaling(model, train_images)
    evaluate(model, held_out_images, args.preview)
    model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
