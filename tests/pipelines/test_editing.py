"""Editing, with tiny real components."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from PIL import Image
from tiny import generator, gradient_image, sample, tiny_pipeline

from latent_egc.pipelines.images import crop_images, crop_masks

LEFT = np.zeros((8, 8), dtype=np.uint8)
LEFT[:, :4] = 255  # what is painted anew
MASK = Image.fromarray(LEFT)


def images(count=3):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(count)]


def steady(**overrides):
    """A pipeline whose energy is nearly that of standard normal latents, so that few steps follow its flow."""
    pipeline = tiny_pipeline(**overrides)
    for parameter in pipeline.energy_model.parameters():
        parameter.data *= 0.4
    return pipeline


def latents_of(pipeline, given):
    return pipeline.image_to_image(given, strength=0.0, output_type="latent").images


# --- drawn noise ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vae", [True, False])
def test_no_strength_is_the_autoencoder_and_full_strength_is_sampling(vae):
    pipeline = tiny_pipeline(vae, in_channels=2 if vae else 3, sample_size=4 if vae else 8)
    with torch.no_grad():
        decoded = pipeline.decode(pipeline.encode(2 * pixels_of(images()) - 1)) / 2 + 0.5
    none = pipeline.image_to_image(images(), "cat", strength=0.0, output_type="pt").images
    torch.testing.assert_close(none, decoded.clamp(0, 1))
    options = {"generator": generator(), "num_inference_steps": 3, "output_type": "pt"}
    full = pipeline.image_to_image(images(), ["cat", "dog", "cow"], strength=1.0, **options).images
    assert torch.equal(full, sample(pipeline, ["cat", "dog", "cow"]))


def test_more_strength_goes_farther_from_the_image():
    pipeline, given = steady(), images()
    original = latents_of(pipeline, given)
    far = [
        (pipeline.image_to_image(given, strength=s, generator=generator(), output_type="latent").images - original)
        for s in (0.0, 0.3, 0.7)
    ]
    assert [float(f.norm()) for f in far] == sorted(float(f.norm()) for f in far)
    assert not far[0].any()


@pytest.mark.parametrize("method", ["image_to_image", "inpaint"])
@pytest.mark.parametrize("variant", [{}, {"class_embedding": True, "head": "inner"}], ids=str)
def test_a_batch_equals_its_images_one_by_one(method, variant):
    pipeline, labels = tiny_pipeline(**variant), ["cat", "dog", "cow"]
    own = {"mask_image": MASK} if method == "inpaint" else {}
    options = {"num_inference_steps": 4, "strength": 0.5, "output_type": "pt"} | own

    def edited(given, wanted, generators, **more):
        return getattr(pipeline, method)(given, class_labels=wanted, generator=generators, **options, **more).images

    together = edited(images(), labels, [generator(i) for i in range(3)])
    split = edited(images(), labels, [generator(i) for i in range(3)], batch_size=2)
    torch.testing.assert_close(split, together, atol=1e-4, rtol=0)
    for i, (image, label) in enumerate(zip(images(), labels, strict=True)):
        torch.testing.assert_close(edited(image, label, generator(i)), together[i : i + 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_pasted_pixels_are_the_images_to_the_bit(output_type):
    pipeline, given = tiny_pipeline(), images()
    options = {"num_inference_steps": 3, "generator": generator(), "output_type": output_type}
    found = pipeline.inpaint(given, MASK, "cat", **options).images
    for image, before in zip(found, given, strict=True):
        before = np.array(before)
        after = image.permute(1, 2, 0).numpy() if output_type == "pt" else np.array(image)
        expected = before if output_type == "pil" else before.astype(np.float32) / 255
        assert np.array_equal(after[:, 4:], expected[:, 4:])
        assert not np.array_equal(after[:, :4], expected[:, :4])


def test_a_large_image_is_pasted_as_it_was_cropped():
    pipeline, image = tiny_pipeline(), gradient_image(40, 24)
    mask = torch.zeros(24, 40)  # nothing is painted anew
    found = pipeline.inpaint(image, mask, num_inference_steps=1, output_type="pt").images
    expected = pipeline.inpaint(image, mask, num_inference_steps=1, output_type="pt", paste=False).images
    assert found.shape == expected.shape == (1, 3, 8, 8)
    assert torch.equal(found, crop_images(image, 8))
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize(
    "scheduler", [None, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler]
)
def test_latents_that_are_not_marked_stay_with_every_scheduler(scheduler, strength):
    pipeline = tiny_pipeline()
    if scheduler is not None:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    options = {"num_inference_steps": 5, "strength": strength, "generator": generator(), "output_type": "latent"}
    found = pipeline.inpaint(images(), MASK, "dog", **options).images
    original = latents_of(pipeline, images())
    assert torch.equal(found[..., 2:], original[..., 2:])
    assert found.isfinite().all()
    assert not torch.isclose(found[..., :2], original[..., :2]).any()


def test_a_latent_is_painted_anew_where_one_of_its_pixels_is():
    pipeline, mask = tiny_pipeline(), torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 3, 5] = True
    found = pipeline.inpaint(images(1), mask, num_inference_steps=2, output_type="latent").images
    changed = (found != latents_of(pipeline, images(1))).any(dim=1)[0]
    assert changed.nonzero().tolist() == [[1, 2]]


def test_masks_of_every_kind_mean_the_same():
    expected = torch.from_numpy(LEFT > 0)[None, None]
    for mask in (MASK, MASK.convert("RGB"), LEFT, LEFT > 0, LEFT / 255, torch.from_numpy(LEFT)[None, None], [MASK]):
        assert torch.equal(crop_masks(mask, images(1), 8), expected)
    assert crop_masks(MASK, images(3), 8).shape == (3, 1, 8, 8)
    other = Image.fromarray(255 - LEFT)
    assert torch.equal(crop_masks([MASK, other], torch.zeros(2, 3, 8, 8), 8), torch.cat([expected, ~expected]))


# --- the flow's own noise -------------------------------------------------------------------------------------------


def test_what_was_inverted_samples_to_the_image_and_reconstruct_does_both():
    pipeline, given = steady(), images(2)
    original = latents_of(pipeline, given)

    def error(num_steps, num_refinements):
        options = {"num_inference_steps": num_steps}
        noise = pipeline.invert(given, num_refinements=num_refinements, **options)
        back = pipeline(num_images_per_label=2, latents=noise, output_type="latent", **options).images
        return float((back - original).norm() / original.norm())

    coarse, fine = error(5, 1), error(15, 1)
    assert fine < 0.5 * coarse
    assert fine < 0.5 * error(15, 0)
    found = pipeline.reconstruct(given, 5, output_type="latent").images
    assert float((found - original).norm() / original.norm()) == pytest.approx(coarse, rel=1e-3)


def test_inversion_along_a_label_samples_to_the_image_at_that_label():
    pipeline, given = steady(class_embedding=True), images()
    options = {"num_inference_steps": 8, "guidance_scale": 0.0}
    noise = pipeline.invert(given, class_labels=["cat", "dog", "cow"], **options)
    assert not torch.allclose(noise, pipeline.invert(given, num_inference_steps=8))
    back = pipeline(["cat", "dog", "cow"], latents=noise, output_type="latent", **options).images
    torch.testing.assert_close(back, latents_of(pipeline, given), atol=0.1, rtol=0)


def test_interpolation_has_the_pair_at_its_ends():
    pipeline, (a, b, c) = steady(), images()
    options = {"num_inference_steps": 3, "output_type": "pt"}
    found = pipeline.interpolate([a, b], [b, c], num_images=4, **options).images
    assert len(found) == 8
    ends = pipeline.reconstruct([a, b, b, c], **options).images
    torch.testing.assert_close(found[[0, 3, 4, 7]], ends, atol=1e-4, rtol=0)
    guided = pipeline.interpolate([a, b], [b, c], 4, ["cat", "dog"], **options, batch_size=3).images
    alone = pipeline.interpolate(b, c, 4, "dog", **options).images
    torch.testing.assert_close(guided[4:], alone, atol=1e-4, rtol=0)


def test_class_edit_goes_to_the_class_and_without_strength_nowhere():
    pipeline, given = tiny_pipeline(), images()
    options = {"num_inference_steps": 6, "guidance_scale": 8.0, "output_type": "latent"}
    found = pipeline.edit_class(given, "cow", strength=0.5, **options).images
    original = latents_of(pipeline, given)

    def log_p(latents):
        with torch.no_grad():
            return pipeline.energy_model(latents, 0).logits.log_softmax(dim=1)[:, 2]

    assert (log_p(found) > log_p(original)).all()
    assert torch.equal(found, pipeline.edit_class(given, "cow", strength=0.5, **options).images)
    assert torch.equal(pipeline.edit_class(given, "cow", strength=0.0, **options).images, original)


# --- counterfactuals ------------------------------------------------------------------------------------------------


def pixels_of(given):
    return torch.stack([torch.from_numpy(np.array(image)) for image in given]).permute(0, 3, 1, 2) / 255


def far_apart(first, second):
    return (first - second).flatten(1).norm(dim=1)


def counterfactual(pipeline, given, **options):
    options = {"num_inference_steps": 6, "output_type": "pt"} | options
    return pipeline.counterfactual(given, **options)


def test_counterfactuals_say_what_became_of_the_images():
    """In pixel space; a random autoencoder loses whatever there is to say."""
    pipeline, given = tiny_pipeline(vae=False, in_channels=3, sample_size=8), images(6)
    for parameter in pipeline.energy_model.parameters():
        parameter.data *= 2  # of one class for some images, of another for others
    output = counterfactual(pipeline, given, guidance_scale=1.0, num_doublings=2)
    before, after = pipeline.classify(given, top_k=2), pipeline.classify(output.images)
    assert [[b, a] for b, a in zip(output.labels_before, output.labels_asked, strict=True)] == before.labels
    assert output.labels_after == [labels[0] for labels in after.labels]
    expected = [a == w for a, w in zip(output.labels_after, output.labels_asked, strict=True)]
    assert output.flipped.tolist() == expected
    assert 0 < output.flipped.sum() < 6
    assert {1.0, 4.0} <= set(output.guidance_scales.tolist()) <= {1.0, 2.0, 4.0}
    assert (output.guidance_scales[~output.flipped] == 4).all()
    torch.testing.assert_close(output.pixel_distance, far_apart(output.images, pixels_of(given)))
    assert output.autoencoder_distance.max() < 1e-5
    alone = counterfactual(pipeline, given[2], guidance_scale=1.0, num_doublings=2)
    torch.testing.assert_close(alone.images, output.images[2:3], atol=1e-4, rtol=0)


def test_distances_of_counterfactuals_through_an_autoencoder():
    pipeline, given = tiny_pipeline(), images(2)
    options = {"num_doublings": 0, "num_inference_steps": 3}
    output = counterfactual(pipeline, given, **options)
    decoded = pipeline.image_to_image(given, strength=0.0, output_type="pt").images
    torch.testing.assert_close(output.autoencoder_distance, far_apart(decoded, pixels_of(given)))
    torch.testing.assert_close(output.pixel_distance, far_apart(output.images, pixels_of(given)))
    latents = counterfactual(pipeline, given, output_type="latent", **options).images
    torch.testing.assert_close(output.latent_distance, far_apart(latents, latents_of(pipeline, given)))


def test_held_more_strongly_they_stay_nearer():
    pipeline, given = tiny_pipeline(), images(2)
    options = {"num_doublings": 0, "guidance_scale": 4.0, "num_inference_steps": 5}
    far = [counterfactual(pipeline, given, distance_scale=s, **options).latent_distance for s in (0, 1, 8, 1e6)]
    means = [float(f.mean()) for f in far]
    assert means == sorted(means, reverse=True)
    assert means[-1] < 0.02 * means[0]
    loose = pipeline.edit_class(
        given, "cat", strength=0.8, num_inference_steps=5, guidance_scale=4.0, output_type="latent"
    )
    held = counterfactual(pipeline, given, class_labels="cat", distance_scale=0, output_type="latent", **options)
    assert torch.equal(held.images, loose.images)


def test_what_is_of_the_class_already_is_not_called_flipped():
    pipeline, given = tiny_pipeline(), images()
    said = [labels[0] for labels in pipeline.classify(given).labels]
    output = counterfactual(pipeline, given, class_labels=said)
    assert output.labels_asked == output.labels_before == said
    assert not output.flipped.any()


# --- all of them ----------------------------------------------------------------------------------------------------

CALLS = {
    "image_to_image": (lambda p, given: p.image_to_image(given, "cat", 0.5, 4, output_type="pt").images, 2),
    "inpaint": (lambda p, given: p.inpaint(given, MASK, "cat", 0.5, 4, output_type="pt").images, 2),
    "invert": (lambda p, given: p.invert(given, 4), 2 * 4),
    "reconstruct": (lambda p, given: p.reconstruct(given, 4, output_type="pt").images, 3 * 4),
    "interpolate": (
        lambda p, given: p.interpolate(given, given, 2, None, 4, output_type="pt", batch_size=9).images,
        4 * 4 + 4,
    ),
    "edit_class": (lambda p, given: p.edit_class(given, "cat", 0.5, 4, output_type="pt").images, 3 * 2),
    # Held so near that nothing flips.
    "counterfactual": (
        lambda p, given: (
            p.counterfactual(given, 0, 0.5, 1e6, num_doublings=1, num_inference_steps=4, output_type="pt").images
        ),
        (3 + 1) * 2 + 2 + 1,
    ),
}


@pytest.mark.parametrize("method", CALLS)
def test_cost_in_network_passes_is_as_documented(method, monkeypatch):
    """And images come in one and many, on the device, in float32 whatever the weights' type, with a progress bar."""
    pipeline = tiny_pipeline()
    call, passes = CALLS[method]
    said = [labels[0] for labels in pipeline.classify(images(6)).labels]
    given = [image for image, label in zip(images(6), said, strict=True) if label != "cat"][:2]
    assert len(given) == 2
    network, found, bars = pipeline.energy_model.network, [], []
    progress_bar = pipeline.progress_bar
    monkeypatch.setattr(pipeline.energy_model, "network", lambda *arguments: found.append(1) or network(*arguments))
    monkeypatch.setattr(
        type(pipeline), "progress_bar", lambda self, *a, **options: bars.append(1) or progress_bar(*a, **options)
    )
    result = call(pipeline, given)
    assert len(found) == passes
    assert bars
    assert result.dtype == torch.float32
    one = call(pipeline, given[0])
    assert len(one) * 2 == len(result)
    half = call(tiny_pipeline().to(torch.bfloat16), given)
    assert half.dtype == torch.float32
    assert half.shape == result.shape


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("image_to_image", {"strength": 1.5}, r"strength must be in \[0, 1\], got 1.5"),
        ("image_to_image", {"strength": float("nan")}, "strength"),
        ("image_to_image", {"class_labels": "cta"}, "did you mean 'cat'"),
        ("image_to_image", {"class_labels": ["cat", "dog"]}, "class_labels must be one or one for each of 3 images"),
        ("image_to_image", {"guidance_scale": 2.0}, "guidance_scale=2.0 needs class_labels"),
        ("image_to_image", {"generator": [generator()]}, "generator must be one or a list of 3"),
        ("image_to_image", {"num_inference_steps": 0}, "num_inference_steps"),
        ("image_to_image", {"output_type": "jpeg"}, "output_type"),
        ("image_to_image", {"batch_size": 0}, "batch_size"),
        ("image_to_image", {"guidance_interval": (1, 0)}, "guidance_interval"),
        ("inpaint", {"mask_image": torch.zeros(9, 8)}, r"mask_image must be as large as its image, \(8, 8\)"),
        ("inpaint", {"mask_image": torch.zeros(3, 8, 8)}, r"mask_image must be \(H, W\) or \(1, H, W\)"),
        ("inpaint", {"mask_image": [MASK, MASK]}, "mask_image must be one or one for each of 3 images, got 2"),
        ("invert", {"class_labels": "cat"}, "guidance_scale=0 would ignore class_labels"),
        ("invert", {"num_refinements": -1}, "num_refinements must be at least 0"),
        ("interpolate", {"num_images": 1}, "num_images must be at least 2"),
        ("interpolate", {"image_b": images(2)}, "image_b must be as many images as image_a, 3, got 2"),
        ("edit_class", {"class_labels": None}, "needs class_labels"),
        ("counterfactual", {"distance_scale": -1.0}, "distance_scale must be finite and not negative"),
        ("counterfactual", {"num_doublings": -1}, "num_doublings must be at least 0"),
        ("counterfactual", {"guidance_scale": 0.0}, "guidance_scale=0"),
    ],
)
def test_bad_calls_name_the_argument(method, arguments, message):
    own = {
        "image_to_image": {"image": images()},
        "inpaint": {"image": images(), "mask_image": MASK},
        "invert": {"images": images()},
        "interpolate": {"image_a": images(), "image_b": images()},
        "edit_class": {"image": images(), "class_labels": "cat"},
        "counterfactual": {"images": images()},
    }[method]
    with pytest.raises(ValueError, match=message):
        getattr(tiny_pipeline(), method)(**(own | {"num_inference_steps": 1} | arguments))


def test_a_model_without_classes_edits_but_has_no_class_to_go_to():
    pipeline = tiny_pipeline(num_classes=None, energy_channels=3)
    assert pipeline.image_to_image(images(1), num_inference_steps=2, output_type="pt").images.shape == (1, 3, 8, 8)
    for call in (lambda: pipeline.counterfactual(images(1)), lambda: pipeline.edit_class(images(1), 0)):
        with pytest.raises(ValueError, match="trained without classes"):
            call()
