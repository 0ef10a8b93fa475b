"""Reports beside each other: the table in both forms, what is called the best, and the curves."""

import json
import re

import pytest
from tiny import ROOT

from latent_egc.config import ConfigError
from latent_egc.measuring.report_comparison import compare, draw, latex, markdown, read_reports


def record(metrics, num_samples=100, curves=(), **settings):
    """A suite's record in report.json; `metrics` are name -> value, or (value, low, high, percent)."""
    stored = {}
    for name, value in metrics.items():
        value, low, high, percent = value if isinstance(value, tuple) else (value, None, None, False)
        stored[name] = {"value": value, "interval": None if low is None else [low, high], "percent": percent}
    figures = [{"file": "figures/classification_noise_level.png", "caption": "", "curves": list(curves)}]
    data = settings.pop("data", {"dataset": "digits"})
    settings = {"seed": 0, "data": data} | settings
    return {"num_samples": num_samples, "metrics": stored, "settings": settings, "figures": figures}


def report(pipeline="runs/a", **suites):
    return {"subject": {"pipeline": pipeline, "fingerprint": "f"}, "suites": suites}


A = {"top-1 accuracy": (0.5, 0.4, 0.6, True), "NLL (nats), as trained": 1.0, "temperature": 2.0, "FD-x_y": 3.0}
B = {"top-1 accuracy": (0.7, 0.6, 0.8, True), "NLL (nats), as trained": 1.5, "temperature": 1.0, "FD-x_y": 3.0}


def best_of(comparison):
    return {row.name: row.best for row in comparison.rows if row.best}


def test_the_best_is_the_largest_or_the_smallest_by_what_is_measured():
    found = compare({"a": report(s=record(A)), "b": report(s=record(B))})
    assert best_of(found) == {"top-1 accuracy": (1,), "NLL (nats), as trained": (0,), "FD-x_y": (0, 1)}
    assert found.notes == []


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"data": {"dataset": "other"}}, "data.dataset"),
        ({"data": {"dataset": "digits", "validation_fraction": 0.5}}, "data.validation_fraction"),
        ({"num_samples": 90}, "another number of them"),
    ],
)
def test_numbers_of_other_images_have_no_best(other, key):
    found = compare({"a": report(s=record(A)), "b": report(s=record(B, **other))})
    assert best_of(found) == {}
    (note,) = found.notes
    assert key in note
    assert "none is called the best" in note


def test_what_changes_no_number_is_no_difference():
    other = {"data": {"dataset": "digits", "num_workers": 3, "mixup": 1.0}, "seed": 1, "batch_size": 8}
    found = compare({"a": report(s=record(A)), "b": report(s=record(B, **other))})
    assert found.notes == []
    assert best_of(found)
    found = compare({"a": report(s=record(A)), "b": report(s=record(B, s={"steps": 5}))})
    assert found.notes == ["s: measured with different s.steps"]
    assert best_of(found)


def test_markdown():
    found = compare({"a": report(one=record(A)), "b|2": report(one=record(B, seed=3), two=record({"error": 1.0}))})
    assert markdown(found) == (
        "|  | a | b\\|2 |\n| --- | ---: | ---: |\n"
        "| **one** | n = 100, seed 0 | n = 100, seed 3 |\n"
        "| top-1 accuracy | 50.00 % (40.00 to 60.00 %) | **70.00 %** (60.00 to 80.00 %) |\n"
        "| NLL (nats), as trained | **1** | 1.5 |\n"
        "| temperature | 2 | 1 |\n"
        "| FD-x\\_y | **3** | **3** |\n"
        "| **two** |  | n = 100, seed 0 |\n"
        "| error |  | 1 |\n"
    )


def test_latex():
    found = compare({"a_1": report(one=record(A)), "b": report(one=record(B))}, only=["ACCURACY", "fd-"])
    assert latex(found) == (
        "% needs \\usepackage{booktabs}\n\\begin{tabular}{lrr}\n\\toprule\n & a\\_1 & b \\\\\n"
        "\\midrule\n\\textit{one} & n = 100, seed 0 & n = 100, seed 0 \\\\\n"
        "top-1 accuracy & 50.00 \\% {\\footnotesize (40.00 to 60.00 \\%)} & "
        "\\textbf{70.00 \\%} {\\footnotesize (60.00 to 80.00 \\%)} \\\\\n"
        "FD-x\\_y & \\textbf{3} & \\textbf{3} \\\\\n\\bottomrule\n\\end{tabular}\n"
    )


def test_curves_of_all_reports_over_one_axis(tmp_path):
    """A file for each quantity; a report without curves, one from before there were any, is left out of it."""
    curve = {"x_name": "t", "y_name": "accuracy", "aims_at_diagonal": True}
    points = [0.5, {"value": 0.4, "interval": [0.3, 0.5], "percent": False}]
    first = {**curve, "series": {"": [[0, 1], points]}}
    second = {**curve, "series": {"x": [[0, 2], points], "y": [[1], [0.5]]}}
    reports = {"a": report(classification=record(A, curves=[first])), "old": report(classification=record(A))}
    reports["b"] = report(classification=record(B, curves=[second]))
    found = compare(reports)
    assert {name: list(curves) for name, curves in found.curves.items()} == {"classification_noise_level": ["a", "b"]}
    assert found.curves["classification_noise_level"]["a"].series[""][1][1].interval == (0.3, 0.5)
    for kind, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        (path,) = draw(found, tmp_path, kind)
        assert path == tmp_path / f"classification_noise_level.{kind}"
        assert path.read_bytes().startswith(magic)
    before = path.read_bytes()
    draw(found, tmp_path, "pdf")
    assert path.read_bytes() == before
    assert compare(reports, only=["nll"]).curves == found.curves
    reports["a"]["suites"]["other"] = record({"error": 1.0})
    assert compare(reports, only=["error"]).curves == {}


def test_a_measured_reports_curves_are_read(run, tmp_path):
    run(["classification", "calibration"])
    found = compare(read_reports([str(tmp_path / "report"), f"again={tmp_path / 'report' / 'report.json'}"]))
    assert found.names == ["tiny", "again"]
    assert set(found.curves) == {"classification_noise_level", "calibration_reliability"}
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    (stored,) = content["suites"]["calibration"]["figures"][0]["curves"]
    assert set(stored["series"]) == {"as trained", "temperature scaled"}
    assert found.curves["classification_noise_level"]["again"].series[""][0] == [0, 999]


def test_names_of_reports(tmp_path):
    def write(name, pipeline):
        (tmp_path / name).write_text(json.dumps(report(pipeline, s=record(A))))
        return str(tmp_path / name)

    paths = [write("1.json", "runs/a/pipeline"), write("2.json", "runs/b/pipeline"), write("3=.json", "c")]
    assert list(read_reports(paths)) == ["a/pipeline", "b/pipeline", "c"]
    assert list(read_reports([f"ours={paths[0]}", paths[1]])) == ["ours", "pipeline"]
    with pytest.raises(ConfigError, match=r"two reports are called 'pipeline'; .* NAME=REPORT"):
        read_reports([paths[0], paths[0]])
    with pytest.raises(ConfigError, match="is not a report"):
        read_reports([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"no metric in these reports has any of \['zzz'\] in its name"):
        compare(read_reports(paths), only=["zzz"])


@pytest.mark.parametrize("form", [markdown, latex])
def test_published_reports_compare(form):
    """Every metric of each of them stands in the table; they are of other images, so that nothing is in bold."""
    names = ("digits", "cifar10_transformer", "imagenette64")
    reports = read_reports([f"{name}={ROOT / 'docs' / 'reports' / name}.json" for name in names])
    comparison = compare(reports)
    assert best_of(comparison) == {}
    rows = {row.name for row in comparison.rows}
    assert rows.issuperset(m for c in reports.values() for r in c["suites"].values() for m in r["metrics"])
    assert len(re.findall(r"99\.72 .?%", form(comparison))) == 1
