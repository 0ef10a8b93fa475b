"""The API reference has what the package says is public, and every module of what is built on."""

import pytest
from tiny import ROOT

import latent_egc

PAGES = {path.stem: path.read_text() for path in (ROOT / "docs" / "api").glob("*.md")}


def test_every_public_name_is_listed():
    assert [name for name in latent_egc.__all__ if f"`{name}`" not in PAGES["index"]] == []


@pytest.mark.parametrize("room", ["models", "methods"])
def test_every_module_is_on_its_page(room):
    names = [path.stem for path in (ROOT / "latent_egc" / room).glob("*.py") if path.stem != "__init__"]
    assert [name for name in names if f":: latent_egc.{room}.{name}\n" not in PAGES[room]] == []
