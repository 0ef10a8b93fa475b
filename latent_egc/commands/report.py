"""Draw the page of a report, which `evaluate` or `probe` wrote, from its JSON file.

example: latent-egc report docs/reports/digits.json
"""

import argparse
from pathlib import Path

from latent_egc.commands.evaluate import extra_packages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which report, and how much of it is shown."""
    parser.add_argument("report", type=Path, help="a report's folder, or its JSON file; the page is written beside it")
    parser.add_argument(
        "--no-data-images",
        action="store_true",
        help="leave out the pictures that show images of the dataset, so that the page can be published",
    )


def run(options: argparse.Namespace) -> None:
    """Writes the page; pictures that are not there are left out."""
    with extra_packages():
        from latent_egc.measuring.report import draw_page

    print(f"page written: {draw_page(options.report, not options.no_data_images)}")
