"""What a classifier's training does to clean latents: random erasing, Mixup and CutMix, with timm's names and meanings.

Each is a mask of a latent's height and width, drawn in the loader and applied on the device. Latents are erased, not
pixels, so that a latent cache, whose views are few, shows each of them in many ways. Partners are neighbours among the
samples of the clean branch, the first with the second and so on: timm's mode "pair", which does not depend on how many
processes share a batch.

Sources: Mixup, Zhang et al. (ICLR 2018); CutMix, Yun et al. (ICCV 2019); random erasing, Zhong et al. (AAAI 2020).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from latent_egc.config import DataConfig

# Bounds of the erased box: share of the area, and height / width; timm's.
ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


def mixes(config: DataConfig) -> bool:
    """Whether clean rows are mixed."""
    return config.mixup_prob > 0 and (config.mixup > 0 or config.cutmix > 0)


def erasing_mask(config: DataConfig, size: tuple[int, int], rng: np.random.Generator) -> torch.Tensor:
    """(h, w) float32 of `size`: 0 in a box with probability `config.reprob`, else 1; timm's RandomErasing, "const"."""
    mask, (height, width) = torch.ones(size), size
    if rng.random() < config.reprob:
        for _ in range(10):
            area = height * width * rng.uniform(*ERASED_AREA)
            ratio = math.exp(rng.uniform(*map(math.log, ERASED_RATIO)))
            rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if rows < height and columns < width:
                top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
                mask[top : top + rows, left : left + columns] = 0
                break
    return mask


def mixing_mask(config: DataConfig, size: tuple[int, int], rng: np.random.Generator) -> torch.Tensor:
    """(h, w) float32 of `size`, a row's own share of itself at each place: lambda everywhere in Mixup, 0 in a box and 1
    elsewhere in CutMix, 1 everywhere in a pair that is not mixed. Its mean is the share of the row's own label.
    """
    mask, (height, width) = torch.ones(size), size
    if rng.random() >= config.mixup_prob:
        return mask
    cuts = config.cutmix > 0 and (config.mixup == 0 or rng.random() < config.mixup_switch_prob)
    alpha = config.cutmix if cuts else config.mixup
    share = rng.beta(alpha, alpha)
    if not cuts:
        return mask * share
    # The box has its centre in the image and is clipped by it.
    rows, columns = (int(length * math.sqrt(1 - share)) // 2 for length in size)
    y, x = rng.integers(height), rng.integers(width)
    mask[max(0, y - rows) : y + rows, max(0, x - columns) : x + columns] = 0
    return mask


def augmented(
    latents: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    erasing: torch.Tensor | None = None,
    mixing: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The clean branch's arguments of `EGCObjective.forward`: rows erased in part, then each pair mixed.

    Args:
        latents: (M, C, h, w); rows 2k and 2k + 1 are a pair.
        labels: (M,) int64 in [-1, num_classes), -1 = unlabelled.
        num_classes: K.
        erasing: (M, h, w) of `erasing_mask`; None: nothing is erased.
        mixing: (M, h, w) of `mixing_mask`, a pair's twice, M even; None: nothing is mixed.

    Returns:
        clean_latents (M, C, h, w); clean_labels, where nothing is mixed as they were, else (M, K), the share of each
        class in the row. An unlabelled row's share belongs to no class: a row sums to less than 1 where its partner or
        itself has no label, and to 0 where neither has.
    """
    if erasing is not None:
        latents = erasing[:, None] * latents
    if mixing is not None:
        own, share = mixing[:, None], mixing.mean(dim=(1, 2))[:, None]
        latents = own * latents + (1 - own) * _partners(latents)
        classes = F.one_hot(labels.clamp(min=0), num_classes) * (labels >= 0)[:, None]
        labels = share * classes + (1 - share) * _partners(classes)
    return {"clean_latents": latents, "clean_labels": labels}


def _partners(rows: torch.Tensor) -> torch.Tensor:
    """(M, ...) with the rows of each pair exchanged."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
