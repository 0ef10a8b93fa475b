"""The card of an exported folder: the numbers of the run's report, where it is of these very weights."""

import json
import warnings

import pytest
from tiny import tiny_pipeline

from latent_egc.commands import main
from latent_egc.data.autoencoders import fingerprint
from latent_egc.exchange.export import export
from latent_egc.measuring.report import Report
from latent_egc.measuring.results import Figure, Metric, SuiteResult


@pytest.fixture
def run(tmp_path):
    """A run's folder with a validation, and a report of its pipeline."""
    folder = tmp_path / "run"
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(folder / "pipeline")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 5, "validation_denoising_loss": 0.25}) + "\n")
    (folder / "samples").mkdir()
    (folder / "samples" / "step-00000005.png").write_bytes(b"the run's")
    name = f"{fingerprint(pipeline.energy_model)} with {fingerprint(pipeline.vae)}"
    report = Report(folder / "evaluation", {"pipeline": "run", "fingerprint": name})
    accuracy = {"top-1 accuracy": Metric(0.8125, (0.75, 0.875), percent=True), "top-5 accuracy": Metric(1.0)}
    report.add("classification", SuiteResult(1000, accuracy, notes=["At timestep 0."]), {}, {}, 1.0)
    figure = Figure("samples", "The first ones drawn.", b"the report's")
    report.add("generation", SuiteResult(200, {"FD-tiny": Metric(1123.96)}, figures=[figure]), {}, {}, 1.0)
    return folder


def test_it_says_what_the_report_says(run, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        folder = export(run, tmp_path / "exported", training_data="Ten digits, CC BY 4.0.")
    card = (folder / "README.md").read_text()
    assert "## Trained on\n\nTen digits, CC BY 4.0.\n\n## Measured\n" in card
    assert "### classification, n = 1,000\n" in card
    assert "| top-1 accuracy | 81.2 % | 75.0 % to 87.5 % |\n| top-5 accuracy | 1 |  |\n\n- At timestep 0.\n" in card
    assert "### generation, n = 200\n" in card
    assert "| FD-tiny | 1124 |  |" in card
    assert "validation_denoising_loss" not in card
    assert (folder / "samples.png").read_bytes() == b"the report's"
    main(["info", str(folder)])
    said = capsys.readouterr().out
    assert "top-1 accuracy 81.2 % (classification, model card)" in said
    assert "FD-tiny 1124 (generation, model card)" in said


def test_of_an_unfinished_run_the_picture_is_of_its_checkpoint_too(run, tmp_path):
    checkpoint = run / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    (run / "pipeline").rename(checkpoint / "pipeline")
    (checkpoint / "checkpoint.json").write_text(json.dumps({"global_step": 5, "score": 0.5}))
    (run / "evaluation" / "report.json").unlink()
    (run / "samples" / "step-00000009.png").write_bytes(b"a later one's")
    folder = export(run, tmp_path / "exported")
    assert (folder / "samples.png").read_bytes() == b"the run's"


def test_it_loads_from_where_it_was_exported_to(run, tmp_path, monkeypatch):
    """Where that is relative: an absolute folder would be this machine's."""
    monkeypatch.chdir(tmp_path)
    assert 'from_pretrained("release/digits"' in (export(run, "release/digits") / "README.md").read_text()
    assert 'from_pretrained("other"' in (export(run, tmp_path / "other") / "README.md").read_text()


@pytest.mark.parametrize("what", ["of other weights", "no report"])
def test_a_report_that_is_not_of_these_weights_is_left_out(what, run, tmp_path):
    file = run / "evaluation" / "report.json"
    content = json.loads(file.read_text())
    content["subject"]["fingerprint"] = "EGCUNet-0 with pixels"
    file.write_text(json.dumps(content) if what == "of other weights" else "{}")
    with pytest.warns(UserWarning, match=rf"evaluation/report\.json is {what}"):
        folder = export(run, tmp_path / "exported")
    card = (folder / "README.md").read_text()
    assert "| validation_denoising_loss | 0.25 |" in card
    assert "top-1" not in card
    assert "## Trained on" not in card
    assert (folder / "samples.png").read_bytes() == b"the run's"
