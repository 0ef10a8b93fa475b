"""The report: what it holds, its page, whose it is."""

import base64
import html
import json
import re

import pytest
from tiny import ROOT, tiny_pipeline

from latent_egc.commands import main
from latent_egc.config import ConfigError
from latent_egc.measuring.results import Figure, Metric, SuiteResult
from latent_egc.measuring.suites import generation


def test_page_without_images_of_the_dataset(run, tmp_path, monkeypatch, capsys):
    """Called again, the finished report is drawn without them, and with them once more."""
    pictures = [
        Figure("own", "A grid of samples.", b"sampled"),
        Figure("theirs", "Neighbours.", b"real", shows_data=True),
    ]
    result = SuiteResult(1, {"n": Metric(1.0)}, figures=pictures)
    monkeypatch.setattr(generation, "run", lambda context, settings: result)
    page = tmp_path / "report" / "report.html"
    sampled, real = (base64.b64encode(content).decode() for content in (b"sampled", b"real"))
    run(["generation"])
    assert sampled in page.read_text()
    assert real in page.read_text()
    run(["generation"], with_data_images=False)
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


def test_another_pipelines_report_is_left_alone(run, tmp_path):
    run(["calibration"])
    before = (tmp_path / "report" / "report.json").read_text()
    with pytest.raises(ConfigError, match="holds a report of another pipeline"):
        run(["calibration"], pipeline=tiny_pipeline(names=("cat", "cow", "dog"), head="inner"))
    assert (tmp_path / "report" / "report.json").read_text() == before
    (tmp_path / "report" / "report.json").write_text("{")
    with pytest.raises(ConfigError, match="is not a report"):
        run(["calibration"])


@pytest.mark.parametrize("name", ["digits", "cifar10_transformer", "imagenette64"])
def test_pages_of_published_reports(tmp_path, capsys, name):
    """Of a report whose pictures are elsewhere; every metric stands in it."""
    path = tmp_path / f"{name}.json"
    path.write_text((ROOT / "docs" / "reports" / f"{name}.json").read_text())
    assert main(["report", str(path)]) == 0
    assert f"page written: {tmp_path / name}.html" in capsys.readouterr().out
    page = (tmp_path / f"{name}.html").read_text()
    content = json.loads(path.read_text())
    for suite, record in content["suites"].items():
        assert f'<section id="{suite}">' in page
        for metric in record["metrics"]:
            assert f"<td>{metric}</td>" in html.unescape(page)
        for figure in record["figures"]:
            assert f"Left out, as {figure['file']} is not there" in page


def test_page_of_a_reports_folder(run, tmp_path, capsys):
    run(["classification"])
    page = tmp_path / "report" / "report.html"
    before = page.read_text()
    page.unlink()
    assert main(["report", str(page.parent)]) == 0
    assert page.read_text() == before
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a report" in capsys.readouterr().err
