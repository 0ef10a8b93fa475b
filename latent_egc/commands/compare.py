"""Put reports of `evaluate` or `probe` beside each other: a table for a paper, and their curves over one axis.

example: latent-egc compare runs/a/evaluation ours=runs/b/evaluation --latex --only accuracy FD- --output comparison
"""

import argparse
from pathlib import Path

from latent_egc.commands.evaluate import extra_packages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which reports, which of their numbers, and in which form."""
    parser.add_argument(
        "reports", nargs="+", metavar="REPORT", help="a report's folder or its JSON file, or NAME=REPORT"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="a Markdown table (the default)")
    form.add_argument("--latex", action="store_true", help="a LaTeX table for booktabs, and pictures as .pdf")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="metrics whose name or suite holds one of these words"
    )
    parser.add_argument(
        "--output", type=Path, default=None, metavar="DIR", help="a folder for the table and the pictures of the curves"
    )


def run(options: argparse.Namespace) -> None:
    """Prints the table, or writes it and the pictures."""
    with extra_packages():
        from latent_egc.measuring.report_comparison import compare, draw, latex, markdown, read_reports
    from latent_egc.atomic import replace_text

    comparison = compare(read_reports(options.reports), options.only)
    table = latex(comparison) if options.latex else markdown(comparison)
    if options.output is None:
        print(table, end="")
    else:
        options.output.mkdir(parents=True, exist_ok=True)
        file = options.output / ("table.tex" if options.latex else "table.md")
        replace_text(file, table)
        for path in [file, *draw(comparison, options.output, "pdf" if options.latex else "png")]:
            print(f"written: {path}")
        for note in comparison.notes:  # they stand in the table too
            print(f"note: {note}")
