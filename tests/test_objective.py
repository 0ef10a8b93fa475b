"""The loss of the design, term by term."""

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY_BACKBONES, tiny_transformer, tiny_unet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from latent_egc import EGCObjective
from latent_egc.models.numerics import twice_differentiable
from latent_egc.objective import CompiledForward


def batch(num_rows=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    latents, clean, noise = torch.randn(3, num_rows, 2, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    return latents, torch.tensor([2, 0, -1, 1])[:num_rows], clean, noise, torch.tensor([3, 300, 600, 980])[:num_rows]


@pytest.mark.parametrize("variant", [{"head": "map"}, {"head": "inner", "class_embedding": True}], ids=str)
def test_losses_by_hand(variant):
    model = tiny_unet(**variant).double()
    latents, labels, clean, noise, timesteps = batch()
    dropped = torch.tensor([True, False, False, False])
    losses = EGCObjective(model, 0.3, 0.2)(
        latents, labels, clean, noise=noise, timesteps=timesteps, label_dropped=dropped
    )

    abar = model.alphas_cumprod[timesteps]
    noisy = abar.sqrt().view(4, 1, 1, 1) * latents + (1 - abar).sqrt().view(4, 1, 1, 1) * noise
    z = noisy.clone().requires_grad_()
    embedded = torch.tensor([-1, 0, -1, 1])
    (epsilon,) = torch.autograd.grad(model(z, timesteps, embedded).energy.sum(), z)
    denoising = (epsilon - noise).square().mean()
    total = 0.0
    for rows, levels, row_timesteps in ((noisy, abar.sqrt(), timesteps), (clean, model.alphas_cumprod[:1].sqrt(), 0)):
        logits = model(rows, row_timesteps).logits
        for i, label in enumerate(labels.tolist()):
            if label >= 0:
                target = torch.full((3,), 0.2 / 3, dtype=torch.float64)
                target[label] += 0.8
                total += levels.expand(4)[i] * -(target * F.log_softmax(logits[i], dim=0)).sum()
    classification = total / 8  # all 2N rows, the unlabelled ones too
    torch.testing.assert_close(losses.denoising_loss, denoising)
    torch.testing.assert_close(losses.classification_loss, classification)
    torch.testing.assert_close(losses.loss, denoising + 0.3 * classification)


def test_gradients_of_the_loss_equal_autograd_grads_double_backward():
    model = tiny_unet().double()
    latents, labels, clean, noise, timesteps = batch()
    EGCObjective(model, 0.3)(latents, labels, clean, noise=noise, timesteps=timesteps).loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])

    model.zero_grad()
    alpha, sigma = (level.view(4, 1, 1, 1) for level in model.noise_levels(timesteps))
    z = (alpha * latents + sigma * noise).requires_grad_()
    output = model(z, timesteps)
    (epsilon,) = torch.autograd.grad(output.energy.sum(), z, create_graph=True)
    logits = torch.cat([output.logits, model(clean, 0).logits])
    weights = torch.cat([alpha.flatten(), model.noise_levels(torch.zeros(4, dtype=torch.long))[0]])
    cross_entropy = F.cross_entropy(logits, labels.repeat(2), ignore_index=-1, reduction="none")
    (F.mse_loss(epsilon, noise) + 0.3 * (weights * cross_entropy).mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (gradient - expected).norm() <= 1e-10 * expected.norm()


def weighted(dtype, backend=None, time_score_weight=0.0, **overrides):
    """The gradient and losses with soft labels, one row of which is half labelled."""
    model = tiny_transformer(**{"class_embedding": True} | overrides).to(dtype)
    latents, labels, clean, noise, timesteps = batch(dtype=dtype)
    soft = torch.tensor([[0.2, 0.8, 0.0], [1.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]], dtype=dtype)
    objective = EGCObjective(model, 0.3, 0.1, time_score_weight=time_score_weight)
    if backend is not None:
        objective.forward = CompiledForward(objective, backend=backend)
    arguments = {"clean_labels": soft, "noise": noise, "timesteps": timesteps}
    losses = objective(latents, labels, clean, **arguments)
    losses.loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()]), losses, model, soft


def test_gradients_with_soft_labels_equal_autograd_grads_double_backward():
    """Written out; float32 is close to float64."""
    gradient, losses, model, soft = weighted(torch.float64)
    model.zero_grad()
    latents, labels, clean, noise, timesteps = batch()
    abar = model.alphas_cumprod[timesteps]
    z = (abar.sqrt().view(4, 1, 1, 1) * latents + (1 - abar).sqrt().view(4, 1, 1, 1) * noise).requires_grad_()
    (epsilon,) = torch.autograd.grad(model(z, timesteps, labels).energy.sum(), z, create_graph=True)
    denoising = (epsilon - noise).square().mean()
    noisy = F.cross_entropy(
        model(z.detach(), timesteps).logits, labels, ignore_index=-1, label_smoothing=0.1, reduction="none"
    )
    one_hot = 0.9 * torch.eye(3, dtype=torch.float64) + 0.1 / 3
    clean_entropy = -(soft @ one_hot * model(clean, 0).logits.log_softmax(dim=1)).sum(dim=1)
    classification = ((abar.sqrt() * noisy).sum() + model.alphas_cumprod[0].sqrt() * clean_entropy.sum()) / 8
    torch.testing.assert_close(losses.denoising_loss, denoising)
    torch.testing.assert_close(losses.classification_loss, classification)
    (denoising + 0.3 * classification).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (gradient - expected).norm() <= 1e-10 * expected.norm()
    assert (weighted(torch.float32)[0] - expected).norm() <= 1e-5 * expected.norm()


def test_every_weight_compiles(recwarn):
    shallow = {"num_layers": 1, "class_embedding": False}  # the compiler takes a minute for the other
    shallow |= {"energy_pooling": "logmeanexp", "time_score_weight": 0.01}
    expected = weighted(torch.float64, **shallow)[0]
    gradient = weighted(torch.float32, "aot_eager", **shallow)[0]
    assert not [warning for warning in recwarn if "training.compile" in str(warning.message)]
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()


def with_time_score(dtype, recompute=False):
    """The gradient and losses with the time score, of rows at the first, an inner and the last timestep."""
    model = tiny_transformer(class_embedding=True, energy_pooling="logmeanexp").to(dtype)
    if recompute:
        model.enable_gradient_checkpointing()
    latents, labels, clean, noise, _ = batch(dtype=dtype)
    objective = EGCObjective(model, 0.3, time_score_weight=0.01)
    losses = objective(latents, labels, clean, noise=noise, timesteps=torch.tensor([0, 300, 600, 999]))
    losses.loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()]), losses, model


def test_gradients_with_the_time_score_equal_autograd_grads_double_backward():
    """Written out with one leaf u = log s, of which timestep, alpha and sigma are functions; float32 is close."""
    gradient, losses, model = with_time_score(torch.float64)
    model.zero_grad()
    latents, labels, clean, noise, timesteps = *batch()[:4], torch.tensor([0, 300, 600, 999])
    log_ratio = 0.5 * ((1 - model.alphas_cumprod) / model.alphas_cumprod).log()
    u = log_ratio[timesteps].requires_grad_()
    slopes = log_ratio.diff()[timesteps.clamp(max=998)]
    alpha, sigma = (1 + (2 * u).exp()).rsqrt(), (1 + (-2 * u).exp()).rsqrt()
    moving = timesteps + (u - u.detach()) / slopes
    z = (alpha.view(4, 1, 1, 1) * latents + sigma.view(4, 1, 1, 1) * noise).detach().requires_grad_()
    with twice_differentiable(True):
        energy, _ = model._energy_and_logits(z, moving, labels, alpha, sigma)
    epsilon, by_u = torch.autograd.grad(energy.sum(), [z, u], create_graph=True)
    along = (epsilon * z).sum(dim=(1, 2, 3))
    alpha, sigma = alpha.detach(), sigma.detach()
    found = (-(sigma**2) * along + by_u) / sigma - energy * alpha**2 / sigma + 32 * sigma**2
    off = found - (32 - noise.square().sum(dim=(1, 2, 3)))
    plain = EGCObjective(model, 0.3)(latents, labels, clean, noise=noise, timesteps=timesteps)
    torch.testing.assert_close(losses.denoising_loss, plain.denoising_loss)
    torch.testing.assert_close(losses.classification_loss, plain.classification_loss)
    expected = plain.loss + 0.01 * off.square().mean() / 64
    torch.testing.assert_close(losses.loss, expected)
    expected.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (gradient - expected).norm() <= 1e-10 * expected.norm()
    for recompute in (False, True):
        assert (with_time_score(torch.float32, recompute)[0] - expected).norm() <= 1e-4 * expected.norm()


def test_float32_gradients_equal_float64_eager():
    gradients = []
    for dtype in (torch.float64, torch.float32):
        model = tiny_unet().to(dtype)
        latents, labels, clean, noise, timesteps = batch(dtype=dtype)
        EGCObjective(model, 0.3)(latents, labels, clean, noise=noise, timesteps=timesteps).loss.backward()
        gradients.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
    assert (gradients[1] - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


def test_all_unlabelled_batch_is_finite_and_only_denoises():
    model = tiny_unet()
    latents, labels, clean, noise, timesteps = batch(dtype=torch.float32)
    losses = EGCObjective(model, 0.3)(latents, torch.full_like(labels, -1), clean, noise=noise, timesteps=timesteps)
    assert losses.classification_loss == 0
    assert losses.loss == losses.denoising_loss
    losses.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_unlabelled_model_needs_latents_only():
    losses = EGCObjective(tiny_unet(num_classes=None, energy_channels=4))(batch(dtype=torch.float32)[0])
    assert losses.classification_loss == 0
    assert losses.loss.requires_grad


def test_noise_and_timesteps_are_drawn_where_not_given():
    objective = EGCObjective(tiny_unet())
    latents, labels, clean, _, _ = batch(dtype=torch.float32)
    first, second = objective(latents, labels, clean), objective(latents, labels, clean)
    assert first.denoising_loss != second.denoising_loss


def test_drawn_timesteps_are_all_there_are(monkeypatch):
    model, drawn = tiny_unet(num_train_timesteps=3), []
    network = model.network
    monkeypatch.setattr(model, "network", lambda z, t, y: drawn.append(t) or network(z, t, y))
    latents, labels = torch.randn(100, 2, 4, 4), torch.full((100,), -1)
    EGCObjective(model)(latents, labels, latents)
    assert set(drawn[0].tolist()) == {0, 1, 2}


def test_optimal_energy_of_gaussian_data_reaches_the_known_loss():
    """z_0 ~ N(0, I): the best epsilon is sigma z, whose expected squared error is alpha^2."""
    model = tiny_unet(randomise=False)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 512, 2, 4, 4, generator=generator)
    for timestep in (100, 500, 900):
        timesteps = torch.full((512,), timestep)
        losses = EGCObjective(model)(latents, torch.full((512,), -1), latents, noise=noise, timesteps=timesteps)
        torch.testing.assert_close(losses.denoising_loss, model.alphas_cumprod[timestep], rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_labels": None}, "class_labels"),
        ({"clean_latents": None}, "clean_latents"),
        ({"class_labels": torch.tensor([0, 1, 2, 3])}, r"class_labels must be in \[-1, 3\)"),
        ({"clean_labels": torch.ones(4, 2)}, r"clean_labels must be \(4,\) int64 or \(4, 3\) floats, got \(4, 2\)"),
    ],
)
def test_bad_input(change, message):
    latents, labels, clean, _, _ = batch(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        EGCObjective(tiny_unet())(**({"latents": latents, "class_labels": labels, "clean_latents": clean} | change))


def test_bad_weights():
    with pytest.raises(ValueError, match="classification_weight"):
        EGCObjective(tiny_unet(), -1.0)
    with pytest.raises(ValueError, match="label_smoothing"):
        EGCObjective(tiny_unet(), 1.0, 1.0)
    with pytest.raises(ValueError, match="time_score_weight must not be negative"):
        EGCObjective(tiny_unet(), time_score_weight=-1.0)


def test_noisy_classification_off_dropped_rows_by_hand_and_on_average():
    """Its mean over all ways to drop labels is the loss over all rows; where none is dropped the clean part is left."""
    model = tiny_unet(class_embedding=True).double()
    latents, labels, clean, noise, timesteps = batch()
    arguments = {"clean_latents": clean, "noise": noise, "timesteps": timesteps}
    objective = EGCObjective(model, 0.3, 0.1, label_drop=0.25, noisy_classification="dropped")
    everything = EGCObjective(model, 0.3, 0.1)(latents, labels, **arguments).classification_loss
    mean = 0.0
    for number in range(2**4):
        dropped = torch.tensor([bool(number >> row & 1) for row in range(4)])
        share = torch.where(dropped, 0.25, 0.75).prod()
        mean = mean + share * objective(latents, labels, **arguments, label_dropped=dropped).classification_loss
    torch.testing.assert_close(mean, everything)
    none = objective(latents, labels, **arguments).classification_loss
    clean_part = (
        F.cross_entropy(model(clean, 0).logits, labels, ignore_index=-1, label_smoothing=0.1, reduction="sum")
        * model.alphas_cumprod[0].sqrt()
    )
    torch.testing.assert_close(none, clean_part / 8)


def test_a_part_of_the_clean_rows_counts_for_all_of_them():
    """The mean over both halves of the clean rows is the loss over all of them."""
    model = tiny_unet().double()
    latents, labels, clean, noise, timesteps = batch()
    objective, noisy = EGCObjective(model, 0.3), {"noise": noise, "timesteps": timesteps}
    halves = [
        objective(latents, labels, clean[rows], clean_labels=labels[rows], **noisy).loss
        for rows in (slice(None, None, 2), slice(1, None, 2))
    ]
    torch.testing.assert_close(sum(halves) / 2, objective(latents, labels, clean, **noisy).loss)
    with pytest.raises(ValueError, match=r"clean_labels must be \(2,\) int64"):
        objective(latents, labels, clean[:2], **noisy)


COUNTED = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution, torch.ops.aten.convolution_backward}


class CountedFLOPs(TorchDispatchMode):
    """Adds up the operations of all products with weights, of whatever pass; not those of tokens with each other."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        if function._overloadpacket in COUNTED:
            self.total += flop_registry[function._overloadpacket](*arguments, **(options or {}), out_val=output)
        return output


@pytest.mark.parametrize(
    ("options", "clean_rows", "units"),
    [
        ({}, 4, 9),
        ({}, 2, 7.5),
        ({"class_embedding": True}, 4, 12),
        ({"class_embedding": True}, 2, 10.5),
        ({"class_embedding": True, "noisy_classification": "dropped"}, 4, 9),
        ({"class_embedding": True, "noisy_classification": "dropped"}, 2, 7.5),
        ({"time_score_weight": 0.01}, 4, 9),
        ({"class_embedding": True, "time_score_weight": 0.01}, 4, 12),
    ],
)
@pytest.mark.parametrize("backbone", TINY_BACKBONES)
def test_a_step_costs_what_is_promised(backbone, options, clean_rows, units):
    """Passes through the trunk, as they are really made: a pass too many would be 1 unit at least."""
    model = TINY_BACKBONES[backbone](class_embedding=options.get("class_embedding", False))
    options = {key: value for key, value in options.items() if key != "class_embedding"}
    objective = EGCObjective(model, 0.3, 0.1, label_drop=0.5, **options)
    _, labels, _, _, timesteps = batch()
    latents, clean, noise = torch.randn(3, 4, 2, 16, 16)
    arguments = {"noise": noise, "timesteps": timesteps, "label_dropped": torch.tensor([True, False] * 2)}
    with CountedFLOPs() as forward, torch.no_grad():
        model(latents, timesteps)
    with CountedFLOPs() as step:
        objective(latents, labels, clean[:clean_rows], clean_labels=labels[:clean_rows], **arguments).loss.backward()
    assert step.total / forward.total == pytest.approx(units, abs=0.3)
