"""Features on disk: every image's pooled maps of every block at one timestep, in shards.

    FOLDER/KEY/cache.json                    what the key stands for
    FOLDER/KEY/latents/train/00000.safetensors       {"latents": (B, C, h, w)} of 256 rows
    FOLDER/KEY/t0090/train/00000.safetensors         {block: (B, D, p, p)}

A shard is whole or not there, and a killed call goes on behind the last one. Only one shard's latents and pooled maps
are in memory while they are computed.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from latent_egc.atomic import replace_file, replace_text
from latent_egc.config import ConfigError
from latent_egc.data.sources import ImageTable
from latent_egc.data.stream import NOISE, VALIDATION_NOISE
from latent_egc.measuring.context import noise_of_rows, pixel_values
from latent_egc.measuring.denoisers import Denoiser
from latent_egc.measuring.settings import PlaceSettings

ROWS_PER_SHARD = 256
NOISE_STREAM = {"train": NOISE, "validation": VALIDATION_NOISE}


@dataclass(frozen=True)
class Rows:
    """The images of one split that are looked at."""

    table: ImageTable
    rows: np.ndarray  # (N,) int64, their places in the table

    def __len__(self) -> int:
        return len(self.rows)


class FeatureCache:
    """The features of some images; computed once, read from disk.

    Args:
        folder: for the caches of all denoisers and data.
        denoiser: whose features.
        splits: "train" and "validation".
        settings: of the probe.
        identity: what else the features depend on: plain values that tell this data from other data.
    """

    def __init__(
        self,
        folder: Path,
        denoiser: Denoiser,
        splits: dict[str, Rows],
        settings: PlaceSettings,
        identity: dict[str, object],
    ) -> None:
        self.denoiser, self.splits, self.settings = denoiser, splits, settings
        for block in settings.blocks or ():
            if block not in denoiser.blocks:
                known = ", ".join(denoiser.blocks)
                raise ConfigError(f"blocks: the network has no block {block!r}, it has {known}")
        self.blocks = [block for block in denoiser.blocks if settings.blocks is None or block in settings.blocks]
        for key, t in (("timesteps", t) for t in settings.timesteps):
            if t >= len(denoiser.alphas_cumprod):
                raise ConfigError(f"{key} must be below {len(denoiser.alphas_cumprod)}, got {t}")
        self.record = identity | {
            "denoiser": denoiser.fingerprint,
            "rows": {name: hashlib.sha256(split.rows.tobytes()).hexdigest()[:16] for name, split in splits.items()},
            "noise_seed": settings.noise_seed,
            "largest_pooling": max(settings.poolings),
            "blocks": self.blocks,
            "dtype": settings.dtype,
        }
        key = hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / key

    def extract(self, timesteps: Sequence[int], accelerator: Accelerator) -> None:
        """Computes what is missing at these timesteps; several processes share the shards.

        Raises:
            ConfigError: features that the stored dtype cannot hold.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            replace_text(self.folder / "cache.json", json.dumps(self.record, indent=1))
        shards = [(name, n) for name, split in self.splits.items() for n in range(_num_shards(len(split)))]
        mine = shards[accelerator.process_index :: accelerator.num_processes]
        for name, number in tqdm(mine, desc="features", unit="shard", disable=not accelerator.is_main_process):
            paths = {t: self._path(f"t{t:04d}", name, number) for t in timesteps}
            latents_path = self._path("latents", name, number)
            missing = {t: path for t, path in paths.items() if not path.exists()}
            if latents_path.exists() and not missing:
                continue
            rows = self.splits[name].rows[number * ROWS_PER_SHARD : (number + 1) * ROWS_PER_SHARD]
            if not latents_path.exists():
                _save({"latents": self._encoded(self.splits[name].table, rows)}, latents_path)
            with safe_open(latents_path, "pt") as file:
                latents = file.get_tensor("latents")
            for t, path in missing.items():
                _save(self._pooled(latents, self.noise(name, rows), t), path)
        accelerator.wait_for_everyone()

    def latents(self, split: str) -> torch.Tensor:
        """(N, C, h, w) float32, clean."""
        return self._read("latents", split, "latents")

    def features(self, split: str, timestep: int, block: str, pooling: int) -> np.ndarray:
        """(N, D, p, p) float32 of one block at one timestep; p is smaller where the block's map is."""
        maps = self._read(f"t{timestep:04d}", split, block)
        return F.adaptive_avg_pool2d(maps, min(pooling, maps.shape[-1])).numpy()

    def noise(self, split: str, rows: Sequence[int]) -> torch.Tensor:
        """(N, C, h, w) standard normal, a function of (noise seed, split, row): the same at every timestep."""
        shape = (self.denoiser.channels, self.denoiser.sample_size, self.denoiser.sample_size)
        return noise_of_rows(self.settings.noise_seed, NOISE_STREAM[split], rows, shape)

    def stored_pooling(self, timestep: int, block: str) -> int:
        """The largest p of a block: the largest that is asked for, or its map's size."""
        with safe_open(self._path(f"t{timestep:04d}", "validation", 0), "pt") as file:
            return file.get_slice(block).get_shape()[-1]

    def _path(self, kind: str, split: str, number: int) -> Path:
        return self.folder / kind / split / f"{number:05d}.safetensors"

    def _read(self, kind: str, split: str, name: str) -> torch.Tensor:
        """(N, ...) float32, shard by shard into one tensor."""
        whole = None
        for number in range(_num_shards(len(self.splits[split]))):
            with safe_open(self._path(kind, split, number), "pt") as file:
                part = file.get_tensor(name)
            if whole is None:
                whole = torch.empty(len(self.splits[split]), *part.shape[1:])
            whole[number * ROWS_PER_SHARD :][: len(part)] = part
        return whole

    def _encoded(self, table: ImageTable, rows: np.ndarray) -> torch.Tensor:
        device, size = self.denoiser.network.device, self.settings.batch_size
        batches = [rows[first : first + size] for first in range(0, len(rows), size)]
        views = (pixel_values(table, batch, self.denoiser.image_size).to(device) for batch in batches)
        return torch.cat([self.denoiser.encode(batch).float().cpu() for batch in views])

    @torch.no_grad()
    def _pooled(self, latents: torch.Tensor, noise: torch.Tensor, timestep: int) -> dict[str, torch.Tensor]:
        """Block -> (B, D, p, p) in the stored dtype, of one shard."""
        device, size, largest = self.denoiser.network.device, self.settings.batch_size, max(self.settings.poolings)
        parts: dict[str, list[torch.Tensor]] = {block: [] for block in self.blocks}
        for clean, draw in zip(latents.split(size), noise.split(size), strict=True):
            maps = self.denoiser.features(self.denoiser.noised(clean.to(device), draw.to(device), timestep), timestep)
            for block in self.blocks:
                p = min(largest, maps[block].shape[-1])
                parts[block].append(F.adaptive_avg_pool2d(maps[block].float(), p).cpu())
        dtype = getattr(torch, self.settings.dtype)
        pooled = {block: torch.cat(batches).to(dtype) for block, batches in parts.items()}
        for block, values in pooled.items():
            if not values.isfinite().all():
                raise ConfigError(f"features of {block} at timestep {timestep} do not fit dtype={self.settings.dtype}")
        return pooled


def _num_shards(num_rows: int) -> int:
    return -(-num_rows // ROWS_PER_SHARD)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    replace_file(path, lambda unfinished: save_file(contiguous, unfinished))
