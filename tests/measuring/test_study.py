"""Evaluation: gathering, intervals, the report, and the suites classification and calibration."""

import base64
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.special
import sklearn.metrics
import torch
import yaml
from tiny import tiny_pipeline, write_images

from latent_egc.commands import main
from latent_egc.config import ConfigError
from latent_egc.measuring import bootstrapped, parse_settings
from latent_egc.measuring import study as evaluate
from latent_egc.measuring.results import Figure, Metric, SuiteResult
from latent_egc.measuring.suites.calibration import evaluate_calibration, fit_temperature, reliability_bins
from latent_egc.measuring.suites.classification import evaluate_classification

FAST = ["num_resamples=20", "classification.num_timesteps=2"]


@pytest.fixture
def logits_and_labels():
    """500 images, 7 classes; the logits know something of the labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 500)
    return 2 * rng.standard_normal((500, 7)) + 2 * np.eye(7)[labels], labels


# --- running and resampling -----------------------------------------------------------------------------------------


def test_over_returns_every_position_once_in_order(evaluation_context):
    context = evaluation_context("batch_size=3")
    assert context.over(7, lambda positions: torch.tensor(list(positions)), "").tolist() == list(range(7))


def test_two_processes_report_the_numbers_of_one(tmp_path):
    """7 images on 2 processes in batches of 2: the last batches are uneven, and every image counts once."""
    write_images(tmp_path / "images")
    tiny_pipeline(names=("cat", "cow", "dog")).save_pretrained(tmp_path / "pipeline")
    data = {"dataset": "imagefolder", "data_dir": str(tmp_path / "images"), "validation_fraction": 1 / 3}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": data}))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = []
    for launcher, processes in (([], 1), (torchrun, 2)):
        command = [sys.executable, *launcher, "-m", "latent_egc.cli", "evaluate", tmp_path / "pipeline"]
        command += ["--data", tmp_path / "data.yaml", "--output", tmp_path / str(processes), "--set", *FAST]
        subprocess.run([*command, "batch_size=2"], env=environment, check=True, capture_output=True)
        report = json.loads((tmp_path / str(processes) / "report.json").read_text())
        assert report["subject"]["device"] == f"{processes} process(es) on cpu"
        found.append({(s, m): v["value"] for s, r in report["suites"].items() for m, v in r["metrics"].items()})
        assert report["suites"]["classification"]["num_samples"] == 7
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    sample = np.random.default_rng(0).random(400)
    metric = bootstrapped(np.mean, sample, num_resamples=4000, seed=0)
    error = 1.96 * sample.std() / 20
    assert metric.value == sample.mean()
    assert metric.interval == pytest.approx((sample.mean() - error, sample.mean() + error), abs=0.1 * error)
    assert bootstrapped(np.mean, sample[:1], num_resamples=10, seed=0).interval is None


def test_bootstrap_keeps_rows_together():
    x = np.random.default_rng(0).random(50)
    metric = bootstrapped(lambda a, b: float(np.abs(a - b[:, 0]).max()), x, x[:, None], num_resamples=10, seed=0)
    assert metric.interval == (0, 0)


def test_bootstrap_keeps_strata():
    """The mean within each stratum is constant, so every resample has the same mean."""
    strata = np.array([0] * 30 + [1] * 3)
    metric = bootstrapped(np.mean, strata.astype(float), num_resamples=50, seed=0, strata=strata)
    assert metric.interval == pytest.approx((1 / 11, 1 / 11))


# --- the metrics ----------------------------------------------------------------------------------------------------


def test_classification_is_scikit_learns(evaluation_context, logits_and_labels):
    context = evaluation_context(*FAST)
    logits, labels = context.logits.numpy(), context.labels
    result = evaluate_classification(context)
    assert result.num_samples == 7
    accuracy = sklearn.metrics.accuracy_score(labels, logits.argmax(1))
    assert result.metrics["top-1 accuracy"].value == pytest.approx(accuracy)
    assert "top-5 accuracy" not in result.metrics  # of 3 classes
    recall = sklearn.metrics.recall_score(labels, logits.argmax(1), average=None)
    precision = sklearn.metrics.precision_score(labels, logits.argmax(1), average=None, zero_division=np.nan)
    for row, r, p in zip(result.tables[0].rows, recall, precision, strict=True):
        assert row[2].value == pytest.approx(r)
        assert (row[4].value if row[4] else np.nan) == pytest.approx(p, nan_ok=True)


def test_logits_are_the_pipelines(evaluation_context):
    context = evaluation_context()
    images = [context.splits.validation.image(row) for row in context.rows]
    output = context.pipeline.classify(images)
    torch.testing.assert_close(context.logits, output.logits)
    energies, _ = context.energies_and_logits(context.latents, 0)
    torch.testing.assert_close(energies, output.energy)


def test_noised_latents_are_at_their_noise_level(evaluation_context):
    context = evaluation_context("batch_size=2")
    alpha, sigma = context.model.noise_levels(torch.tensor(500))
    noisy = alpha * context.latents + sigma * context.noise(range(7))
    expected = context.model(noisy, 500).logits
    torch.testing.assert_close(context.energies_and_logits(context.latents, 500, noised=True)[1], expected)


def test_calibration_equals_scikit_learn_and_arithmetic(evaluation_context, logits_and_labels):
    context = evaluation_context()
    logits, labels = logits_and_labels
    context.logits, context.labels = torch.from_numpy(logits), labels
    result = evaluate_calibration(context)
    judged = np.random.default_rng(0).permutation(500)[250:]
    temperature = result.metrics["temperature"].value
    for variant, scale in (("as trained", 1), ("temperature scaled", temperature)):
        p, y = scipy.special.softmax(logits[judged] / scale, axis=1), labels[judged]
        confidence, correct = p.max(1), p.argmax(1) == y
        ece = 0.0
        for low in np.arange(15) / 15:
            inside = (confidence > low) & (confidence <= low + 1 / 15)
            if inside.any():
                ece += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
        found = {name.split(",")[0]: m.value for name, m in result.metrics.items() if name.endswith(variant)}
        assert found == pytest.approx(
            {
                "NLL (nats)": sklearn.metrics.log_loss(y, p, labels=range(7)),
                "Brier score": ((p - np.eye(7)[y]) ** 2).sum(axis=1).mean(),
                "ECE (15 bins)": ece,
            },
            rel=1e-5,
        )
    assert result.num_samples == 250


def test_a_temperature_without_optimum_is_called_so(evaluation_context):
    context = evaluation_context()
    for right in (False, True):
        labels = torch.from_numpy(context.labels if right else (context.labels + 1) % 3)
        context.__dict__["logits"] = torch.nn.functional.one_hot(labels, 3).float()
        assert any("it has no optimum" in note for note in evaluate_calibration(context).notes) == right


def test_temperature_is_recovered():
    """Labels drawn from softmax(logits / 2.5)."""
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((20000, 4))
    labels = (scipy.special.softmax(logits / 2.5, axis=1).cumsum(1) < rng.random((20000, 1))).sum(1).clip(max=3)
    assert fit_temperature(logits, labels) == pytest.approx(2.5, rel=0.05)


def test_reliability_bins_count_every_image(logits_and_labels):
    confidence, accuracy, count = reliability_bins(*logits_and_labels, 10)
    assert count.sum() == 500
    full = count > 0
    assert (accuracy[full] @ count[full]) / 500 == pytest.approx(
        (logits_and_labels[0].argmax(1) == logits_and_labels[1]).mean()
    )
    edges = np.arange(11) / 10
    assert np.all((edges[:-1][full] <= confidence[full]) & (confidence[full] <= edges[1:][full]))


# --- the report -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(evaluation_context, tmp_path):
    """A function: suites and settings -> the report on the tiny pipeline, always in the same folder."""
    context = evaluation_context()

    def run(suites, *overrides, pipeline=context.pipeline):
        return evaluate(
            pipeline, context.data, suites, tmp_path / "report", parse_settings([*FAST, *overrides]), "tiny"
        )

    return run


def test_report_survives_a_kill_and_goes_on(run, tmp_path, monkeypatch, capsys):
    """The finished suite is there, whole; the second call adds what is missing and nothing else."""
    module = sys.modules["latent_egc.measuring.study"]

    def killed(context):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(module.SUITES, "calibration", killed)
        with pytest.raises(KeyboardInterrupt):
            run(["classification", "calibration"])
    first = json.loads((tmp_path / "report" / "report.json").read_text())
    assert list(first["suites"]) == ["classification"]
    assert "classification" in (tmp_path / "report" / "report.html").read_text()
    capsys.readouterr()
    report = run(["classification", "calibration"])
    assert "classification: already in the report" in capsys.readouterr().out
    assert list(report.content["suites"]) == ["classification", "calibration"]
    assert report.content["suites"]["classification"] == first["suites"]["classification"]
    run(["classification", "calibration"], "calibration.num_bins=10")
    assert capsys.readouterr().out.count("already in the report") == 1


def test_a_suite_is_measured_again_when_a_file_it_reads_has_changed(run, tmp_path, monkeypatch):
    module, calls = sys.modules["latent_egc.measuring.study"], []
    monkeypatch.setitem(module.SUITES, "ood", lambda context: calls.append(1) or SuiteResult(1, {"n": Metric(1.0)}))
    data_file = tmp_path / "other.yaml"
    for text in ("data: {}", "data: {}", "data: {image_size: 32}"):
        data_file.write_text(text)
        run(["ood"], f"ood.data={data_file}")
    assert len(calls) == 2


def test_a_suite_is_measured_again_when_a_pipeline_it_reads_has_changed(run, tmp_path, monkeypatch):
    module, calls = sys.modules["latent_egc.measuring.study"], []
    found = SuiteResult(1, {"n": Metric(1.0)})
    monkeypatch.setitem(module.SUITES, "robustness", lambda context: calls.append(1) or found)
    plain = tiny_pipeline()
    for change in (0, 0, 1):
        with torch.no_grad():
            next(plain.energy_model.parameters()).add_(change)
        plain.save_pretrained(tmp_path / "run" / "pipeline")
        run(["robustness"], f"robustness.plain={tmp_path / 'run'}")
    assert len(calls) == 2


def test_a_stopped_suite_goes_on_behind_its_last_part(run, tmp_path, monkeypatch):
    """Each position is computed once over both calls, in order; nothing is left behind, and others' parts not used."""
    module, computed, fails = sys.modules["latent_egc.measuring.study"], [], True
    monkeypatch.setattr("latent_egc.measuring.context.ROWS_PER_PART", 4)

    def doubled(positions):
        if fails and positions.stop > 6:
            raise KeyboardInterrupt
        computed.extend(positions)
        return torch.tensor([[2.0 * i] for i in positions])

    def suite(context):
        rows = context.over_in_parts(11, doubled, "double / 2")
        assert rows[:, 0].tolist() == [2.0 * i for i in range(11)]
        return SuiteResult(11, {"n": Metric(1.0)})

    monkeypatch.setitem(module.SUITES, "generation", suite)
    with pytest.raises(KeyboardInterrupt):
        run(["generation"])
    assert computed == [0, 1, 2, 3]
    run(["classification"])  # another suite leaves the parts where they are
    fails = False
    run(["generation"])
    assert computed == list(range(11))
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["figures", "report.html", "report.json"]
    fails = True
    with pytest.raises(KeyboardInterrupt):
        run(["generation"], "generation.num_samples=10")
    computed.clear()
    fails = False
    run(["generation"], "generation.num_samples=12")
    assert computed == list(range(11))


def test_page_without_images_of_the_dataset(run, evaluation_context, tmp_path, monkeypatch, capsys):
    """Called again, the finished report is drawn without them, and with them once more."""
    pictures = [
        Figure("own", "A grid of samples.", b"sampled"),
        Figure("theirs", "Neighbours.", b"real", shows_data=True),
    ]
    result = SuiteResult(1, {"n": Metric(1.0)}, figures=pictures)
    monkeypatch.setitem(sys.modules["latent_egc.measuring.study"].SUITES, "generation", lambda context: result)
    page, context = tmp_path / "report" / "report.html", evaluation_context()
    sampled, real = (base64.b64encode(content).decode() for content in (b"sampled", b"real"))
    run(["generation"])
    assert sampled in page.read_text()
    assert real in page.read_text()
    settings = parse_settings(FAST)
    evaluate(context.pipeline, context.data, ["generation"], page.parent, settings, "tiny", with_data_images=False)
    assert "generation: already in the report" in capsys.readouterr().out
    assert sampled in page.read_text()
    assert real not in page.read_text()
    assert "Left out, as it shows images of the dataset: Neighbours." in page.read_text()
    run(["generation"])
    assert real in page.read_text()


def test_report_says_how_it_was_measured(run):
    report = run(["classification"], "seed=5", "num_images=4")
    record = report.content["suites"]["classification"]
    assert record["num_samples"] == 4
    assert record["settings"]["seed"] == 5
    assert record["settings"]["classification"] == {"num_timesteps": 2}
    assert record["settings"]["data"]["dataset"] == "imagefolder"
    assert {"python", "torch", "diffusers", "latent-egc"} <= set(record["versions"])
    assert record["seconds"] >= 0
    low, high = record["metrics"]["top-1 accuracy"]["interval"]
    assert low <= record["metrics"]["top-1 accuracy"]["value"] <= high
    assert re.search(r"classification +top-1 accuracy +[\d.]+ % ", report.table())


def test_html_is_self_contained_and_escaped(run, tmp_path):
    run(["classification", "calibration"])
    page = (tmp_path / "report" / "report.html").read_text()
    assert re.findall(r'src="(.{15})', page) == ["data:image/png;"] * 3
    assert not re.search(r"https?://|<script|<link|url\(", page)


def test_two_evaluations_of_one_report_keep_each_others_suites(run, tmp_path, monkeypatch):
    """While one suite runs, another process finishes its own."""

    def slow(context):
        run(["classification"])
        return SuiteResult(1, {"n": Metric(1.0)})

    monkeypatch.setitem(sys.modules["latent_egc.measuring.study"].SUITES, "ood", slow)
    assert set(run(["ood"]).content["suites"]) == {"classification", "ood"}
    assert set(json.loads((tmp_path / "report" / "report.json").read_text())["suites"]) == {"classification", "ood"}


def test_another_pipelines_report_is_left_alone(run, tmp_path):
    run(["calibration"])
    before = (tmp_path / "report" / "report.json").read_text()
    with pytest.raises(ConfigError, match="holds a report of another pipeline"):
        run(["calibration"], pipeline=tiny_pipeline(names=("cat", "cow", "dog"), head="inner"))
    assert (tmp_path / "report" / "report.json").read_text() == before
    (tmp_path / "report" / "report.json").write_text("{")
    with pytest.raises(ConfigError, match="is not a report"):
        run(["calibration"])


# --- errors ---------------------------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong(evaluation_context, tmp_path, run):
    context = evaluation_context()
    data = replace(context.data, label_column="label")
    with pytest.raises(ConfigError, match="class 1 is 'cow' in the data and 'dog' in the pipeline"):
        evaluate(tiny_pipeline(), data, ["classification"], tmp_path / "none")
    with pytest.raises(ConfigError, match=r"unknown suite 'calibrate'; did you mean calibration\?"):
        run(["calibrate"])
    with pytest.raises(ConfigError, match=r"calibration.fit_fraction=0.01 of 7 images leaves 0 to fit"):
        run(["calibration"], "calibration.fit_fraction=0.01")
    with pytest.raises(ConfigError, match=r"unknown key num_image; did you mean num_images\?"):
        parse_settings(["num_image=3"])
    unlabelled = tiny_pipeline(num_classes=None, energy_channels=3)
    with pytest.raises(ConfigError, match="--suite classification needs classes"):
        evaluate(unlabelled, data, ["classification"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_command_line(tmp_path, capsys, evaluation_context):
    context = evaluation_context()
    context.pipeline.save_pretrained(tmp_path / "run" / "pipeline")
    arguments = ["evaluate", str(tmp_path / "run"), "--suite", "calibration"]
    assert main([*arguments, "--set", *FAST]) == 2
    assert "is no run with a config.yaml" in capsys.readouterr().err
    data = {"dataset": "imagefolder", "data_dir": context.data.data_dir, "validation_fraction": 1 / 3}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    assert main([*arguments, "--set", *FAST]) == 0
    assert "NLL (nats), as trained" in capsys.readouterr().out
    assert (tmp_path / "run" / "evaluation" / "report.html").exists()
    extractor = ["--suite", "generation", "--features", "none.pt", "other.pt"]
    assert main([*arguments, *extractor]) == 2
    assert "generation.features: no such weights file: none.pt" in capsys.readouterr().err
    (tmp_path / "nodata.yaml").write_text("model: {}")
    assert main([*arguments, "--data", str(tmp_path / "nodata.yaml")]) == 2
    assert "has no data section" in capsys.readouterr().err
