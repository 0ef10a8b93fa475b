"""The suite robustness: attacks against what can be computed by hand, and the suite's own bookkeeping."""

import re
import runpy
import sys
from functools import partial

import datasets
import numpy as np
import pytest
import torch
import yaml
from tiny import ROOT, tiny_kl, tiny_pipeline, write_images
from tiny_studies import measure
from torch import nn

from latent_egc import EGCPipeline
from latent_egc.config import ConfigError, load_config
from latent_egc.data.encoding import encode
from latent_egc.measuring.attacks import Attacker, DenoisedClassifier, PixelClassifier, Threat
from latent_egc.measuring.suites import robustness
from latent_egc.measuring.suites.robustness import Trial
from latent_egc.training.build import build_network, resolve_model

CPU = torch.device("cpu")
FAST = [
    "robustness.linf_eps_255=[8, 2]",
    "robustness.l2_eps=[0.5]",
    "robustness.pgd_steps=3",
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


def reach(network, images, threat):
    """The smallest eps that breaks each image: its margin by the dual norm of the difference of the weights."""
    difference = (network[1].weight[1] - network[1].weight[0]).detach()
    dual = float(difference.abs().sum() if threat.norm == "l_inf" else difference.norm())
    with torch.no_grad():
        logits = network(torch.from_numpy(images)).numpy()
    return np.abs(logits[:, 1] - logits[:, 0]) / dual


def largest_change(images, attacked, threat):
    return np.linalg.norm((attacked - images).reshape(len(images), -1), ord=threat.order, axis=1).max()


@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_attacks_break_exactly_what_a_linear_margin_allows(linear, norm):
    network, images, labels = linear
    attacker = Attacker(network, (3, 8, 8), 2, CPU)
    smallest = reach(network, images, Threat(norm, 1))
    threat = Threat(norm, float(np.median(smallest)))
    for attack in (
        attacker.fgsm,
        partial(attacker.pgd, num_steps=20, random_start=False),
        partial(attacker.pgd, num_steps=20),
        partial(attacker.autoattack, num_steps=20, num_queries=5),
    ):
        attacked = attack(images, labels, threat=threat)
        assert largest_change(images, attacked, threat) <= threat.eps * (1 + 1e-4)
        right = attacker.predict(attacked) == labels
        assert right[smallest > threat.eps * 1.001].all()
        assert not right[smallest < threat.eps * 0.95].any()  # an iteration may end a little before the best point


def test_first_success_by_hand(linear):
    """Attacks of growing eps: each image falls to the first that reaches it, and later ones do not see it any more."""
    network, images, labels = linear
    attacker = Attacker(network, (3, 8, 8), 2, CPU)
    labels = np.where(np.arange(60) < 5, 1 - labels, labels)  # the first five are wrong without attack
    smallest = reach(network, images, Threat("l_inf", 1))
    eps = np.quantile(smallest, [0.3, 0.6]) * 1.01
    seen = []

    def attack(x, y, size):
        seen.append(len(x))
        return attacker.fgsm(x, y, Threat("l_inf", size))

    found = attacker.first_success(images, labels, [partial(attack, size=size) for size in eps])
    expected = np.where(np.arange(60) < 5, -1, np.searchsorted(eps, smallest))
    np.testing.assert_array_equal(found, expected)
    assert seen == [55, (expected > 0).sum()]


def test_attacked_images_stay_images(linear):
    network, images, labels = linear
    attacker = Attacker(network, (3, 8, 8), 2, CPU)
    attacked = attacker.pgd(images, labels, Threat("l_inf", 1.0), num_steps=5)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert not (attacker.predict(attacked) == labels).any()


def test_threats_are_written_as_the_field_does():
    assert [str(Threat("l_inf", 8 / 255)), str(Threat("l_2", 0.5))] == ["l_inf 8/255", "l_2 0.5"]


# --- what is attacked -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vae", [True, False])
def test_pixel_classifier_is_the_pipelines(vae):
    pipeline = tiny_pipeline(vae=vae, **({} if vae else {"in_channels": 3}))
    images = torch.rand(2, 3, pipeline.image_size, pipeline.image_size)
    torch.testing.assert_close(PixelClassifier(pipeline)(images), pipeline.classify(images).logits)


def test_gradient_through_the_autoencoder_is_the_finite_difference():
    network = PixelClassifier(tiny_pipeline()).double()
    images = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(network, images, fast_mode=True)


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
    """Through the noise prediction, itself a gradient; attention is at both levels of the network."""
    network = DenoisedClassifier(tiny_pipeline(attention_levels=(0, 1)), timestep=300, num_draws=2).double()

    def with_fixed_noise(images):
        torch.manual_seed(0)
        return network(images)

    images = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(with_fixed_noise, images, fast_mode=True)


def test_a_step_without_gradient_is_refused(monkeypatch):
    pipeline = tiny_pipeline()
    network = PixelClassifier(pipeline)
    encode = type(pipeline).encode
    for broken in (lambda self, x: encode(self, x.detach()), lambda self, x: encode(self, (x * 255).round() / 255)):
        with monkeypatch.context() as patch:
            patch.setattr(type(pipeline), "encode", broken)
            with pytest.raises(ConfigError, match="no usable gradient flows from the logits to the pixels"):
                Attacker(network, (3, 8, 8), 3, CPU)


# --- the suite ------------------------------------------------------------------------------------------------------


def test_trial_counts_every_image_once(evaluation_context):
    """Whatever the batches, the images are the evaluated ones in their order."""
    context = evaluation_context("batch_size=3")
    trial = Trial(context, context.settings.robustness)
    attacker = trial.attacker(PixelClassifier(context.pipeline))
    right = context.logits.argmax(1).numpy() == context.labels
    assert 0 < right.sum() < 7
    np.testing.assert_array_equal(trial.first_success(attacker, [], "") == 0, right)
    nothing, black = (lambda x, y: x), (lambda x, y: np.zeros_like(x))
    predicted = attacker.predict(np.zeros((1, 3, 8, 8), dtype=np.float32))[0]
    stands = right & (context.labels == predicted)
    found = trial.first_success(attacker, [nothing, black], "")
    np.testing.assert_array_equal(found, np.where(stands, 2, np.where(right, 1, -1)))
    assert trial.accuracy(attacker, [nothing, black], "", 100) == pytest.approx(stands.mean())
    few = context.choose(np.arange(7), 4)
    np.testing.assert_array_equal(trial.first_success(attacker, [nothing, black], "", 4), found[few])


def test_suite(evaluation_context, tmp_path):
    plain = tiny_pipeline(names=("cat", "cow", "dog"))
    with torch.no_grad():
        for parameter in plain.energy_model.parameters():
            parameter.mul_(0.9)
    plain.save_pretrained(tmp_path / "plain")
    context = evaluation_context(*FAST, f"robustness.plain={tmp_path / 'plain'}")
    result = measure(robustness, context)
    table, checks, denoised = result.tables

    threats = [("l_inf", "2/255"), ("l_inf", "8/255"), ("l_2", "0.5")]
    attacks = [("none", "", "0"), *(("FGSM", *t) for t in threats), *(("PGD-3", *t) for t in threats)]
    attacks += [("AutoAttack", "l_inf", "4/255"), ("AutoAttack", "l_2", "0.5")]
    assert [tuple(row[:3]) for row in table.rows] == attacks
    assert table.columns[3:] == [
        *("steps", "random restarts", "loss", "images", "EGC", "95 % interval", "plain", "95 % interval")
    ]
    assert [row[6] for row in table.rows] == [7] * 7 + [4] * 2
    pgd = table.rows[4]
    assert pgd[3:6] == [3, 2, "cross entropy"]
    for column, name in ((7, "EGC"), (9, "plain")):
        accuracies = [row[column].value for row in table.rows]
        assert accuracies[0] >= accuracies[1] >= accuracies[2]
        assert accuracies[0] >= accuracies[4] >= accuracies[5]
        assert pgd[column] is result.metrics[f"{name}, PGD-3 l_inf 2/255"]
        low, high = pgd[column].interval
        assert low <= pgd[column].value <= high
    accuracy = (context.logits.argmax(1).numpy() == context.labels).mean()
    assert result.metrics["EGC, no attack"].value == pytest.approx(accuracy)

    assert len(checks.rows) == 5
    assert {row[2] for row in checks.rows} <= {"pass", "FAIL"}
    (unbounded,) = [row for row in checks.rows if "unbounded" in row[0]]
    assert unbounded[2] == ("pass" if unbounded[1] == "l_inf eps 1: 0.00 %" else "FAIL")
    assert [row[0] for row in denoised.rows] == ["not denoised", "denoised from timestep 50"]
    assert len(denoised.rows[0]) == len(denoised.columns)
    assert {figure.name: figure.shows_data for figure in result.figures} == {
        "accuracy_l_inf": False,
        "accuracy_l_2": False,
        "images": True,
    }
    assert all(parameter.requires_grad for parameter in context.model.parameters())


def test_restarts_and_several_eps_in_one_pass_are_exact(evaluation_context, linear):
    """The margins of a linear classifier say what PGD on every image at every eps would find."""
    network, _, _ = linear
    context = evaluation_context("robustness.pgd_steps=10", num_classes=3)
    trial = Trial(context, context.settings.robustness)
    images, _ = trial.load(trial.positions)
    with torch.no_grad():
        logits = network(torch.from_numpy(images))
        network[1].bias[0] += (logits[:, 1] - logits[:, 0]).mean()
        context.labels = network(torch.from_numpy(images)).argmax(1).numpy()
    smallest = reach(network, images, Threat("l_inf", 1))
    attacker = Attacker(network, (3, 8, 8), 2, CPU)
    eps = np.sort(smallest)[[1, 4]] * 1.05
    attacks = [partial(attacker.pgd, threat=Threat("l_inf", float(e)), num_steps=10) for e in eps for _ in range(2)]
    found = trial.first_success(attacker, attacks, "")
    inside = (images > 0.2).all(axis=(1, 2, 3)) & (images < 0.8).all(axis=(1, 2, 3))  # clipping would weaken it
    assert inside.any()
    for number, size in enumerate(eps, start=1):
        withstands = found >= 2 * number
        assert withstands[smallest > size * 1.001].all()
        assert not withstands[inside & (smallest < size * 0.95)].any()


def test_suite_errors(evaluation_context, tmp_path):
    missing = tmp_path / "none"
    with pytest.raises(ConfigError, match=rf"robustness.plain: .* experiments/train_plain_classifier.py RUN {missing}"):
        measure(robustness, evaluation_context(*FAST, f"robustness.plain={missing}"))
    tiny_pipeline().save_pretrained(tmp_path / "classes")
    with pytest.raises(ConfigError, match=r"robustness.plain: .* other classes"):
        measure(robustness, evaluation_context(*FAST, f"robustness.plain={tmp_path / 'classes'}"))
    tiny_pipeline(names=("cat", "cow", "dog"), head="inner").save_pretrained(tmp_path / "trunk")
    with pytest.raises(ConfigError, match=r"another trunk than the pipeline: head is 'inner', it must be 'map'"):
        measure(robustness, evaluation_context(*FAST, f"robustness.plain={tmp_path / 'trunk'}"))
    with pytest.raises(ConfigError, match=r"robustness.denoise_timesteps must be below 1000, got \[1000\]"):
        measure(robustness, evaluation_context("robustness.denoise_timesteps=[1000]"))
    with pytest.raises(ConfigError, match="--suite robustness needs classes"):
        measure(robustness, evaluation_context(num_classes=None, energy_channels=3))


def test_only_an_attacker_imports_the_attacks():
    """The library of attacks takes seconds to import: one function does, nothing when it is loaded."""
    importers = {
        (path.name, len(indent) > 0)
        for path in (ROOT / "latent_egc").rglob("*.py")
        for indent in re.findall(r"^( *)(?:from|import) art\b", path.read_text(), re.MULTILINE)
    }
    assert importers == {("attacks.py", True)}


# --- the script -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixel_space", [True, False])
def test_plain_classifier_of_a_run(tmp_path, monkeypatch, capsys, pixel_space):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    write_images(tmp_path / "images")
    config = {
        "model": {
            **{"sample_size": 8 if pixel_space else 4, "in_channels": 3 if pixel_space else 2, "num_classes": 3},
            **{
                "attention_levels": [1],
                "block_out_channels": [8, 16],
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "num_attention_heads": 2,
            },
        },
        "autoencoder": {"path": None if pixel_space else str(tmp_path / "vae")},
        "data": {"dataset": "imagefolder", "data_dir": str(tmp_path / "images"), "image_size": 8},
        "training": {"max_steps": 2, "train_batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0, "ema_decay": 0.0},
    }
    if not pixel_space:
        tiny_kl().save_pretrained(tmp_path / "vae")
        config["data"]["latent_cache"] = str(tmp_path / "cache")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    config = load_config(tmp_path / "run" / "config.yaml")
    if not pixel_space:
        encode(config.data, config.autoencoder, num_classes=3)
    script = str(ROOT / "experiments" / "train_plain_classifier.py")
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "run"), str(tmp_path / "plain")])
    runpy.run_path(script, run_name="__main__")
    assert "validation accuracy" in capsys.readouterr().out

    pipeline = EGCPipeline.from_pretrained(tmp_path / "plain" / "pipeline")
    assert list(pipeline.id2label.values()) == ["cat", "cow", "dog"]
    assert (pipeline.vae is None) == pixel_space
    torch.manual_seed(config.training.seed)
    fresh = build_network(resolve_model(config.model))
    moved = [(a - b).abs().max() for a, b in zip(pipeline.energy_model.parameters(), fresh.parameters(), strict=True)]
    # Adam's first steps have the learning rate's length; the output map starts at zero and keeps layers before it
    # from moving in the first step.
    assert 0.01 <= max(moved) <= 0.021
    with pytest.raises(ConfigError, match=r"already holds files; .* or choose another folder"):
        runpy.run_path(script, run_name="__main__")
