"""What the demo computes."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import gradient_image
from tiny_demo import NAMES, tiny_network

from latent_egc.data.sources import CorruptImageError
from latent_egc.data.stream import noise_generator
from latent_egc.demo import network as demo
from latent_egc.demo.network import difference, enlarged, read_upload


@pytest.fixture
def network(tmp_path):
    return tiny_network(tmp_path / "images")


def test_classify_says_what_the_pipeline_does_and_where_the_energy_stands(network):
    image = gradient_image()
    found, expected = network.classify(image), network.pipeline.classify(image)
    assert list(found.probabilities) == list(NAMES)
    assert list(found.probabilities.values()) == expected.probabilities[0].tolist()
    assert found.energy == expected.energy.item()
    below = sum(energy < found.energy for energy in network.references.energies.tolist())
    assert found.percentile == pytest.approx(100 * below / 8)


def test_without_training_images_there_is_no_percentile_and_no_neighbour(tmp_path):
    network = tiny_network(tmp_path, references=False)
    assert network.classify(gradient_image()).percentile is None
    assert network.nearest(gradient_image()) == []
    assert set(network.along_noise(gradient_image()).energy["of"]) == {demo.THIS_IMAGE}


def test_the_nearest_training_image_is_itself(network):
    references = network.references
    (first, caption), *others = network.nearest(references.train.image(references.rows[3]), count=4)
    assert caption.split(" at ") == [NAMES[references.train.labels[references.rows[3]]], "0.0"]
    assert first.size == (8, 8)
    distances = [float(caption.split(" at ")[1]) for _, caption in others]
    assert len(others) == 3
    assert distances == sorted(distances)


def test_energies_and_probabilities_along_the_noise(network):
    curves, num_levels = network.along_noise(gradient_image()), len(demo.LEVELS)
    assert curves.energy["of"] == [name for name in (demo.THIS_IMAGE, demo.LOW, demo.HIGH) for _ in range(num_levels)]
    assert curves.energy["noise level"] == [*demo.LEVELS] * 3
    low, high = np.array(curves.energy["energy"]).reshape(3, num_levels)[1:]
    assert (low <= 0).all()
    assert (high >= 0).all()
    shares = np.array(curves.probabilities["probability"]).reshape(3, num_levels)
    np.testing.assert_allclose(shares.sum(axis=0), 1, rtol=1e-5)
    assert set(curves.probabilities["class"]) == set(NAMES)
    # The first level is timestep 0, its noise that of the schedule's first step, over the same draws.
    model, latents = network.pipeline.energy_model, network._latents(gradient_image())
    noise = torch.randn(demo.NUM_DRAWS, *latents.shape[1:], generator=noise_generator(0, 0))
    alpha, sigma = model.noise_levels(torch.tensor(0))
    with torch.no_grad():
        logits = model(alpha * latents + sigma * noise, 0).logits
    expected = logits.softmax(dim=1).mean(dim=0)
    found = {name: shares[i, 0] for i, name in enumerate(dict.fromkeys(curves.probabilities["class"]))}
    np.testing.assert_allclose([found[name] for name in NAMES], expected, rtol=1e-4)


def test_generating_shows_previews_and_ends_with_the_pipelines_samples(network):
    *previews, (share, images) = network.generate([0, 2], 2, 2.0, (0.0, 0.8), 4, seed=5)
    assert [share for share, _ in previews] == [0.25, 0.5, 0.75, 0.99]
    assert share == 1
    assert all(len(shown) == 4 and shown[0].size == (8, 8) for _, shown in previews)
    expected = network.pipeline(
        [0, 2],
        num_images_per_label=2,
        num_inference_steps=4,
        guidance_scale=2.0,
        guidance_interval=(0.0, 0.8),
        generator=[noise_generator(5, number) for number in range(4)],
    ).images
    for image, other in zip(images, expected, strict=True):
        assert np.array_equal(image, other)


def test_closing_a_generation_ends_it(network):
    passes, threads = [], threading.active_count()
    network.pipeline.energy_model.register_forward_hook(lambda *_: passes.append(1))
    potential = network.pipeline.energy_model.read_at
    network.pipeline.energy_model.read_at = lambda *arguments: passes.append(1) or potential(*arguments)
    generation = network.generate([], 1, 1.0, (0.0, 1.0), 200, seed=0)
    next(generation)
    generation.close()
    assert threading.active_count() == threads
    assert 0 < len(passes) < 150


def test_inpainting_keeps_what_is_not_marked(network):
    image, mask = gradient_image(8, 8), Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 8, 4))
    edited = network.inpaint(image, mask, 1, 2.0, 3, seed=0)
    (before, _), *after = edited.pictures
    assert len(after) == demo.NUM_INPAINTINGS
    for found, caption in after:
        assert caption.removeprefix("after: ") in NAMES
        assert np.array_equal(np.asarray(found)[4:], np.asarray(before)[4:])
        assert not np.array_equal(np.asarray(found)[:4], np.asarray(before)[:4])
    assert not np.array_equal(after[0][0], after[1][0])
    with pytest.raises(ValueError, match="nothing is marked"):
        network.inpaint(image, Image.new("L", (8, 8)), 1, 2.0, 3, seed=0)


def test_class_edits_and_counterfactuals_come_with_before_after_and_difference(network):
    image = gradient_image()
    edited = network.edit_class(image, 2, 0.8, 2.0, 3)
    assert [caption.partition(":")[0] for _, caption in edited.pictures] == ["before", "after", "difference"]
    assert np.array_equal(edited.pictures[1][0], network.pipeline.edit_class(image, 2, 0.8, 3, 2.0).images[0])
    with pytest.raises(ValueError, match="choose the class"):
        network.edit_class(image, None, 0.8, 2.0, 3)
    edited = network.counterfactual(image, None, 0.3, 0.8, 3)
    output = network.pipeline.counterfactual(image, num_inference_steps=3)
    assert np.array_equal(edited.pictures[1][0], output.images[0])
    assert f"It was {output.labels_before[0]}" in edited.summary
    assert f"{output.labels_after[0]}" in edited.summary


def test_a_network_without_classes_generates_and_inpaints(tmp_path):
    network = tiny_network(tmp_path / "images", num_classes=None, energy_channels=3)
    assert network.class_names == []
    *_, (_, images) = network.generate([], 2, 1.0, (0.0, 1.0), 2, seed=0)
    assert len(images) == 2
    edited = network.inpaint(gradient_image(), Image.new("L", (20, 12), 255), None, 1.0, 2, seed=0)
    assert [caption for _, caption in edited.pictures] == ["before", *["after"] * demo.NUM_INPAINTINGS]
    assert network.along_noise(gradient_image()).probabilities["class"] == []
    assert network.nearest(gradient_image(), 1)[0][1].startswith("at ")


def test_too_much_is_refused(network, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="at most 24 images are allowed here, got 26"):
        next(network.generate([0, 1], 13, 1.0, (0.0, 1.0), 4, seed=0))
    with pytest.raises(ValueError, match="at most 200 steps are allowed here, got 201"):
        next(network.generate([0], 1, 1.0, (0.0, 1.0), 201, seed=0))
    for call in (network.edit_class, network.counterfactual):
        with pytest.raises(ValueError, match="at most 200 steps"):
            call(gradient_image(), 1, 0.8, 1.0, 201)
    with pytest.raises(ValueError, match="guidance_interval"):  # raised by the thread that samples
        next(network.generate([0], 1, 1.0, (0.5, 0.4), 4, seed=0))
    gradient_image().save(tmp_path / "upload.png")
    assert read_upload(tmp_path / "upload.png").size == (20, 12)
    monkeypatch.setattr(demo, "MAX_PIXELS", 200)
    with pytest.raises(ValueError, match="at most 200 pixels are allowed here, got 240"):
        read_upload(tmp_path / "upload.png")


def test_an_upload_that_cannot_be_read_is_refused_without_its_path(tmp_path):
    path = tmp_path / "upload.png"
    for content in (b"no image", gradient_image(), None):
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            content.save(path)
            path.write_bytes(path.read_bytes()[:-40])
        else:
            path.unlink()
        with pytest.raises(CorruptImageError, match="corrupt image: the upload") as caught:
            read_upload(path)
        assert str(tmp_path) not in str(caught.value)


def test_pictures():
    image = gradient_image(8, 8)
    assert enlarged(image, 20).size == (24, 24)
    assert np.array_equal(np.asarray(enlarged(image, 20))[::3, ::3], image)
    assert enlarged(image, 8) is image
    darker = image.point(lambda value: value // 2)
    assert np.abs(np.asarray(difference(image, image)).astype(int) - 247).max() < 3  # almost white
    red, _, blue = np.asarray(difference(darker, image)).astype(int).reshape(-1, 3).T
    assert (red >= blue).all()
