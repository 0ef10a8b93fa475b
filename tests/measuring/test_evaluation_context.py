"""What the suites of an evaluation are given: gathering, logits, noise."""

import torch


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


def test_noised_latents_are_at_their_noise_level(evaluation_context):
    context = evaluation_context("batch_size=2")
    alpha, sigma = context.model.noise_levels(torch.tensor(500))
    noisy = alpha * context.latents + sigma * context.noise(context.rows)
    expected = context.model(noisy, 500).logits
    torch.testing.assert_close(context.energies_and_logits(context.latents, 500, context.rows)[1], expected)
