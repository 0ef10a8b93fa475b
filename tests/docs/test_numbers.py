"""The tables of results say what the reports say; a measured number stands in one place and in the README's table."""

import json
import re
from collections import Counter

import pytest
from tiny import ROOT

from latent_egc.measuring.report import read_metric

REPORTS = {  # by the column's name
    "digits": "digits",
    "Imagenette": "imagenette64_long",
    "CIFAR-10": "cifar10_64",
    "CIFAR-10 in pixels": "cifar10_small",
}
# A row's beginning -> the suite and the name of the metric of each of its numbers.
JUDGED = "generation", r"class agreement by .*"
JUDGE = "generation", r"the judge's accuracy on decoded validation images"
README_ROWS = {
    "accuracy": [("classification", "top-1 accuracy")],
    "samples of the requested class": [JUDGED],
    "real images that the judge": [JUDGE],
    "recall": [("generation", r"recall-[^,]*")],
    "error under 15": [("corruption", "mean error")],
    "AUROC of the energy": [("ood", "AUROC, energy, clean latents")],
}
RESULTS_ROWS = {
    "top-1 accuracy": [("classification", "top-1 accuracy")],
    "top-5 accuracy": [("classification", "top-5 accuracy")],
    "NLL in nats": [("calibration", r"NLL \(nats\), as trained")],
    "NLL, temperature scaled": [("calibration", r"NLL \(nats\), temperature scaled")],
    "ECE, 15 bins": [("calibration", r"ECE \(15 bins\), as trained")],
    "ECE, temperature scaled": [("calibration", r"ECE \(15 bins\), temperature scaled")],
    "temperature": [("calibration", "temperature")],
    "error without corruption": [("corruption", "error without corruption")],
    "mean error under 15": [("corruption", "mean error")],
    "... by noise": [("corruption", "mean error, noise")],
    "... by blur": [("corruption", "mean error, blur")],
    "... by weather": [("corruption", "mean error, weather")],
    "... by digital": [("corruption", "mean error, digital")],
    "AUROC, energy of clean latents": [("ood", "AUROC, energy, clean latents")],
    "AUROC, energy at timestep 100": [("ood", "AUROC, energy at timestep 100")],
    "AUROC, maximum probability": [("ood", "AUROC, maximum probability")],
    "bits per dimension of": [("likelihood", "bits per dimension")],
    "... under N(0, I)": [("likelihood", r"bits per dimension under N\(0, I\)")],
    "FD-SqueezeNet to the training": [("generation", "FD-squeezenet1_1")],
    "... of validation images": [("generation", "FD-squeezenet1_1, validation images through the autoencoder")],
    "KID-SqueezeNet": [("generation", "KID-squeezenet1_1")],
    "precision, recall": [("generation", r"precision-[^,]*"), ("generation", r"recall-[^,]*")],
    "of the requested class": [JUDGED],
    "the judge's own": [JUDGE],
}
NOT_IN_REPORTS = {"training", "images classified", "out of distribution", "guided samples"}


def table(page, after):
    """The first table behind a heading: its columns, and row -> cells."""
    lines = page.read_text().partition(after)[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    columns, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end])
    return columns[1:], [(row[0], row[1:]) for row in rows]


def metric(report, suite, name):
    found = json.loads((ROOT / "docs" / "reports" / f"{report}.json").read_text())["suites"][suite]["metrics"]
    (name,) = (other for other in found if re.fullmatch(name, other))
    return read_metric(found[name])


def assert_says(cell, metrics):
    """Each number of a cell is the report's, rounded to as many digits as it shows."""
    shown = re.findall(r"-?\d[\d,]*\.?\d*", cell)
    stored = []
    for one in metrics:
        values = [one.value, *(one.interval or ())] if "(" in cell else [one.value]
        stored += [100 * value if one.percent else value for value in values]
    assert len(shown) in (len(stored), 1), cell  # an interval need not be shown
    for text, value in zip(shown, stored, strict=False):
        digits = len(text.partition(".")[2])
        assert abs(float(text.replace(",", "")) - value) <= 0.5001 * 10**-digits, f"{cell}, the report has {value}"


@pytest.mark.parametrize(
    ("page", "heading", "meanings"),
    [("README.md", "## Results", README_ROWS), ("docs/results.md", "## What evaluation finds", RESULTS_ROWS)],
    ids=["README", "results"],
)
def test_a_table_of_results_says_what_the_reports_say(page, heading, meanings):
    columns, rows = table(ROOT / page, heading)
    reports = [REPORTS[column.split(",")[0]] for column in columns]
    seen = set()
    for row, cells in rows:
        if any(row.startswith(start) for start in NOT_IN_REPORTS):
            continue
        start = max((start for start in meanings if row.startswith(start)), key=len)
        seen.add(start)
        for report, cell in zip(reports, cells, strict=True):
            assert_says(cell, [metric(report, *meaning) for meaning in meanings[start]])
    assert seen == meanings.keys()


def test_the_table_of_attacks_says_what_the_report_says():
    (_, *columns), rows = table(ROOT / "docs" / "results.md", "## Under attack")
    attack = ""
    for row, (eps, *cells) in rows:
        attack = row.replace(",", "") or attack
        name = "no attack" if attack == "none" else f"{attack} {eps.removesuffix('.0')}"
        for column, cell in zip(columns, cells, strict=True):
            report = "cifar10_64" if "latents" in column else "cifar10_transformer"
            network = "plain" if "plain" in column else "EGC"
            assert_says(cell, [metric(report, "robustness", f"{network}, {name}")])


def test_a_number_with_an_interval_stands_in_one_place():
    """But in the README's table, and where it is 0 or 100 %, which many are."""
    interval = re.compile(r"(?:\d+\.\d+ %|0\.\d{3}) \(\d[\d.]* to \d[\d.]*\)")
    pages = sorted((ROOT / "docs").glob("*.md"))
    found = Counter(number for page in pages for number in interval.findall(page.read_text()))
    assert len(found) > 50
    assert not [number for number, times in found.items() if times > 1 and not number.startswith(("0.0 %", "100.0 %"))]
