"""The mathematics of the energy network, against finite differences, hand computation and float64."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from tiny import TINY_BACKBONES, tiny_unet

from latent_egc import EGCUNet
from latent_egc.models import EnergyOutput, input_gradient
from latent_egc.models.heads import attention_pool
from latent_egc.models.noise_schedule import noise_schedule

VARIANTS = [
    {"head": head, "gaussian_part": gaussian, "class_embedding": embedding}
    for head in ("map", "inner")
    for gaussian in (True, False)
    for embedding in (True, False)
]


@pytest.fixture(params=TINY_BACKBONES)
def tiny(request):
    """Makes a tiny energy network of each backbone."""
    return TINY_BACKBONES[request.param]


def inputs(dtype=torch.float32, num_rows=3, size=4):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(num_rows, 2, size, size, generator=generator, dtype=torch.float64).to(dtype)
    timesteps = torch.tensor([10, 400, 990])[:num_rows]
    labels = torch.tensor([2, 0, 1])[:num_rows]
    return latents, timesteps, labels


def epsilon_and_output(model, latents, timesteps, labels=None, **scales):
    """epsilon with the energy at the labels and the logits of the pass that it differentiated."""
    epsilon, outputs = input_gradient(model.potential(labels, **scales), latents, timesteps)
    return epsilon, EnergyOutput(outputs[0].energy, outputs[-1].logits)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("guidance_scale", [0.0, 3.0])
def test_epsilon_equals_finite_differences(tiny, variant, guidance_scale):
    model = tiny(**variant).double()
    latents, timesteps, labels = inputs(torch.float64)
    _, sigma = model.noise_levels(timesteps)

    def potential(z):
        output = model(z, timesteps, labels)
        log_p_y = F.log_softmax(output.logits, dim=1)[torch.arange(3), labels]
        return output.energy - guidance_scale * sigma * log_p_y

    step, numeric = 1e-5, torch.empty_like(latents)
    with torch.no_grad():
        for i in range(latents[0].numel()):
            change = torch.zeros_like(latents[0]).flatten()
            change[i] = step
            change = change.view_as(latents[0])
            # Every row moves along the same coordinate at once: rows do not see each other.
            numeric.view(3, -1)[:, i] = (potential(latents + change) - potential(latents - change)) / (2 * step)
        epsilon = model.epsilon(latents, timesteps, labels, guidance_scale=guidance_scale)
    assert (epsilon - numeric).norm() <= 1e-6 * numeric.norm()


@pytest.mark.parametrize("variant", [{"head": "map"}, {"head": "inner", "class_embedding": True}], ids=str)
def test_gradgradcheck(tiny, variant):
    model = tiny(**variant).double()
    latents, timesteps, labels = inputs(torch.float64, num_rows=1)
    latents.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: model(z, timesteps, labels).energy.sum(), latents, atol=1e-6)


@pytest.mark.parametrize("variant", [{"head": "map"}, {"head": "inner"}], ids=str)
def test_parameter_gradients_of_epsilon(tiny, variant):
    """The second derivative that training needs: a random parameter direction against finite differences."""
    model = tiny(**variant).double()
    latents, timesteps, _ = inputs(torch.float64)

    def loss():
        return model.epsilon(latents, timesteps).square().sum()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), directions, strict=True))
    values, step = [], 1e-6
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, direction in zip(model.parameters(), directions, strict=True):
                parameter += sign * step * direction
            values.append(loss())
    assert torch.isclose(slope, (values[0] - values[1]) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS[:4:3] + VARIANTS[4::3], ids=str)
def test_guided_epsilon_is_the_sum_of_its_parts(tiny, variant):
    model = tiny(**variant).double()
    latents, timesteps, labels = inputs(torch.float64)
    _, sigma = model.noise_levels(timesteps)
    z = latents.clone().requires_grad_()
    log_p_y = F.log_softmax(model(z, timesteps, labels).logits, dim=1)[torch.arange(3), labels]
    (classifier_part,) = torch.autograd.grad(log_p_y.sum(), z)
    expected = model.epsilon(latents, timesteps, labels) - 2.5 * sigma.view(3, 1, 1, 1) * classifier_part
    guided = model.epsilon(latents, timesteps, labels, guidance_scale=2.5)
    torch.testing.assert_close(guided, expected, rtol=1e-10, atol=1e-10)


def test_joint_of_the_inner_head_is_the_papers():
    """log p(z, y) = -<z, h> / (2 sigma) + logits[y] (+ the Gaussian part): the label's evidence cancels."""
    model = tiny_unet(head="inner", gaussian_part=True).double()
    latents, timesteps, _ = inputs(torch.float64)
    alpha, sigma = model.noise_levels(timesteps)
    output = model(latents, timesteps)
    field, logits = model.network(latents, timesteps, None)
    joint = -(output.energy / sigma)[:, None] + output.logits.log_softmax(dim=1)
    inner = (latents * field).sum(dim=(1, 2, 3))
    expected = -(alpha / sigma * inner / 2 + latents.square().sum(dim=(1, 2, 3)) / 2)[:, None] + logits
    torch.testing.assert_close(joint, expected)


def test_inner_head_of_a_linear_symmetric_field_gives_the_field(monkeypatch):
    """The warm start: a noise predictor that is linear and symmetric in z is its own epsilon."""
    model = tiny_unet(head="inner", gaussian_part=False, num_classes=None).double()
    latents, timesteps, _ = inputs(torch.float64)
    matrix = torch.randn(32, 32, dtype=torch.float64)
    matrix = matrix + matrix.T

    def linear(z, timesteps, embedded_labels):
        return (z.flatten(1) @ matrix).view_as(z), None

    monkeypatch.setattr(model, "network", linear)
    torch.testing.assert_close(model.epsilon(latents, timesteps), linear(latents, 0, None)[0])


@pytest.mark.parametrize("head", ["map", "inner"])
def test_fresh_network_is_the_optimum_for_white_gaussian_data(tiny, head):
    """z_0 ~ N(0, I) has z_t ~ N(0, I) and the optimal epsilon sigma_t z; its logits say nothing."""
    model = tiny(randomise=False, head=head, gaussian_part=True)
    latents, timesteps, labels = inputs()
    _, sigma = model.noise_levels(timesteps)
    epsilon, output = epsilon_and_output(model, latents, timesteps, labels, guidance_scale=1.0)
    torch.testing.assert_close(epsilon, sigma.view(3, 1, 1, 1) * latents)
    torch.testing.assert_close(output.logits.softmax(dim=1), torch.full((3, 3), 1 / 3))


@pytest.mark.parametrize("head", ["map", "inner"])
@pytest.mark.parametrize("tiny", TINY_BACKBONES.values(), ids=TINY_BACKBONES)
def test_logmeanexp_moves_energies_by_a_constant_and_nothing_else(tiny, head):
    plain, pooled = tiny(head=head).double(), tiny(head=head, energy_pooling="logmeanexp").double()
    latents, timesteps = torch.randn(4, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 300, 600, 999])
    alpha, sigma = plain.noise_levels(timesteps)
    constant = {"map": 16 * math.log(3) * alpha, "inner": math.log(3) * sigma}[head]
    expected, found = plain(latents, timesteps), pooled(latents, timesteps)
    torch.testing.assert_close(found.energy, expected.energy + constant)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(pooled.epsilon(latents, timesteps), plain.epsilon(latents, timesteps))
    assert EGCUNet.from_config({"num_classes": 3, "in_channels": 2}).config.energy_pooling == "logsumexp"


def test_attention_pool_by_hand():
    energy_map = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    for row, pooled in zip(energy_map, attention_pool(energy_map), strict=True):
        positions = row.flatten(1).T
        tokens = torch.cat([positions.mean(0, keepdim=True), positions])
        expected = (tokens @ tokens.T / math.sqrt(3)).softmax(dim=-1) @ tokens
        torch.testing.assert_close(pooled, expected[0])


@pytest.mark.parametrize("variant", [{"head": "map"}, {"head": "inner", "class_embedding": True}], ids=str)
def test_epsilon_under_no_grad_and_inference_mode(tiny, variant):
    model = tiny(**variant)
    latents, timesteps, labels = inputs()
    expected = model.epsilon(latents, timesteps, labels, guidance_scale=2.0)
    assert expected.requires_grad
    # Inference mode first: what it leaves behind must not harm what follows.
    fresh = tiny(**variant)
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            epsilon = fresh.epsilon(latents, timesteps, labels, guidance_scale=2.0)
        assert not epsilon.requires_grad
        torch.testing.assert_close(epsilon, expected.detach(), rtol=1e-4, atol=1e-5)
    fresh.epsilon(latents, timesteps, labels).sum().backward()


@pytest.mark.parametrize("variant", VARIANTS[:5:4], ids=str)
def test_half_precision(tiny, variant):
    """bf16 weights, and autocast: energy and logits in float32, epsilon in the latents' type, all near float32's."""
    model = tiny(**variant)
    latents, timesteps, labels = inputs()
    with torch.no_grad():
        expected, output = epsilon_and_output(model, latents, timesteps, labels)
        with torch.autocast("cpu", torch.bfloat16):
            autocast, autocast_output = epsilon_and_output(model, latents, timesteps, labels)
        model.to(torch.bfloat16)
        half, half_output = epsilon_and_output(model, latents, timesteps, labels)
        lowest = model.epsilon(latents.bfloat16(), timesteps, labels)
    assert lowest.dtype == torch.bfloat16
    for epsilon, result in ((autocast, autocast_output), (half, half_output)):
        assert epsilon.dtype == result.energy.dtype == result.logits.dtype == torch.float32
        assert (epsilon - expected).norm() < 0.1 * expected.norm()
        assert (result.energy - output.energy).norm() < 0.1 * output.energy.norm()


def test_float64_is_never_downcast(tiny):
    model = tiny().double()
    latents, timesteps, _ = inputs(torch.float64)
    epsilon, output = epsilon_and_output(model, latents, timesteps)
    assert epsilon.dtype == output.energy.dtype == output.logits.dtype == torch.float64
    assert model.alphas_cumprod.dtype == torch.float64


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_noise_schedule_is_diffusers(schedule):
    scheduler = DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule=schedule)
    assert torch.equal(noise_schedule(1000, 0.00085, 0.012, schedule, torch.float32), scheduler.alphas_cumprod)
    assert torch.equal(tiny_unet(beta_schedule=schedule).to(torch.bfloat16).alphas_cumprod, scheduler.alphas_cumprod)


def test_noise_schedule_follows_the_weights_type_and_no_half_type_ruins_it():
    model = tiny_unet()
    in_float32 = model.alphas_cumprod
    assert in_float32.dtype == torch.float32
    assert model.double().alphas_cumprod.dtype == torch.float64
    assert (model.alphas_cumprod - in_float32).abs().max() > 1e-9  # made anew, not cast
    assert torch.equal(model.to(torch.bfloat16).alphas_cumprod, in_float32)


def test_float_timesteps_interpolate_log_sigma_as_diffusers():
    model = tiny_unet().double()
    integers = torch.tensor([0, 7, 500, 999])
    for exact, interpolated in zip(model.noise_levels(integers), model.noise_levels(integers.double()), strict=True):
        torch.testing.assert_close(exact, interpolated)
    config = model.config
    scheduler = EulerDiscreteScheduler(
        beta_start=config.beta_start, beta_end=config.beta_end, beta_schedule="linear", use_karras_sigmas=True
    )
    scheduler.set_timesteps(7)
    alpha, sigma = model.noise_levels(scheduler.timesteps.double())
    torch.testing.assert_close((sigma / alpha).float(), scheduler.sigmas[:-1], rtol=1e-3, atol=0)
    latents, _, _ = inputs()
    float_model = tiny_unet()
    torch.testing.assert_close(float_model.epsilon(latents, 500), float_model.epsilon(latents, torch.tensor(500.0)))
    assert not torch.equal(float_model.epsilon(latents, 500.0), float_model.epsilon(latents, 500.5))


@pytest.mark.parametrize("variant", VARIANTS[:5:4], ids=str)
def test_rows_do_not_see_each_other(tiny, variant):
    """Batch size 1 gives what the same row gives in a batch."""
    model = tiny(**variant).double()
    latents, timesteps, labels = inputs(torch.float64)
    together, output = epsilon_and_output(model, latents, timesteps, labels, guidance_scale=1.0)
    for i in range(3):
        row = slice(i, i + 1)
        alone, alone_output = epsilon_and_output(model, latents[row], timesteps[row], labels[row], guidance_scale=1.0)
        torch.testing.assert_close(alone, together[row])
        torch.testing.assert_close(alone_output.energy, output.energy[row])


@pytest.mark.parametrize("head", ["map", "inner"])
def test_class_embedding_moves_the_energy_but_not_the_logits(tiny, head):
    model = tiny(head=head, class_embedding=True).double()
    latents, timesteps, labels = inputs(torch.float64)
    null, conditional = model(latents, timesteps), model(latents, timesteps, labels)
    torch.testing.assert_close(null.logits, conditional.logits)
    assert not torch.allclose(null.energy, conditional.energy)
    torch.testing.assert_close(null.energy, model(latents, timesteps, torch.full((3,), -1)).energy)
    # The label of the energy and the label of the classifier's gradient are two arguments.
    other = (labels + 1) % 3
    guided = model.epsilon(latents, timesteps, labels, guidance_labels=other, guidance_scale=1.0)
    difference = model.epsilon(latents, timesteps, guidance_labels=other, guidance_scale=1.0) - model.epsilon(
        latents, timesteps
    )
    torch.testing.assert_close(guided, model.epsilon(latents, timesteps, labels) + difference)


@pytest.mark.parametrize("head", ["map", "inner"])
def test_classifier_free_guidance_is_the_difference_of_two_passes(tiny, head):
    model = tiny(head=head, class_embedding=True).double()
    latents, timesteps, labels = inputs(torch.float64)
    null, conditional = model.epsilon(latents, timesteps), model.epsilon(latents, timesteps, labels)
    classifier = model.epsilon(latents, timesteps, guidance_labels=labels, guidance_scale=2.0) - null
    for scale in (0.0, 1.0, 3.5):
        found = model.epsilon(latents, timesteps, labels, classifier_free_scale=scale)
        torch.testing.assert_close(found, null + scale * (conditional - null))
        both = model.epsilon(latents, timesteps, labels, classifier_free_scale=scale, guidance_scale=2.0)
        torch.testing.assert_close(both, found + classifier)


def count_rows(model, monkeypatch) -> list[int]:
    """The rows of each forward pass of `model` from now on."""
    rows, network = [], model.network

    def counting(noisy_latents, *arguments, **options):
        rows.append(len(noisy_latents))
        return network(noisy_latents, *arguments, **options)

    monkeypatch.setattr(model, "network", counting)
    return rows


@pytest.mark.parametrize(
    ("scales", "passes"),
    [
        ({}, [3]),  # the energy at the label alone
        ({"guidance_scale": 2.0}, [6]),  # the classifier does not see the label that the energy sees
        ({"classifier_free_scale": 3.0}, [6]),
        ({"guidance_scale": 2.0, "classifier_free_scale": 3.0}, [6]),
        ({"guidance_scale": 2.0, "classifier_free_scale": 0.0}, [3]),  # the classifier alone
    ],
)
@pytest.mark.parametrize("head", ["map", "inner"])
def test_epsilon_is_one_pass_of_the_rows_it_needs(tiny, head, scales, passes, monkeypatch):
    model = tiny(head=head, class_embedding=True)
    latents, timesteps, labels = inputs()
    with torch.no_grad():
        expected, output = epsilon_and_output(model, latents, timesteps, labels, **scales)
        rows = count_rows(model, monkeypatch)
        torch.testing.assert_close(model.epsilon(latents, timesteps, labels, **scales), expected)
    assert rows == passes
    assert output.logits.shape == (3, 3)


def test_labels_are_ignored_without_an_embedding(tiny):
    model = tiny()
    latents, timesteps, labels = inputs()
    torch.testing.assert_close(model(latents, timesteps).energy, model(latents, timesteps, labels).energy)


@pytest.mark.parametrize("variant", [{"head": "map", "energy_channels": 5}, {"head": "inner"}], ids=str)
def test_unlabelled_model(tiny, variant):
    model = tiny(num_classes=None, **variant)
    latents, timesteps, labels = inputs()
    output = model(latents, timesteps)
    assert output.logits is None
    assert output.energy.shape == (3,)
    assert model.epsilon(latents, timesteps).shape == latents.shape
    with pytest.raises(ValueError, match="num_classes=None"):
        model.epsilon(latents, timesteps, labels, guidance_scale=1.0)


def test_channels_of_an_unlabelled_map_start_different():
    model = tiny_unet(randomise=False, num_classes=None, energy_channels=2)
    assert not torch.equal(*model.conv_out.weight)


@pytest.mark.parametrize("size", [2, 6])
def test_other_latent_sizes(size):
    latents, timesteps, _ = inputs(size=size)
    assert tiny_unet().epsilon(latents, timesteps).shape == latents.shape


def test_save_and_load(tmp_path):
    model = tiny_unet(class_embedding=True)
    model.save_pretrained(tmp_path)
    again = EGCUNet.from_pretrained(tmp_path)
    assert dict(again.config).items() >= {"sample_size": 4, "class_embedding": True}.items()
    assert torch.equal(model.epsilon(*inputs()), again.epsilon(*inputs()))
    assert EGCUNet.from_pretrained(tmp_path, torch_dtype=torch.float64).alphas_cumprod.dtype == torch.float64


def attended(model):
    return [level for level, blocks in enumerate(model.down_blocks) if blocks[0].attention is not None]


@pytest.mark.parametrize(("num_levels", "levels"), [(1, []), (2, [1]), (3, [1, 2]), (4, [2, 3]), (5, [3, 4])])
def test_attention_by_default_is_at_the_two_deepest_levels_but_the_finest(num_levels, levels):
    size = 2**num_levels
    model = tiny_unet(block_out_channels=(4,) * num_levels, attention_levels=None, sample_size=size)
    assert attended(model) == attended(tiny_unet(**dict(model.config) | {"attention_levels": levels})) == levels
    assert model(torch.zeros(1, 2, size, size), torch.zeros(1, dtype=torch.long)).logits.shape == (1, 3)


def test_attention_of_a_stored_network_does_not_depend_on_the_default(tmp_path):
    """What is saved names it; with three levels a config.json that does not is what it was under the default (1, 2)."""
    for levels in ((0,), (), (1, 2), None):
        model = tiny_unet(block_out_channels=(4, 4, 4), attention_levels=levels)
        model.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())
        assert stored["attention_levels"] == (None if levels is None else list(levels))
        assert attended(EGCUNet.from_pretrained(tmp_path)) == attended(model)
    del stored["attention_levels"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert attended(EGCUNet.from_pretrained(tmp_path)) == [1, 2]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"head": "outer"}, "head must be 'map' or 'inner', got 'outer'"),
        ({"num_classes": 1}, "num_classes"),
        ({"num_classes": None}, "energy_channels"),
        ({"energy_pooling": "mean"}, "energy_pooling must be one of logsumexp, logmeanexp, got 'mean'"),
        ({"energy_channels": 7}, "energy_channels must be num_classes=3"),
        ({"head": "inner", "energy_channels": 3}, "energy_channels"),
        ({"num_classes": None, "energy_channels": 4, "class_embedding": True}, "class_embedding"),
        ({"norm_num_groups": 3}, "norm_num_groups"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"attention_levels": (2,)}, "attention_levels"),
        ({"sample_size": 5}, "sample_size must be divisible by 2, got 5"),
        ({"beta_schedule": "cosine"}, "beta_schedule"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start"),
    ],
)
def test_bad_config_names_the_field(config, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet(**config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noisy_latents": torch.zeros(3, 4, 4, 4)}, r"noisy_latents must be \(N, 2, h, w\)"),
        ({"noisy_latents": torch.zeros(3, 2, 5, 4)}, "divisible by 2, got 5 x 4"),
        ({"timesteps": torch.tensor([0, 1])}, "timesteps"),
        ({"timesteps": torch.tensor([0, 1, 1000])}, r"timesteps must be in \[0, 1000\), got 0 to 1000"),
        ({"timesteps": -1}, "timesteps"),
        ({"class_labels": torch.tensor([0, 1, 3])}, r"class_labels must be in \[-1, 3\), got 0 to 3"),
        ({"class_labels": torch.tensor([0, 1])}, r"class_labels must be \(3,\) int64"),
        ({"guidance_labels": torch.tensor([0, 1, -1]), "guidance_scale": 1.0}, "guidance_labels"),
        ({"class_labels": None, "guidance_scale": 1.0}, "guidance_labels"),
        ({"class_labels": None, "classifier_free_scale": 2.0}, "classifier_free_scale=2.0 needs class_labels"),
    ],
)
def test_bad_input_names_the_argument(tiny, change, message):
    latents, timesteps, labels = inputs()
    arguments = {"noisy_latents": latents, "timesteps": timesteps, "class_labels": labels} | change
    with pytest.raises(ValueError, match=message):
        tiny(class_embedding=True).epsilon(**arguments)
