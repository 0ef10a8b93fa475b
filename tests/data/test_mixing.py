"""Random erasing, Mixup and CutMix: timm's meanings, soft labels, and the same pairs on any number of processes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_unet
from torch.utils.data import Dataset

from latent_egc import EGCObjective
from latent_egc.config import DataConfig, parse_config
from latent_egc.data.mixing import augmented, erasing_mask, mixing_mask
from latent_egc.training.build import resolve
from latent_egc.training.loop import micro_batches


def masks(draw, size=(8, 8), count=2000, **config):
    rng = np.random.default_rng(0)
    return torch.stack([draw(DataConfig(**config), size, rng) for _ in range(count)])


def test_erasing_is_a_box_of_the_published_size_in_the_asked_share_of_rows():
    found = masks(erasing_mask, (16, 24), reprob=0.3)
    erased = found[(found == 0).any(dim=(1, 2))]
    assert abs(len(erased) / len(found) - 0.3) < 0.04
    boxes = (erased == 0).any(2).sum(1) * (erased == 0).any(1).sum(1)
    areas = (erased == 0).sum(dim=(1, 2))
    assert torch.equal(areas, boxes)
    assert 0.02 * 0.5 < areas.min() / (16 * 24) < 0.04 < 0.3 < areas.max() / (16 * 24) < 0.36
    assert (masks(erasing_mask, count=20) == 1).all(), "nothing by default"


def test_mixup_has_one_share_everywhere_from_a_beta_distribution():
    found = masks(mixing_mask, mixup=0.8)
    shares = found.mean(dim=(1, 2))
    torch.testing.assert_close(found, shares[:, None, None].expand_as(found))
    assert abs(shares.mean() - 0.5) < 0.03
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.1)


def test_cutmix_cuts_the_box_that_timm_cuts():
    """timm's rand_bbox, written out, and lambda corrected to the box's area."""
    for number in range(200):
        found = mixing_mask(DataConfig(cutmix=1.0), (8, 12), np.random.default_rng(number))
        rng = np.random.default_rng(number)
        rng.random()  # whether to mix
        ratio = math.sqrt(1 - rng.beta(1.0, 1.0))
        cut_h, cut_w = int(8 * ratio), int(12 * ratio)
        cy, cx = rng.integers(8), rng.integers(12)
        yl, yh = np.clip([cy - cut_h // 2, cy + cut_h // 2], 0, 8)
        xl, xh = np.clip([cx - cut_w // 2, cx + cut_w // 2], 0, 12)
        expected = torch.ones(8, 12)
        expected[yl:yh, xl:xh] = 0
        assert torch.equal(found, expected)
        assert found.mean().item() == pytest.approx(1 - (yh - yl) * (xh - xl) / 96)


def test_shares_of_pairs_that_are_mixed_and_that_are_cut():
    found = masks(mixing_mask, mixup=1.0, cutmix=1.0, mixup_prob=0.6, mixup_switch_prob=0.25)
    constant = found.amax(dim=(1, 2)) == found.amin(dim=(1, 2))
    mixed_up = constant & (found.amax(dim=(1, 2)) < 1)
    assert abs(mixed_up.float().mean() - 0.6 * 0.75) < 0.04
    assert abs((~constant).float().mean() - 0.6 * 0.25) < 0.04  # a few boxes have no area
    assert (masks(mixing_mask, mixup=1.0, mixup_prob=0.0, count=20) == 1).all()


def test_pairs_exchange_their_parts_and_labels_are_the_shares():
    latents = torch.arange(4.0)[:, None, None, None].expand(4, 2, 2, 2)
    mixing = torch.ones(4, 2, 2)
    mixing[:2] = 0.75
    mixing[2:, 0, 0] = 0
    found = augmented(latents, torch.tensor([2, 0, -1, 1]), 3, mixing=mixing)
    assert found["clean_latents"][:, 1, 0].tolist() == [[0.25, 0.25], [0.75, 0.75], [3, 2], [2, 3]]
    # The unlabelled row's share belongs to nobody.
    assert found["clean_labels"].tolist() == [[0.25, 0, 0.75], [0.75, 0, 0.25], [0, 0.25, 0], [0, 0.75, 0]]
    nobody = augmented(latents, torch.full((4,), -1), 3, mixing=mixing)["clean_labels"]
    assert (nobody == 0).all()
    erased = augmented(latents, torch.tensor([2, 0, -1, 1]), 3, erasing=torch.zeros(4, 2, 2))
    assert (erased["clean_latents"] == 0).all()
    assert erased["clean_labels"].tolist() == [2, 0, -1, 1]


def test_the_loss_of_mixed_rows_is_timms():
    """Soft targets of smoothed one-hot labels, and for an unlabelled partner its share less."""
    torch.manual_seed(0)
    model, smoothing = tiny_unet().double(), 0.2
    latents, clean, noise = torch.randn(3, 4, 2, 4, 4, dtype=torch.float64)
    labels, timesteps = torch.tensor([2, 0, -1, 1]), torch.tensor([3, 300, 600, 980])
    mixing = torch.tensor([0.3, 0.3, 0.6, 0.6], dtype=torch.float64)[:, None, None].expand(4, 4, 4)
    inputs = augmented(clean, labels, 3, mixing=mixing)
    arguments = {"noise": noise, "timesteps": timesteps}
    objective = EGCObjective(model, 0.3, smoothing)
    found = objective(latents, labels, **inputs, **arguments).classification_loss
    logits = model(inputs["clean_latents"], 0).logits.log_softmax(dim=1)
    one_hot = torch.full((3, 3), smoothing / 3, dtype=torch.float64) + (1 - smoothing) * torch.eye(3)
    targets = torch.stack(
        [
            0.3 * one_hot[2] + 0.7 * one_hot[0],
            0.3 * one_hot[0] + 0.7 * one_hot[2],
            0.4 * one_hot[1],
            0.6 * one_hot[1],
        ]
    )
    clean_part = -(model.alphas_cumprod[0].sqrt() * targets * logits).sum() / 8
    nothing = augmented(clean, torch.full_like(labels, -1), 3, mixing=mixing)
    noisy_part = objective(latents, labels, **nothing, **arguments).classification_loss
    torch.testing.assert_close(found, noisy_part + clean_part)
    hard, soft = (
        objective(latents, labels, clean, clean_labels=targets, **arguments).loss
        for targets in (labels, F.one_hot(labels.clamp(min=0), 3) * (labels >= 0).double()[:, None])
    )
    torch.testing.assert_close(hard, soft)


class RandomViews(Dataset):
    """`Views` of eight latents; each sample has one of its own."""

    def __len__(self):
        return 8

    def __getitems__(self, samples):
        views = [torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(sample)) for sample in samples]
        labels = torch.tensor([2, 0, -1, 1])
        names = ("view", "clean_view")
        return [
            dict(zip(names, view, strict=True)) | {"class_labels": labels[sample % 4], "num_skipped": torch.tensor(0)}
            for sample, view in zip(samples, views, strict=True)
        ]

    def moments(self, vae, views):
        return views


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_two_processes_mix_the_pairs_of_one(fraction):
    """Inputs equal to the bit, with every option on; so the loss is the mean of theirs."""

    def batches(batch_size, process_index, num_processes, first_step=0):
        values = {
            "model": {"sample_size": 4, "in_channels": 3, "num_classes": 3, "block_out_channels": [8]},
            "autoencoder": {"path": None},
            "data": {"image_size": 4, "mixup": 0.8, "cutmix": 1.0, "reprob": 0.5},
            "objective": {
                "clean_fraction": fraction,
                "timestep_log_normal": [-0.5, 1.2],
            },
            "training": {"max_steps": 3, "train_batch_size": batch_size},
        }
        process = {"process_index": process_index, "num_processes": num_processes, "device": torch.device("cpu")}
        config = resolve(parse_config(values))
        return [b for b, _ in micro_batches(config, RandomViews(), None, first_step, SimpleNamespace(**process))]

    model = tiny_unet(in_channels=3).double()
    objective = EGCObjective(model, 0.3, 0.1)

    def loss(inputs):
        return objective(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}).loss

    one = batches(8, 0, 1)
    for whole, first, second in zip(one, batches(4, 0, 2), batches(4, 1, 2), strict=True):
        assert set(whole) == set(first)
        assert whole["clean_labels"].shape == (8 * fraction, 3)
        assert ((whole["clean_labels"] > 0).sum(dim=1) > 1).any()
        assert (whole["clean_latents"] == 0).all(dim=1).any(), "erased"
        for key, value in whole.items():
            assert torch.equal(value, torch.cat([first[key], second[key]])), key
    torch.testing.assert_close(loss(whole), (loss(first) + loss(second)) / 2)
    resumed = batches(8, 0, 1, first_step=2)
    assert all(torch.equal(value, one[2][key]) for key, value in resumed[0].items())
