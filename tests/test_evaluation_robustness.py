"""The suite robustness: attacks against what can be computed by hand, and the suite's own bookkeeping."""

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from torch import nn

from latent_egc.config import ConfigError
from latent_egc.evaluation.attacks import Attacker, DenoisedClassifier, PixelClassifier, Threat, largest_change, threats
from latent_egc.evaluation.robustness import Trial, evaluate_robustness

CPU = torch.device("cpu")
FAST = [
    "robustness.linf_eps_255=[8]",
    "robustness.l2_eps=[0.5]",
    "robustness.pgd_steps=3",
    "robustness.pgd_restarts=1",
    "robustness.num_autoattack_images=4",
    "robustness.autoattack_steps=3",
    "robustness.autoattack_queries=3",
    "robustness.check_steps=[1, 3]",
    "robustness.denoise_timesteps=[50]",
    "robustness.denoise_draws=2",
]


@pytest.fixture
def linear():
    """A linear classifier of two classes, 60 images that no clipping touches, and their labels."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    images = 0.5 + 0.1 * (np.random.default_rng(0).random((60, 3, 8, 8), dtype=np.float32) - 0.5)
    with torch.no_grad():
        logits = network(torch.from_numpy(images))
        network[1].bias[0] += (logits[:, 1] - logits[:, 0]).median()
        return network, images, network(torch.from_numpy(images)).argmax(1).numpy()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_break_exactly_what_a_linear_margin_allows(linear, norm):
    """A linear classifier withstands eps where its margin exceeds eps times the dual norm of the weight difference."""
    network, images, labels = linear
    attacker = Attacker(network, (3, 8, 8), 2, CPU)
    difference = (network[1].weight[1] - network[1].weight[0]).detach()
    dual = float(difference.abs().sum() if norm == "linf" else difference.norm())
    with torch.no_grad():
        logits = network(torch.from_numpy(images)).numpy()
    margins = np.abs(logits[:, 1] - logits[:, 0])
    reach = margins / dual  # the smallest eps that breaks each image
    threat = Threat(norm, float(np.median(reach)))
    for attacked in (
        attacker.fgsm(images, labels, threat),
        attacker.pgd(images, labels, threat, num_steps=20, num_restarts=0),
        attacker.pgd(images, labels, threat, num_steps=20, num_restarts=2),
        attacker.autoattack(images, labels, threat, num_steps=20, num_queries=5),
    ):
        assert largest_change(images, attacked, threat) <= threat.eps * (1 + 1e-4)
        right, _ = attacker.judge(attacked, labels)
        assert right[reach > threat.eps * 1.001].all()
        assert not right[reach < threat.eps * 0.95].any()  # an iteration may end a little before the best point


def test_attacked_images_stay_images(linear):
    network, images, labels = linear
    attacker = Attacker(network, (3, 8, 8), 2, CPU)
    attacked = attacker.pgd(images, labels, Threat("linf", 1.0), num_steps=5, num_restarts=1)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert not attacker.judge(attacked, labels)[0].any()


def test_largest_change_by_hand():
    images, attacked = np.zeros((2, 3, 1, 1)), np.zeros((2, 3, 1, 1))
    attacked[1, :2, 0, 0] = 3, 4
    assert [largest_change(images, attacked, threat) for threat in threats([1], [1])] == [4, 5]
    assert [str(threat) for threat in threats([8], [0.5])] == ["linf, eps 8/255", "l2, eps 0.5"]


# --- what is attacked -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vae", [True, False])
def test_pixel_classifier_is_the_pipelines(vae):
    pipeline = tiny_pipeline(vae=vae, **({} if vae else {"in_channels": 3}))
    size = pipeline.image_size
    images = torch.rand(2, 3, size, size)
    torch.testing.assert_close(PixelClassifier(pipeline)(images), pipeline.classify(images).logits)


def test_gradient_through_the_autoencoder_is_the_finite_difference():
    pipeline = tiny_pipeline()
    network = PixelClassifier(pipeline).double()
    images = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(network, images, atol=1e-4, rtol=1e-3, fast_mode=True)


def test_denoised_classifier_by_hand():
    pipeline = tiny_pipeline()
    network, images = DenoisedClassifier(pipeline, timestep=300, num_draws=3), torch.rand(2, 3, 8, 8)
    torch.manual_seed(5)
    found = network(images)
    torch.manual_seed(5)
    noise = torch.randn(6, 2, 4, 4)
    model, latents = pipeline.energy_model, pipeline.encode(2 * images - 1)
    abar = model.alphas_cumprod[300]
    for i in range(2):
        probabilities = []
        for draw in range(3):
            noisy = abar.sqrt() * latents[i : i + 1] + (1 - abar).sqrt() * noise[3 * i + draw]
            denoised = (noisy - (1 - abar).sqrt() * model.epsilon(noisy, 300)) / abar.sqrt()
            probabilities.append(model(denoised, 0).logits.softmax(1))
        torch.testing.assert_close(found[i : i + 1].exp(), sum(probabilities) / 3)


def test_gradient_of_the_denoised_classifier_is_the_finite_difference():
    network = DenoisedClassifier(tiny_pipeline(), timestep=300, num_draws=2).double()

    def with_fixed_noise(images):
        torch.manual_seed(0)
        return network(images)

    images = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(with_fixed_noise, images, atol=1e-3, rtol=1e-2, fast_mode=True)


def test_a_step_without_gradient_is_refused(monkeypatch):
    pipeline = tiny_pipeline()
    network = PixelClassifier(pipeline)
    for broken in (lambda x: network.pipeline.vae.encode(x.detach()).latent_dist.mode(), lambda x: x[:, :2].round()):
        with monkeypatch.context() as patch:
            patch.setattr(type(pipeline), "encode", lambda self, x, broken=broken: broken(x))
            with pytest.raises(ConfigError, match="no usable gradient flows from the logits to the pixels"):
                Attacker(network, (3, 8, 8), 3, CPU)


# --- the suite ------------------------------------------------------------------------------------------------------


def test_trial_counts_wrong_images_as_wrong_and_leaves_them(evaluation_context):
    trial = Trial(evaluation_context("batch_size=3"), 100)
    attacker = trial.attacker(PixelClassifier(trial.context.pipeline))
    right, losses = attacker.judge(trial.images, trial.labels)
    assert 0 < right.sum() < 7

    outcome = trial.run(attacker, lambda a, x, y: np.zeros_like(x), "black")
    assert (outcome.images[~right] == trial.images[~right]).all()
    assert not outcome.images[right].any()
    clean = trial.run(attacker, lambda a, x, y: x, "clean", count=5)
    np.testing.assert_array_equal(clean.right, right[:5])
    np.testing.assert_allclose(clean.losses, losses[:5], rtol=1e-4)


def test_suite(evaluation_context, tmp_path):
    tiny_pipeline(names=("cat", "cow", "dog"), head="inner").save_pretrained(tmp_path / "plain")
    context = evaluation_context(*FAST, f"robustness.plain={tmp_path / 'plain'}")
    result = evaluate_robustness(context)
    accuracy = (context.logits.argmax(1).numpy() == context.labels).mean()
    assert result.metrics["EGC, no attack"].value == pytest.approx(accuracy)
    for name in ("EGC", "plain"):
        for attack in ("PGD-3 linf, eps 8/255", "PGD-3 l2, eps 0.5"):
            assert result.metrics[f"{name}, {attack}"].value <= result.metrics[f"{name}, no attack"].value
        assert f"{name}, AutoAttack linf, eps 4/255" in result.metrics
    under_attack, checks, denoised = result.tables
    assert [row[0] for row in under_attack.rows] == ["none", "linf, eps 8/255", "l2, eps 0.5"]
    assert len(under_attack.rows[0]) == len(under_attack.columns) == 7
    assert len(checks.rows) == 5
    (unbounded,) = [row for row in checks.rows if "unbounded" in row[0]]
    assert unbounded[2] == ("yes" if unbounded[1] == "eps 1: 0.0 %" else "NO")
    assert [row[0] for row in denoised.rows] == ["not denoised", "denoised from timestep 50"]
    assert [figure.name for figure in result.figures] == ["accuracy_linf", "accuracy_l2"]
    assert all(parameter.requires_grad for parameter in context.model.parameters())


def test_suite_errors(evaluation_context, tmp_path):
    with pytest.raises(ConfigError, match=r"robustness.plain: .* scripts/train_plain_classifier.py"):
        evaluate_robustness(evaluation_context(*FAST, f"robustness.plain={tmp_path / 'none'}"))
    tiny_pipeline().save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"robustness.plain: .* other classes"):
        evaluate_robustness(evaluation_context(*FAST, f"robustness.plain={tmp_path / 'other'}"))
