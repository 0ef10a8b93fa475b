"""The shape of the package: import layers, what the wheel holds, plain text."""

import ast
import subprocess
import sys
import zipfile
from importlib.util import find_spec

import pytest
from tiny import ROOT

LAYERS = [
    {"models", "pipelines"},
    {"config", "autoencoders", "data", "objective"},
    {"latent_cache", "validation", "figures", "run_folder", "hub", "convert", "warm_start"}
    | {"measurement", "benchmark", "evaluation"},
    {"training", "probing"},
    {"cli"},
]
# What travels to the Hub imports nothing that a machine with diffusers alone has not.
TRAVELLING = {"torch", "diffusers"}


def sources():
    """Dotted module name below latent_egc -> its file."""
    files = {}
    for folder, prefix in ((ROOT / "latent_egc", ""), (ROOT / "pipelines", "pipelines.")):
        for path in folder.rglob("*.py"):
            files[prefix + ".".join(path.relative_to(folder).with_suffix("").parts)] = path
    return files


def imports(path):
    """Absolute names of what a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def layer_of(name):
    """The layer of a module; None for latent_egc itself, which only gathers names."""
    top = name.split(".")[0]
    return next((i for i, layer in enumerate(LAYERS) if top in layer), None)


def test_every_module_has_a_layer():
    assert {name for name in sources() if layer_of(name) is None} == {"__init__"}


@pytest.mark.parametrize("name", sorted(sources()))
def test_modules_import_only_lower_layers(name):
    for imported in imports(sources()[name]):
        package, _, rest = imported.partition(".")
        if package == "latent_egc" and name != "__init__" and rest:
            assert layer_of(rest) <= layer_of(name), f"{name} imports {imported}"
        if layer_of(name) == 0:
            assert package in TRAVELLING | set(sys.stdlib_module_names), f"{name} imports {imported}"


def test_sources_are_ascii_and_hold_no_hidden_constant():
    others = [path for pattern in ("tests/*.py", "scripts/*.py", "configs/*.yaml") for path in ROOT.glob(pattern)]
    for path in [*sources().values(), *others]:
        assert path.read_text().isascii(), path
    for path in sources().values():
        assert "0.18215" not in path.read_text(), path


@pytest.mark.skipif(find_spec("build") is None, reason="needs the package build")
def test_wheel_holds_only_latent_egc(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"latent_egc"}
    for name in ("pipelines/pipeline_egc.py", "models/unet.py", "assets/digits_vae/config.json", "cli.py"):
        assert f"latent_egc/{name}" in names
    assert "latent_egc/assets/digits_vae/diffusion_pytorch_model.safetensors" in names
    assert not [name for name in names if name.startswith(("tests", "scripts", "configs"))]


def test_public_names():
    import latent_egc

    assert {"EGCPipeline", "EGCUNet", "EGCObjective"} <= set(latent_egc.__all__)
    for name in latent_egc.__all__:
        assert getattr(latent_egc, name).__doc__
