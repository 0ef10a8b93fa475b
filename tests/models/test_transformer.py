"""EGCTransformer: what is its own; the mathematics is tested in test_energy.py for every backbone."""

import pytest
import torch
from tiny import tiny_transformer, tiny_unet

from latent_egc import EGCTransformer, EGCUNet


def test_patches_return_to_their_place():
    """Head "inner", with blocks that are shut: the field at a position depends on its own patch only."""
    model = tiny_transformer(head="inner", num_classes=None, gaussian_part=False, sample_size=8)
    for block in model.blocks:
        torch.nn.init.zeros_(block.modulation.weight)
        torch.nn.init.zeros_(block.modulation.bias)
    latents = torch.randn(1, 2, 8, 8)
    changed = latents.clone()
    changed[0, 1, 2, 5] += 1.0
    timesteps = torch.tensor([100])
    fields = [model.network(z, timesteps, None)[0] for z in (latents, changed)]
    moved = (fields[0] - fields[1]).abs().sum(dim=(0, 1)) > 1e-6
    assert moved[2:4, 4:6].all()
    assert moved.sum() == 4


def test_starts_as_the_optimum_for_white_data():
    model = tiny_transformer(randomise=False)
    latents = torch.randn(2, 2, 4, 4)
    _, sigma = model.noise_levels(torch.tensor([300, 300]))
    torch.testing.assert_close(model.epsilon(latents, 300), sigma[0] * latents)


def outputs_of(modules, run):
    """What these modules return while `run` is called, in its order."""
    outputs = []
    hooks = [module.register_forward_hook(lambda m, inputs, output: outputs.append(output)) for module in modules]
    run()
    for hook in hooks:
        hook.remove()
    return outputs


def test_blocks_and_skips_start_as_the_identity():
    model = tiny_transformer(randomise=False, num_layers=5)
    outputs = outputs_of([model.patch_embedding, *model.blocks], lambda: model(torch.randn(2, 2, 4, 4), 10))
    assert len(outputs) == 6
    for output in outputs:
        torch.testing.assert_close(output, outputs[0])


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_every_skip_is_used(num_layers):
    model = tiny_transformer(num_layers=num_layers)
    model.epsilon(torch.randn(2, 2, 4, 4), 10).square().sum().backward()
    assert sum(block.skip is not None for block in model.blocks) == num_layers // 2
    for block in model.blocks:
        if block.skip is not None:
            assert block.skip.weight.grad[:, model.config.width :].abs().max() > 0


@pytest.mark.parametrize("size", [(8, 8), (2, 6)])
def test_other_latent_sizes(size):
    model = tiny_transformer().eval()
    latents = torch.randn(2, 2, *size)
    assert model.epsilon(latents, 10).shape == latents.shape
    (tokens,) = outputs_of(model.blocks[:1], lambda: model(latents, 10))
    assert tokens.shape == (2, size[0] * size[1] // 4, 16)


def test_positions_matter():
    model = tiny_transformer()
    latents = torch.randn(1, 2, 4, 4)
    moved = latents.roll(2, dims=-1)  # by a whole patch
    assert not torch.allclose(model(latents, 10).energy, model(moved, 10).energy)


def test_save_and_load(tmp_path):
    model = tiny_transformer(class_embedding=True).eval()
    model.save_pretrained(tmp_path)
    loaded = EGCTransformer.from_pretrained(tmp_path)
    latents, labels = torch.randn(2, 2, 4, 4), torch.tensor([0, -1])
    torch.testing.assert_close(loaded.epsilon(latents, 7, labels), model.epsilon(latents, 7, labels))


@pytest.mark.parametrize("make", [tiny_unet, tiny_transformer])
def test_folder_of_the_other_backbone_is_refused(make, tmp_path):
    make().save_pretrained(tmp_path)
    other = EGCTransformer if make is tiny_unet else EGCUNet
    with pytest.raises(ValueError, match=f"cannot be loaded as an {other.__name__}"):
        other.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sample_size": 5}, "sample_size must be divisible by patch_size=2, got 5"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 must divide width"),
        ({"width": 18}, "width must be divisible by 4"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"head": "outer"}, "head must be"),
    ],
)
def test_bad_config(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer(**overrides)


def test_latents_must_fit_the_patches():
    with pytest.raises(ValueError, match="divisible by 2, got 5 x 4"):
        tiny_transformer()(torch.randn(1, 2, 5, 4), 0)
