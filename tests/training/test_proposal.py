"""The proposed run: it fits the images, the latents and the memory."""

import numpy as np
import pytest
from tiny import tiny_kl

from latent_egc.config import ConfigError
from latent_egc.data.inspection import Inspection
from latent_egc.training.proposal import Machine, plain_values, propose

CPU = Machine("cpu", 16 * 2**30, bf16=False)
GPU = Machine("cuda", 80 * 2**30, bf16=True)


def found(num_train=4000, classes=("cat", "dog"), side=300, unreadable=0) -> Inspection:
    counts = dict.fromkeys(classes, num_train // max(1, len(classes)))
    sizes = np.full((10, 2), side)
    return Inspection({"dataset": "digits"}, counts, num_train, num_train // 4, 0, sizes, unreadable)


def kl(factor: int):
    """An autoencoder of a factor, for its shapes alone."""
    levels = factor.bit_length()
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return tiny_kl(4, block_out_channels=(2,) * levels, **kinds)


def proposed(images=None, machine=CPU, factor=8, size=None):
    return propose(images or found(), "my photos", machine, "an/autoencoder", kl(factor), size)


def test_small_photographs_on_a_cpu_get_the_settings_that_are_known_to_train():
    proposal = proposed()
    config = proposal.config
    assert config.model["block_out_channels"] == (96, 192)
    assert (config.data.image_size, proposal.shape) == (64, (4, 8, 8))
    assert (config.objective.classification_weight, config.objective.label_smoothing) == (0.2, 0.1)
    training = config.training
    assert (training.train_batch_size, training.learning_rate, training.ema_decay) == (48, 6e-4, 0.995)
    assert (training.max_steps, training.warmup_steps, training.lr_schedule) == (850, 42, "cosine")
    assert (config.sampling.guidance_scale, config.sampling.num_inference_steps) == (4.0, 15)
    assert (config.output_dir, config.data.latent_cache) == ("runs/my_photos64", "runs/my_photos64_latents")


@pytest.mark.parametrize("machine", [CPU, GPU])
@pytest.mark.parametrize(("factor", "size"), [(8, None), (8, 16), (8, 72), (8, 256), (32, None), (4, 256)])
def test_the_network_fits_any_latents(machine, factor, size):
    """Also those that cannot be halved: it is made, without its numbers, to estimate its memory."""
    proposal = proposed(machine=machine, factor=factor, size=size)
    assert proposal.memory.num_parameters > 0
    for section in proposal.choices.values():
        assert all(choice.reason for choice in (section.values() if isinstance(section, dict) else [section]))


def test_the_size_follows_the_images_and_the_machine():
    assert proposed(found(side=40)).config.data.image_size == 64  # not below 8x8 latents
    assert proposed(found(side=100)).config.data.image_size == 64
    assert proposed(found(side=140), GPU).config.data.image_size == 128
    assert proposed(found(side=3000), GPU).config.data.image_size == 256
    pixels = propose(found(side=300), "a", CPU, None, None, None)
    assert (pixels.config.data.image_size, pixels.config.data.latent_cache) == (32, None)
    assert pixels.config.objective.timestep_log_normal == (-1.2, 1.2)
    assert proposed().config.objective.timestep_log_normal == (-0.5, 1.2)


def test_width_and_steps_follow_the_number_of_images():
    assert proposed(found(200)).config.model["block_out_channels"][0] == 64
    assert proposed(found(2_000_000)).config.model["block_out_channels"][0] == 96
    assert proposed(found(2_000_000), GPU).config.model["block_out_channels"][0] == 192
    steps = [proposed(found(n), GPU).config.training.max_steps for n in (10, 20_000, 2_000_000)]
    assert steps == [2000, 15650, 200_000]
    assert proposed(found(10)).config.training.train_batch_size == 10


def test_little_memory_makes_smaller_batches_then_a_narrower_network_then_an_error():
    need = proposed().memory
    batch = proposed(machine=Machine("cpu", int(1.2 * (need.state + need.activations)), False)).config
    assert (batch.training.train_batch_size, batch.model["block_out_channels"][0]) == (24, 96)
    narrow = proposed(machine=Machine("cpu", need.state, False)).config
    assert narrow.model["block_out_channels"][0] < 96
    with pytest.raises(ConfigError, match=r"data\.image_size=64: the smallest network would need .* are free on cpu"):
        proposed(machine=Machine("cpu", 2**20, False))


@pytest.mark.parametrize("classes", [(), ("cat",)])
def test_without_two_classes_the_model_is_unlabelled(classes):
    proposal = proposed(found(classes=classes))
    assert proposal.config.model["num_classes"] is None
    assert proposal.config.model["energy_channels"] == 64
    values = plain_values(proposal.choices)
    assert "objective" not in values
    assert "guidance_scale" not in values["sampling"]


def test_unreadable_images_are_skipped_and_an_accelerator_multiplies_in_bf16():
    assert proposed(found(unreadable=2)).config.data.skip_corrupt
    assert proposed(machine=GPU).config.training.mixed_precision == "bf16"
    with pytest.raises(ConfigError, match=r"data\.image_size must be divisible"):
        proposed(size=60)


def test_photographs_are_mirrored_and_characters_are_not():
    assert proposed().config.data.horizontal_flip
    assert not proposed(found(classes=("3", "8"))).config.data.horizontal_flip
