"""The engine of evaluation and probing: what is run, what is not run again, parts, and the command line."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import save_file
from tiny import tiny_pipeline, write_images
from tiny_studies import FAST_EVALUATION, FAST_PROBE, tiny_unet2d

from latent_egc.commands import main
from latent_egc.config import ConfigError
from latent_egc.measuring.results import Metric, SuiteResult
from latent_egc.measuring.study import EvaluationSettings, ProbeSettings, evaluate, probe
from latent_egc.measuring.suites import calibration, generation, ood, pooling, robustness
from latent_egc.pipelines.schedulers import solver


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
        command += ["--data", tmp_path / "data.yaml", "--output", tmp_path / str(processes), "--set", *FAST_EVALUATION]
        subprocess.run([*command, "batch_size=2"], env=environment, check=True, capture_output=True)
        report = json.loads((tmp_path / str(processes) / "report.json").read_text())
        assert report["subject"]["device"] == f"{processes} process(es) on cpu"
        found.append({(s, m): v["value"] for s, r in report["suites"].items() for m, v in r["metrics"].items()})
        assert report["suites"]["classification"]["num_samples"] == 7
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_report_survives_a_kill_and_goes_on(run, tmp_path, monkeypatch, capsys):
    """The finished suite is there, whole; the second call adds what is missing and nothing else."""

    def killed(context, settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibration, "run", killed)
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


def test_what_was_begun_under_an_earlier_rule_of_noise_is_measured_anew(run, tmp_path, capsys):
    """The suite that is asked for, and no other; the report stays readable throughout."""
    run(["classification", "calibration"])
    path = tmp_path / "report" / "report.json"
    content = json.loads(path.read_text())
    for record in content["suites"].values():
        del record["settings"]["noise"]
        record["settings"]["files"] = {}
    path.write_text(json.dumps(content))
    capsys.readouterr()
    report = run(["classification"])
    message = "classification: its report does not say by what rule noise was drawn, measured anew"
    assert message in capsys.readouterr().out
    assert report.content["suites"]["calibration"] == content["suites"]["calibration"]
    assert report.content["suites"]["classification"]["settings"]["noise"] == "by seed and row"
    run(["classification"])
    assert "classification: already in the report" in capsys.readouterr().out


@pytest.mark.parametrize("suite", ["generation", "composition"])
def test_samples_are_drawn_anew_by_another_sampler(suite, evaluation_context, run, extractor, tmp_path, capsys):
    """Solver, steps and scale that a setting leaves to the pipeline are part of what was measured."""
    pipeline = evaluation_context().pipeline
    settings = [f"{suite}.num_samples=5", f"{suite}.num_judge_images=14"]
    own = f"generation.features=[{extractor}]" if suite == "generation" else "composition.num_corrector_steps=1"
    pipeline.register_to_config(default_num_inference_steps=2)
    run([suite], own, *settings, pipeline=pipeline)
    run([suite], own, *settings, pipeline=pipeline)
    assert capsys.readouterr().out.count("already in the report") == 1
    pipeline.register_to_config(default_num_inference_steps=3)
    report = run([suite], own, *settings, pipeline=pipeline)
    assert any("with 3 steps" in note for note in report.content["suites"][suite]["notes"])
    pipeline.scheduler = solver("Euler", pipeline.scheduler)
    run([suite], own, *settings, pipeline=pipeline)
    pipeline.register_to_config(default_guidance_scale=5.0)
    run([suite], own, *settings, pipeline=pipeline)
    assert "already in the report" not in capsys.readouterr().out
    path = tmp_path / "report" / "report.json"
    content = json.loads(path.read_text())
    del content["suites"][suite]["settings"]["sampler"]
    path.write_text(json.dumps(content))
    run([suite], own, *settings, pipeline=pipeline)
    message = f"{suite}: its report does not say by what sampler the images were drawn, measured anew"
    assert message in capsys.readouterr().out


def test_a_suite_is_measured_again_when_a_file_it_reads_has_changed(run, tmp_path, monkeypatch):
    calls, found = [], SuiteResult(1, {"n": Metric(1.0)})
    monkeypatch.setattr(ood, "run", lambda context, settings: calls.append(1) or found)
    data_file = tmp_path / "other.yaml"
    meant_alike = ("data: {}", "# words\ndata: {num_workers: 2, dataset: 'digits'}\nmodel: {}", "data:\n  mixup: 1.0")
    for text in (*meant_alike, "data: {validation_fraction: 0.5}"):
        data_file.write_text(text)
        run(["ood"], f"ood.data={data_file}")
    assert len(calls) == 2


def test_a_data_sections_meaning_decides_what_is_measured_again(evaluation_context, tmp_path, monkeypatch):
    """Not how training reads the images, nor the keys of an older report, which had the effect of their defaults."""
    context, calls = evaluation_context(), []
    found = SuiteResult(1, {"n": Metric(1.0)})
    monkeypatch.setattr(generation, "run", lambda context, settings: calls.append(1) or found)

    def run(**changes):
        folder = tmp_path / "report"
        evaluate(context.pipeline, replace(context.data, **changes), ["generation"], folder, None, "tiny")

    run()
    run(num_workers=3, horizontal_flip=True, latent_cache="latents", mixup=0.5, label_fraction=0.5)
    path = tmp_path / "report" / "report.json"
    content = json.loads(path.read_text())
    settings = content["suites"]["generation"]["settings"]
    for key in ("samples", "reference"):
        assert settings["generation"].pop(key) is None
    settings["data"] |= {"num_views": 4, "num_workers": 0}
    del settings["data"]["label_column"]
    path.write_text(json.dumps(content))
    run()
    assert len(calls) == 1
    run(label_column="label")
    assert len(calls) == 2


def test_what_a_stopped_suite_left_is_used_by_data_of_the_same_meaning(evaluation_context, tmp_path, monkeypatch):
    context, computed, fails = evaluation_context(), [], True
    monkeypatch.setattr("latent_egc.measuring.context.ROWS_PER_PART", 2)

    def suite(context, settings):
        def numbers(positions):
            if fails and positions.start >= 2:
                raise KeyboardInterrupt
            computed.extend(positions)
            return torch.tensor(positions)

        return SuiteResult(len(context.over_in_parts(4, numbers, "count")), {"n": Metric(1.0)})

    monkeypatch.setattr(generation, "run", suite)
    with pytest.raises(KeyboardInterrupt):
        evaluate(context.pipeline, context.data, ["generation"], tmp_path / "report")
    fails = False
    data = replace(context.data, num_workers=2, random_resized_crop=None)
    evaluate(context.pipeline, data, ["generation"], tmp_path / "report")
    assert computed == [0, 1, 2, 3]


def test_a_suite_is_measured_again_when_an_extractor_of_transformers_has_changed(run, tmp_path, monkeypatch):
    calls, found = [], SuiteResult(1, {"n": Metric(1.0)})
    monkeypatch.setattr(generation, "run", lambda context, settings: calls.append(1) or found)
    (tmp_path / "dinov2").mkdir()
    for value in (0.0, 0.0, 1.0):
        save_file({"weight": torch.full((2,), value)}, tmp_path / "dinov2" / "model.safetensors")
        run(["generation"], f"generation.features=[{tmp_path / 'dinov2'}]")
    assert len(calls) == 2


def test_a_suite_is_measured_again_when_a_pipeline_it_reads_has_changed(run, tmp_path, monkeypatch):
    calls, found = [], SuiteResult(1, {"n": Metric(1.0)})
    monkeypatch.setattr(robustness, "run", lambda context, settings: calls.append(1) or found)
    plain = tiny_pipeline()
    for change in (0, 0, 1):
        with torch.no_grad():
            next(plain.energy_model.parameters()).add_(change)
        plain.save_pretrained(tmp_path / "run" / "pipeline")
        run(["robustness"], f"robustness.plain={tmp_path / 'run'}")
    assert len(calls) == 2


def test_a_stopped_suite_goes_on_behind_its_last_part(run, tmp_path, monkeypatch):
    """Each position is computed once over both calls, in order; nothing is left behind, and others' parts not used."""
    computed, fails = [], True
    monkeypatch.setattr("latent_egc.measuring.context.ROWS_PER_PART", 4)

    def doubled(positions):
        if fails and positions.stop > 6:
            raise KeyboardInterrupt
        computed.extend(positions)
        return torch.tensor([[2.0 * i] for i in positions])

    def suite(context, settings):
        rows = context.over_in_parts(11, doubled, "double / 2")
        assert rows[:, 0].tolist() == [2.0 * i for i in range(11)]
        return SuiteResult(11, {"n": Metric(1.0)})

    monkeypatch.setattr(generation, "run", suite)
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


def test_two_evaluations_of_one_report_keep_each_others_suites(run, tmp_path, monkeypatch):
    """While one suite runs, another process finishes its own."""

    def slow(context, settings):
        run(["classification"])
        return SuiteResult(1, {"n": Metric(1.0)})

    monkeypatch.setattr(ood, "run", slow)
    assert set(run(["ood"]).content["suites"]) == {"classification", "ood"}
    assert set(json.loads((tmp_path / "report" / "report.json").read_text())["suites"]) == {"classification", "ood"}


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
        EvaluationSettings.parse(["num_image=3"])
    unlabelled = tiny_pipeline(num_classes=None, energy_channels=3)
    with pytest.raises(ConfigError, match="--suite classification needs classes"):
        evaluate(unlabelled, data, ["classification"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_command_line(tmp_path, capsys, evaluation_context):
    context = evaluation_context()
    context.pipeline.save_pretrained(tmp_path / "run" / "pipeline")
    arguments = ["evaluate", str(tmp_path / "run"), "--suite", "calibration"]
    assert main([*arguments, "--set", *FAST_EVALUATION]) == 2
    assert "is no run with a config.yaml" in capsys.readouterr().err
    data = {"dataset": "imagefolder", "data_dir": context.data.data_dir, "validation_fraction": 1 / 3}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    assert main([*arguments, "--set", *FAST_EVALUATION]) == 0
    assert "NLL (nats), as trained" in capsys.readouterr().out
    assert (tmp_path / "run" / "evaluation" / "report.html").exists()
    extractor = ["--suite", "generation", "--features", "none.pt", "other.pt"]
    assert main([*arguments, *extractor]) == 2
    assert "generation.features: no such weights file: none.pt" in capsys.readouterr().err
    (tmp_path / "nodata.yaml").write_text("model: {}")
    assert main([*arguments, "--data", str(tmp_path / "nodata.yaml")]) == 2
    assert "has no data section" in capsys.readouterr().err


def test_probe_report_survives_a_kill_and_goes_on(probe_context, tmp_path, monkeypatch, capsys):
    made = probe_context(extract=False)

    def run(*overrides):
        settings = ProbeSettings.parse([*FAST_PROBE, *overrides])
        arguments = (made.denoiser, made.data, ["heatmap", "pooling"], tmp_path / "report", settings)
        return probe(*arguments, Accelerator(cpu=True))

    def killed(context, settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pooling, "run", killed)
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


def test_command_line_of_probe(probe_context, tmp_path, capsys):
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
        (["--suite", "heatmaps"], "unknown suite 'heatmaps'; did you mean heatmap?"),
        (["--suite", "comparison"], "--suite comparison needs an energy network, got UNet2DModel"),
    ):
        assert main([*arguments, *option, "--set", *FAST_PROBE]) == 2
        assert message in capsys.readouterr().err
