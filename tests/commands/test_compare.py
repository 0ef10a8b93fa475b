"""The verb compare."""

from command_line import fails
from tiny import ROOT

from latent_egc.commands import main

REPORTS = [str(ROOT / "docs" / "reports" / f"{name}.json") for name in ("digits", "cifar10_small")]


def test_table_is_printed_or_written(tmp_path, capsys):
    assert main(["compare", *REPORTS, "--only", "top-1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("|  | quickstart | cifar10\\_small |")
    assert "top-1 accuracy | 99.72 %" in printed
    assert printed.count("classification: measured of other images") == 1
    assert main(["compare", f"ours={REPORTS[0]}", REPORTS[1], "--latex", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"written: {tmp_path / 'out' / 'table.tex'}" in printed
    assert "note: classification: measured of other images" in printed
    assert " & ours & cifar10\\_small \\\\" in (tmp_path / "out" / "table.tex").read_text()


def test_pictures_are_written(run, tmp_path, capsys):
    run(["classification"])
    assert main(["compare", str(tmp_path / "report"), "--output", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"table.md", "classification_noise_level.png"}


def test_errors(tmp_path, capsys):
    fails(capsys, ["compare", tmp_path / "none.json"], "none.json is not a report")
    fails(capsys, ["compare", REPORTS[0], "--only", "zzz"], "no metric in these reports")
    fails(capsys, ["compare", REPORTS[0], REPORTS[0]], "two reports are called 'quickstart'")
