"""What the suites of an evaluation are given: gathering, logits, noise."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from latent_egc.data.sources import CorruptImageError


def test_over_returns_every_position_once_in_order(evaluation_context):
    context = evaluation_context("batch_size=3")
    assert context.over(7, lambda positions: torch.tensor(list(positions)), "").tolist() == list(range(7))


def test_logits_are_the_pipelines(evaluation_context):
    context = evaluation_context()
    images = [context.splits.validation.image(row) for row in context.rows]
    output = context.pipeline.classify(images)
    torch.testing.assert_close(context.logits, output.logits)
    energies, _ = context.energies_and_logits(context.latents, 0)
    torch.testing.assert_close(energies, output.energy)


def test_noise_is_a_function_of_the_row(evaluation_context):
    """An image that is measured among few has the noise that it has among all."""
    whole, few = evaluation_context(), evaluation_context("num_images=3")
    places = np.searchsorted(whole.rows, few.rows)
    assert places.tolist() != [0, 1, 2]
    torch.testing.assert_close(few.latents, whole.latents[places])
    found, expected = (c.energies_and_logits(c.latents, 500, c.rows)[0] for c in (few, whole))
    torch.testing.assert_close(found, expected[places])
    again = evaluation_context("seed=1")
    assert not torch.allclose(again.noise(whole.rows), whole.noise(whole.rows))


def test_noised_latents_are_at_their_noise_level(evaluation_context):
    context = evaluation_context("batch_size=2")
    alpha, sigma = context.model.noise_levels(torch.tensor(500))
    noisy = alpha * context.latents + sigma * context.noise(context.rows)
    expected = context.model(noisy, 500).logits
    torch.testing.assert_close(context.energies_and_logits(context.latents, 500, context.rows)[1], expected)


def test_corrupt_images_are_skipped_and_counted_where_they_may_be(evaluation_context):
    """All suites see the other rows, with the noise that they have among all; else the first is named."""
    whole = evaluation_context()
    row = int(whole.rows[2])
    path = whole.splits.validation.rows[row]["image"]["path"]
    Path(path).write_bytes(b"no image")

    def context(skip_corrupt):
        data = dataclasses.replace(whole.data, skip_corrupt=skip_corrupt)
        return type(whole)(whole.pipeline, data, whole.settings, Accelerator(cpu=True))

    with pytest.warns(UserWarning, match=rf"skipped 1 corrupt images of the validation split, the first is row {row}"):
        skipping = context(True)
    kept = [place for place in range(7) if place != 2]
    assert skipping.rows.tolist() == whole.rows[kept].tolist()
    assert skipping.labels.tolist() == whole.labels[kept].tolist()
    assert len(skipping.logits) == 6
    torch.testing.assert_close(skipping.noise(skipping.rows), whole.noise(whole.rows)[kept])
    with pytest.raises(CorruptImageError, match=path):
        context(False).logits  # noqa: B018
