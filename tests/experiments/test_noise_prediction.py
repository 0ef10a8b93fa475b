"""The field as a noise predictor: classifier-free guidance written out, its loss, and its reading as an energy."""

from functools import partial

import pytest
import torch
from tiny import generator, tiny_pipeline, tiny_unet

from latent_egc.models.noise_schedule import add_noise
from latent_egc.objective import EGCObjective


@pytest.fixture
def script(experiment):
    return experiment("noise_prediction")


def batch(num_rows=6):
    draws = generator()
    latents, clean_latents, noise = (torch.randn(num_rows, 2, 4, 4, generator=draws) for _ in range(3))
    labels = torch.tensor([0, 1, 2, 0, -1, 2])
    timesteps = torch.randint(1000, (num_rows,), generator=draws)
    dropped = torch.arange(num_rows) == 1
    inputs = {"clean_latents": clean_latents, "clean_labels": labels, "noise": noise, "timesteps": timesteps}
    return {"latents": latents, "class_labels": labels, "label_dropped": dropped} | inputs


def written_out(model, noisy, timestep, labels):
    """Epsilon of the field at one timestep, a row at a time."""
    alpha, sigma = model.noise_levels(torch.tensor(timestep))
    rows = zip(noisy, labels, strict=True)
    fields = [model.network(row[None], torch.tensor([timestep]), torch.tensor([int(c)]))[0] for row, c in rows]
    return sigma * noisy + alpha * torch.cat(fields)


def test_a_sampling_step_is_classifier_free_guidance_written_out(script):
    pipeline = tiny_pipeline(head="inner", class_embedding=True)
    model, noise = pipeline.energy_model, torch.randn(3, 2, 4, 4, generator=generator())
    model.epsilon = partial(script.guided_noise, model)
    steps = []

    def keep(pipeline, step, timestep, tensors):
        steps.append((int(timestep), tensors["latents"]))

    arguments = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": noise, "output_type": "latent"}
    pipeline([0, 1, 2], **arguments, callback_on_step_end=keep)
    (first, found), (second, _) = steps[:2]
    with torch.no_grad():
        at_null, at_label = (written_out(model, noise, first, labels) for labels in ([-1, -1, -1], [0, 1, 2]))
    epsilon = at_null + 3.0 * (at_label - at_null)
    (alpha, sigma), (next_alpha, next_sigma) = (model.noise_levels(torch.tensor(t)) for t in (first, second))
    expected = next_alpha * (noise - sigma * epsilon) / alpha + next_sigma * epsilon  # DDIM
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (at_label - at_null).abs().max() > 0.01, "the label should make a difference"
    with torch.no_grad():
        for scale, wanted in ((0.0, at_null), (1.0, at_label)):
            plain = model.epsilon(noise, first, torch.tensor([0, 1, 2]), guidance_scale=scale)
            torch.testing.assert_close(plain, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="guided by guidance_scale alone, got classifier_free_scale=2"):
        model.epsilon(noise, first, torch.tensor([0, 1, 2]), classifier_free_scale=2)


def test_the_loss_is_the_error_of_the_field_at_the_labels_that_are_seen(script):
    model, inputs = tiny_unet(head="inner", class_embedding=True), batch()
    seen = [0, -1, 2, 0, -1, 2]  # the second is dropped, the fifth unlabelled
    noisy = add_noise(inputs["latents"], inputs["noise"], model.noise_levels(inputs["timesteps"]))
    rows = zip(noisy, inputs["timesteps"].tolist(), seen, strict=True)
    epsilon = torch.cat([written_out(model, row[None], t, [c]) for row, t, c in rows])
    losses = script.NoiseObjective(model, label_drop=0.1)(**inputs)
    torch.testing.assert_close(losses.loss, (epsilon - inputs["noise"]).square().mean())
    assert losses.loss == losses.denoising_loss
    assert losses.classification_loss == 0


@pytest.mark.parametrize("gaussian_part", [True, False])
def test_a_linear_symmetric_field_is_the_gradient_of_its_energy(script, gaussian_part):
    model = tiny_unet(head="inner", gaussian_part=gaussian_part)
    model.network = lambda latents, timesteps, labels: (0.3 * latents.flip(3), None)
    latents, timesteps = torch.randn(3, 2, 4, 4, generator=generator()), torch.tensor([0, 500, 999])
    torch.testing.assert_close(
        script.predicted_noise(model, latents, timesteps, None)[0], model.epsilon(latents, timesteps).detach()
    )


def test_the_field_objective_classifies_as_the_joint_one(script):
    inputs, options = batch(), {"classification_weight": 0.3, "label_smoothing": 0.1}
    joint = EGCObjective(tiny_unet(head="inner"), **options)(**inputs)
    field = script.FieldObjective(tiny_unet(head="inner"), **options)(**inputs)
    predicted = script.NoiseObjective(tiny_unet(head="inner"), **options)(**inputs)
    torch.testing.assert_close(field.classification_loss, joint.classification_loss)
    torch.testing.assert_close(field.denoising_loss, predicted.denoising_loss)
    assert abs(field.denoising_loss - joint.denoising_loss) > 1e-3
    torch.testing.assert_close(field.loss, field.denoising_loss + 0.3 * field.classification_loss)
