"""The probe's analyses: every number against an independent computation; the report; the command line."""

import json
import shutil
import sys
from itertools import pairwise

import datasets
import numpy as np
import pytest
import sklearn.metrics
import torch
import yaml
from accelerate import Accelerator
from sklearn.linear_model import LogisticRegression
from test_probing import tiny_unet2d
from test_training import fresh_accelerator  # noqa: F401
from tiny import FAST_PROBE, tiny_pipeline

from latent_egc import EGCPipeline
from latent_egc.commands import main
from latent_egc.config import ConfigError
from latent_egc.measuring import probe
from latent_egc.measuring.denoisers import load_denoiser
from latent_egc.measuring.probe_context import Place, ProbeContext
from latent_egc.measuring.probe_heads import FusionHead, cnn_head, linear_head, mlp_head, predict, train_head
from latent_egc.measuring.probe_settings import HeadsSettings, parse_settings
from latent_egc.measuring.suites.cka import analyse_cka, linear_cka
from latent_egc.measuring.suites.few_shot import analyse_few_shot, draw_shots
from latent_egc.measuring.suites.fusion import DifFeed, analyse_fusion, chosen_sources
from latent_egc.measuring.suites.heatmap import analyse_comparison, analyse_heads, analyse_heatmap, analyse_pooling

TINY_HEADS = ["heads.epochs=2", "heads.width=8", "heads.neighbours=3"]


def values(result):
    return {name: metric.value for name, metric in result.metrics.items()}


# --- heat map, pooling, comparison ----------------------------------------------------------------------------------


def test_heat_map_holds_every_cells_accuracy(probe_context):
    probe = probe_context("heatmap.pooling=1")
    result = analyse_heatmap(probe)
    (table,) = result.tables
    assert [row[0] for row in table.rows] == list(probe.denoiser.blocks)
    chosen, held_out = None, -1.0
    for column, t in enumerate((0, 90)):
        for row in table.rows:
            score, predicted = probe.probe(Place(row[0], t, 1))
            assert row[1 + column].value == sklearn.metrics.accuracy_score(probe.labels, predicted)
            if score.held_out > held_out:
                chosen, held_out = Place(row[0], t, 1), score.held_out
    assert list(result.metrics) == [f"linear probe at {chosen}"]
    assert result.metrics[f"linear probe at {chosen}"].value == probe.score(chosen).accuracy
    assert result.figures[0].png[1:4] == b"PNG"


def test_a_killed_heat_map_goes_on_behind_its_last_cell(probe_context, monkeypatch):
    first = probe_context()
    fitted = []
    plain = ProbeContext.probe

    def counted(self, place):
        fitted.append(place)
        if len(fitted) == 4:
            raise KeyboardInterrupt
        return plain(self, place)

    monkeypatch.setattr(ProbeContext, "probe", counted)
    with pytest.raises(KeyboardInterrupt):
        _ = first.scores
    scores = probe_context().scores
    assert len(fitted) == 4 + len(scores) - 3
    assert all(scores[place] == plain(first, place)[0] for place in fitted[:3])


def test_pooling_curve(probe_context):
    result = analyse_pooling(probe_context("block=mid.0", "timestep=90"))
    probe = probe_context()
    expected = {p: probe.probe(Place("mid.0", 90, p))[0].accuracy for p in (1, 2)}
    assert {row[0]: row[2].value for row in result.tables[0].rows} == expected
    assert {row[0]: row[1] for row in result.tables[0].rows} == {1: 16, 2: 64}
    # A transformer's maps are 2 x 2 here, and so is the middle of this U-Net: p = 4 would be 2 again.
    wide = probe_context("poolings=[1,2,4]", "block=mid.0", "timestep=90")
    assert [row[0] for row in analyse_pooling(wide).tables[0].rows] == [1, 2]


def test_comparison_is_with_the_pipelines_classifier(probe_context):
    probe = probe_context("block=mid.0", "timestep=0", "pooling=2")
    result = analyse_comparison(probe)
    names = [probe.class_names[i] for i in probe.labels]
    images = [probe.splits.validation.image(row) for row in range(len(names))]
    own = tiny_pipeline(names=("cat", "cow", "dog")).classify(images).labels
    own = np.array([top[0] == name for top, name in zip(own, names, strict=True)])
    probed = probe.probe(Place("mid.0", 0, 2))[1] == probe.labels
    found = list(values(result).values())
    assert found[:3] == pytest.approx([own.mean(), probed.mean(), probed.mean() - own.mean()])
    table = [row[1:] for row in result.tables[0].rows]
    assert table == sklearn.metrics.confusion_matrix(~own, ~probed, labels=[False, True]).tolist()


# --- heads ----------------------------------------------------------------------------------------------------------


def test_heads_report_their_predictions(probe_context):
    probe = probe_context("block=mid.0", "timestep=90", "pooling=2", *TINY_HEADS)
    found = values(analyse_heads(probe))
    assert list(found) == ["linear, L-BFGS", "3-NN", "linear, SGD", "MLP", "CNN", "attention"]
    train, validation = (array.reshape(len(array), -1) for array in probe.standardised(Place("mid.0", 90, 2)))
    train, validation = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (train, validation))
    nearest = np.argsort(-(validation @ train.T), axis=1)[:, :3]
    votes = np.array([np.bincount(probe.train_labels[row], minlength=3).argmax() for row in nearest])
    assert found["3-NN"] == pytest.approx((votes == probe.labels).mean())


def test_sgd_finds_the_logistic_regression():
    """Without penalty both minimise the same convex function of data that no plane separates."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    features = (rng.standard_normal((400, 3, 1, 1)) + labels[:, None, None, None] * 0.7).astype(np.float32)
    head = linear_head(3, 1, 2)
    settings = HeadsSettings(epochs=60, sgd_learning_rate=0.05)
    train_head(head, [torch.from_numpy(features)], torch.from_numpy(labels), settings, seed=0, optimizer="sgd")
    expected = LogisticRegression(C=1e6).fit(features.reshape(400, 3), labels)
    weight = head[1].weight[1] - head[1].weight[0]
    assert weight.tolist() == pytest.approx(expected.coef_[0].tolist(), abs=0.05)


@pytest.mark.parametrize("kind", ["MLP", "CNN", "attention"])
def test_heads_learn_what_no_plane_separates(kind):
    rng = np.random.default_rng(0)
    corners = rng.choice([-1.0, 1.0], (256, 2))
    labels = (corners.prod(axis=1) > 0).astype(int)
    maps = np.tile(corners[:, :, None, None], (1, 1, 2, 2)) + 0.2 * rng.standard_normal((256, 2, 2, 2))
    maps, labels = torch.from_numpy(maps.astype(np.float32)), torch.from_numpy(labels)
    torch.manual_seed(0)
    head = {
        "MLP": lambda: mlp_head(2, 2, 2, 16),
        "CNN": lambda: cnn_head(2, 2, 16),
        "attention": lambda: FusionHead([(2, 2)], 1, 2, 16),
    }[kind]()
    train_head(head, [maps], labels, HeadsSettings(epochs=30, learning_rate=1e-2), seed=0)
    assert (predict(head, [maps], 100) == labels).double().mean() > 0.97


# --- fusion ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_difformer_attends_within_and_joins_over_timesteps():
    torch.manual_seed(0)
    both = FusionHead([(3, 2), (5, 1)], 2, 4, 8).eval()
    one = FusionHead([(3, 2), (5, 1)], 1, 8, 8).eval()
    shared = {name: tensor for name, tensor in both.state_dict().items() if not name.startswith("out")}
    one.load_state_dict(shared, strict=False)
    one.out.weight.copy_(torch.eye(8))
    one.out.bias.zero_()
    first, second = ([torch.randn(6, 3, 2, 2), torch.randn(6, 5, 1, 1)] for _ in range(2))
    expected = both.out(torch.cat([one(*first), one(*second)], dim=1))
    torch.testing.assert_close(both(*first, *second), expected)
    # A transformer without positions would not see that one map's positions were exchanged.
    assert not torch.allclose(one(first[0].flip(-1), first[1]), one(*first))


def test_difffeed_starts_as_one_pass_and_trains_the_feedback_alone(probe_context):
    denoiser = probe_context(extract=False).denoiser
    torch.manual_seed(0)
    means = {"mid.0": torch.randn(16, 1, 1), "up.0.1": torch.randn(8, 2, 2)}
    deviations = {block: mean.abs() + 0.5 for block, mean in means.items()}
    head = FusionHead([(16, 1), (8, 2)], 1, 3, 8)
    model = DifFeed(denoiser, 90, means, deviations, head)
    latents, labels = torch.randn(6, 2, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    maps = denoiser.features(latents, 90)
    pooled = [torch.nn.functional.adaptive_avg_pool2d(maps[block], m.shape[-1]) for block, m in means.items()]
    standard = [(x - m) / d for x, m, d in zip(pooled, means.values(), deviations.values(), strict=True)]
    torch.testing.assert_close(model.eval()(latents), head(*standard))

    network = {name: tensor.clone() for name, tensor in denoiser.network.state_dict().items()}
    last = [layers[-1].weight.clone() for layers in model.feedback]
    train_head(model, [latents], labels, HeadsSettings(epochs=3, learning_rate=0.01), seed=0)
    assert all(torch.equal(network[name], tensor) for name, tensor in denoiser.network.state_dict().items())
    assert not any(torch.equal(before, layers[-1].weight) for before, layers in zip(last, model.feedback, strict=True))
    before = model.eval()(latents)
    with torch.no_grad():
        for layers in model.feedback:
            layers[-1].weight.zero_()
    assert not torch.allclose(model(latents), before)


def test_fusion(probe_context):
    probe = probe_context(*TINY_HEADS, "fusion.num_blocks=2", "fusion.feedback_epochs=1", "fusion.feedback_images=8")
    blocks, timesteps = chosen_sources(probe)
    best = {b: max(s.held_out for p, s in probe.scores.items() if p.block == b) for b in probe.cache.blocks}
    assert {best[b] for b in blocks} <= set(sorted(best.values())[-2:])
    assert timesteps == [0, 90]
    result = analyse_fusion(probe)
    assert [name.split(" at ")[0] for name in result.metrics] == ["concatenation, linear probe", "DifFormer", "DifFeed"]
    assert "1 epochs of 8 rows" in result.notes[-1]
    # Concatenation, by hand: the features beside one another, standardised, the penalty given.
    p = probe.place.pooling
    places = [Place(b, t, p) for t in timesteps for b in blocks]
    train, test = (
        np.concatenate([probe.standardised(x)[i].reshape(n, -1) for x in places], 1) for i, n in ((0, 14), (1, 7))
    )
    model = LogisticRegression(C=0.01, max_iter=100).fit(train, probe.train_labels)
    assert values(result)["concatenation, linear probe"] == pytest.approx(model.score(test, probe.labels))
    assert chosen_sources(probe_context("fusion.blocks=[mid.0]", "fusion.timesteps=[90]")) == (["mid.0"], [90])


# --- CKA ------------------------------------------------------------------------------------------------------------


def test_cka_is_the_formula_of_its_definition():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 3, 2, 2))
    y = np.concatenate([x[:, :2] ** 2, rng.standard_normal((40, 1, 2, 2))], axis=1)
    rotation = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    found = linear_cka([x, y, 3 * x.reshape(40, 12) @ rotation + 5])
    x, y = (a.reshape(40, -1) - a.reshape(40, -1).mean(axis=0) for a in (x, y))
    expected = np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert found[0, 1] == pytest.approx(expected)
    assert found[0, 2] == pytest.approx(1)
    assert np.diag(found) == pytest.approx(np.ones(3))
    assert np.isnan(linear_cka([x, np.ones((40, 2))])[0, 1])


def test_cka_of_blocks_and_timesteps(probe_context):
    probe = probe_context("block=mid.0", "timestep=90", "pooling=1", "cka.num_images=5")
    result = analyse_cka(probe)
    assert result.num_samples == 5
    blocks = [probe.features("validation", Place(b, 90, 2))[:5] for b in ("in", "up.0.1")]
    steps = [probe.features("validation", Place("mid.0", t, 2))[:5] for t in (0, 90)]
    assert list(values(result).values()) == pytest.approx([linear_cka(a)[0, 1] for a in (blocks, steps)])


# --- few shots ------------------------------------------------------------------------------------------------------


def test_draws_are_nested_and_balanced():
    labels = np.random.default_rng(0).integers(0, 4, 200)
    draws = [draw_shots(labels, count, 4, seed=2) for count in (1, 5, 20)]
    for count, chosen in zip((1, 5, 20), draws, strict=True):
        assert np.bincount(labels[chosen]).tolist() == [count] * 4
        assert len(set(chosen)) == 4 * count
    assert all(set(a) < set(b) for a, b in pairwise(draws))
    assert set(draws[2]) != set(draw_shots(labels, 20, 4, seed=3))
    with pytest.raises(ConfigError, match=r"few_shot.shots: 90 images a class, class 0 has \d+ training images"):
        draw_shots(labels, 90, 4, seed=0)


def test_few_shot_accuracy(probe_context):
    probe = probe_context(
        "block=mid.0", "timestep=90", "pooling=2", "few_shot.shots=[1,2]", "few_shot.draws=2", "seed=4"
    )
    result = analyse_few_shot(probe)
    train, test = (array.reshape(len(array), -1) for array in probe.standardised(Place("mid.0", 90, 2)))
    for count in (1, 2):
        scores = []
        for seed in (4, 5):
            chosen = draw_shots(probe.train_labels, count, 3, seed)
            model = LogisticRegression(C=0.01).fit(train[chosen], probe.train_labels[chosen])
            scores.append(sklearn.metrics.accuracy_score(probe.labels, model.predict(test)))
        assert values(result)[f"frozen features, {count} a class"] == pytest.approx(np.mean(scores))
        assert result.tables[0].rows[count - 1][2].value == pytest.approx(np.std(scores))


@pytest.mark.usefixtures("fresh_accelerator")
def test_fine_tuning_starts_from_the_pipeline_and_sees_the_shots(probe_context, tmp_path):
    """On a dataset of two classes: the layers that do not depend on them are the pipeline's, moved by two steps."""
    shutil.rmtree(tmp_path / "images" / "dog", ignore_errors=True)
    overrides = ["few_shot.shots=[3]", "few_shot.draws=1", "block=mid.0", "timestep=0", "pooling=1"]
    probe = probe_context(*overrides, "few_shot.finetune_steps=2", "few_shot.finetune_batch_size=6")
    with pytest.warns(UserWarning, match="freshly initialised are"):
        result = analyse_few_shot(probe)
    (run,) = probe.cache.folder.glob("finetuned_*/run")
    tuned = EGCPipeline.from_pretrained(run / "pipeline")
    images = [probe.splits.validation.image(row) for row in range(len(probe.labels))]
    names = [probe.class_names[label] for label in probe.labels]
    accuracy = np.mean([found == [name] for found, name in zip(tuned.classify(images).labels, names, strict=True)])
    assert values(result)["fine-tuned, 3 a class"] == pytest.approx(accuracy)
    assert tuned.id2label == {0: "cat", 1: "cow"}
    weights, before = tuned.energy_model.state_dict(), probe.denoiser.network.state_dict()
    moved = (weights["mid_blocks.0.resnet.conv1.weight"] - before["mid_blocks.0.resnet.conv1.weight"]).abs()
    assert 0 < moved.max() < 1e-3
    shots = datasets.Dataset.from_parquet(str(run.parent / "train.parquet"))
    chosen = draw_shots(probe.train_labels, 3, 2, seed=0)
    assert sorted(shots["label"]) == [0] * 3 + [1] * 3
    found = {np.asarray(image).tobytes() for image in shots["image"]}
    assert found == {np.asarray(probe.splits.train.image(row)).tobytes() for row in chosen}


# --- the report and the command line --------------------------------------------------------------------------------


def test_report_survives_a_kill_and_goes_on(probe_context, tmp_path, monkeypatch, capsys):
    made, module = probe_context(extract=False), sys.modules["latent_egc.measuring.probe"]

    def run(*overrides):
        settings = parse_settings([*FAST_PROBE, *overrides])
        arguments = (made.denoiser, made.data, ["heatmap", "pooling"], tmp_path / "report", settings)
        return probe(*arguments, Accelerator(cpu=True))

    def killed(context):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(module.ANALYSES, "pooling", killed)
        with pytest.raises(KeyboardInterrupt):
            run()
    first = json.loads((tmp_path / "report" / "report.json").read_text())
    assert list(first["suites"]) == ["heatmap"]
    capsys.readouterr()
    report = run()
    assert "heatmap: already in the report" in capsys.readouterr().out
    assert report.content["suites"]["heatmap"] == first["suites"]["heatmap"]
    record = report.content["suites"]["pooling"]
    assert record["settings"]["data"]["dataset"] == "imagefolder"
    assert "few_shot" not in record["settings"]
    run("few_shot.draws=2")
    assert capsys.readouterr().out.count("already in the report") == 2
    run("noise_seed=1")
    assert "already in the report" not in capsys.readouterr().out


def test_only_the_needed_timestep_is_computed(probe_context, tmp_path):
    made = probe_context("block=mid.0", "timestep=90", extract=False)
    assert made.timesteps_of(["heads", "few_shot"]) == [90]
    assert made.timesteps_of(["heads", "cka"]) == [0, 90]
    assert probe_context("block=mid.0", extract=False).timesteps_of(["heads"]) == [0, 90]


def test_command_line(probe_context, tmp_path, capsys):
    data_dir = probe_context(extract=False).data.data_dir
    data = {"dataset": "imagefolder", "data_dir": data_dir, "validation_fraction": 1 / 3}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": data}))
    tiny_unet2d().save_pretrained(tmp_path / "denoiser")
    arguments = ["probe", str(tmp_path / "denoiser"), "--analysis", "heatmap", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--set", *FAST_PROBE]) == 2
    assert "is no run with a config.yaml" in capsys.readouterr().err
    arguments += ["--data", str(tmp_path / "data.yaml")]
    assert main([*arguments, "--set", *FAST_PROBE]) == 0
    assert "linear probe at" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").exists()
    for option, message in (
        (["--analysis", "heatmaps"], "unknown analysis 'heatmaps'; did you mean heatmap?"),
        (["--analysis", "comparison"], "--analysis comparison needs an energy network, got UNet2DModel"),
    ):
        assert main([*arguments, *option, "--set", *FAST_PROBE]) == 2
        assert message in capsys.readouterr().err


def test_comparison_needs_the_pipelines_own_classes(probe_context, tmp_path):
    tiny_pipeline(names=("a", "b", "c")).save_pretrained(tmp_path / "other")
    probe = probe_context("block=mid.0", "timestep=0", "pooling=1", denoiser=load_denoiser(str(tmp_path / "other")))
    with pytest.raises(ConfigError, match="needs the energy network's own classes"):
        analyse_comparison(probe)
