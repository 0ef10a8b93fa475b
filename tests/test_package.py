"""The shape of the package: rooms and what they import, sizes, what the wheel holds, plain text."""

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec, resolve_name

import pytest
from tiny import ROOT

# Imports run one way: a room imports from itself and from those above it in this list.
LAYERS = [
    {"models"},
    {"methods"},
    {"pipelines"},
    {"objective", "strict_yaml", "renamed_keys", "config", "atomic"},
    {"data"},
    {"training"},
    {"exchange"},
    {"measuring"},
    {"demo"},
    {"commands", "cli", "__main__"},
]
# What travels to the Hub imports nothing that a machine with diffusers alone has not, and is concatenated there.
TRAVELLING = ("models", "methods", "pipelines")
# ... and what makes of a folder a model of transformers, which imports that too.
FOR_TRANSFORMERS = "latent_egc.exchange.image_classification"
MAXIMAL_LINES, MAXIMAL_FUNCTION_LINES = 400, 80


def sources():
    """Dotted module name -> its file."""
    files = {}
    for folder, package in ((ROOT / "latent_egc", "latent_egc"), (ROOT / "pipelines", "latent_egc.pipelines")):
        for path in folder.rglob("*.py"):
            files[".".join([package, *path.relative_to(folder).with_suffix("").parts])] = path
    return files


def imported_modules(name):
    """Absolute names of the modules from which a module imports, wherever in it."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield resolve_name("." * node.level + (node.module or ""), name.rpartition(".")[0])


def room_of(name):
    """The room of one of our modules, None for latent_egc itself, which only gathers names."""
    return (name.removesuffix(".__init__").split(".")[1:] or [None])[0]


SOURCES = sources()
CONCATENATED = {name for name in SOURCES if room_of(name) in TRAVELLING and not name.endswith("__init__")}
CONCATENATED.add(FOR_TRANSFORMERS)
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def layer_of(name):
    """The layer of one of our modules."""
    return next(i for i, layer in enumerate(LAYERS) if room_of(name) in layer)


def test_every_module_has_a_room():
    assert {room_of(name) for name in SOURCES} == {None}.union(*LAYERS)


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - {"latent_egc.__init__"}))
def test_modules_import_only_from_lower_rooms(name):
    for imported in imported_modules(name):
        package = imported.split(".")[0]
        if package == "latent_egc" and room_of(imported) is not None:
            assert layer_of(imported) <= layer_of(name), f"{name} imports {imported}"
        if room_of(name) in TRAVELLING or name == FOR_TRANSFORMERS:
            allowed = {"torch", "diffusers", "latent_egc", *sys.stdlib_module_names}
            allowed |= {"transformers", "safetensors"} if name == FOR_TRANSFORMERS else set()
            assert package in allowed, f"{name} imports {imported}"
            assert package != "latent_egc" or room_of(imported) in TRAVELLING, f"{name} imports {imported}"


@pytest.mark.parametrize("name", sorted(CONCATENATED))
def test_what_travels_imports_what_travels_in_lines_that_export_can_inline(name):
    """`from .x import NAME` within a room, `from latent_egc.ROOM.x import NAME` from another, x a module's file."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("latent_egc") for alias in node.names), node.lineno
        if not isinstance(node, ast.ImportFrom) or not (node.level or node.module.startswith("latent_egc")):
            continue
        imported = resolve_name("." * node.level + node.module, name.rpartition(".")[0])
        place = f"{name}:{node.lineno} imports {imported}"
        assert imported in SOURCES, place
        assert (node.level == 1) == (room_of(imported) == room_of(name)), place
        assert node in TREES[name].body, place
        assert node.lineno == node.end_lineno, place
        assert not any(alias.asname for alias in node.names), place


def test_names_are_unique_in_what_is_concatenated():
    """A name at the top of a module, defined there or imported from elsewhere, means one thing in all of them."""
    meanings = {}
    for name in sorted(CONCATENATED):
        for node in TREES[name].body:
            found = {}
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found = {node.name: name}
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found = {leaf.id: name for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                origin = ""
                if isinstance(node, ast.ImportFrom):
                    origin = resolve_name("." * node.level + node.module, name.rpartition(".")[0])
                found = {alias.asname or alias.name: origin or alias.name for alias in node.names}
            for top_level, meaning in found.items():
                assert meanings.setdefault(top_level, meaning) == meaning, f"{top_level} in {name}"


def test_configuration_loads_no_torch():
    command = "import sys, latent_egc.config, latent_egc.atomic; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_modules_and_functions_are_short(name):
    assert len(SOURCES[name].read_text().splitlines()) <= MAXIMAL_LINES
    for node in ast.walk(TREES[name]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
            lines = node.end_lineno - node.lineno + 1
            lines -= 0 if docstring is None else docstring.end_lineno - docstring.lineno + 1
            assert lines <= MAXIMAL_FUNCTION_LINES, f"{node.name} has {lines} lines"


def test_sources_are_ascii_and_hold_no_hidden_constant():
    patterns = ("tests/**/*.py", "examples/*.py", "experiments/*.py", "configs/*.yaml", "docs/*.md", "*.md", "*.py")
    for path in [*SOURCES.values(), *(path for pattern in patterns for path in ROOT.glob(pattern))]:
        assert path.read_text().isascii(), path
    for path in SOURCES.values():
        assert "0.18215" not in path.read_text(), path


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert not (module or "").split(".")[-1].startswith("test_"), path


def test_every_promise_names_a_test_that_there_is():
    text = (ROOT / "docs" / "security.md").read_text()
    for row in re.findall(r"^\| .* \|$", text, flags=re.MULTILINE):
        path = None
        for name in re.findall(r"`((?:tests/|test_)[\w/.:]*)`", row):
            path, function = name.partition("::")[::2] if name.startswith("tests/") else (path, name)
            assert (ROOT / path).exists(), name
            files = [ROOT / path] if (ROOT / path).is_file() else []
            assert not function or any(f"def {function}(" in file.read_text() for file in files), name


@pytest.mark.skipif(find_spec("build") is None, reason="needs the package build")
def test_wheel_holds_only_latent_egc_and_the_sdist_its_tests(tmp_path):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("tests", "configs", "docs", "examples", "experiments")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    kept = {str(path.relative_to(ROOT)) for path in files if not {"__pycache__", "_build"} & {*path.parts}}
    kept |= {"train.py", "Makefile", "constraints.txt", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"}
    assert kept <= held
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"latent_egc"}
    assert {f"{name.replace('.', '/')}.py" for name in SOURCES} <= names
    for asset in ("py.typed", "measuring/report.html.j2", "assets/digits_vae/config.json", "assets/digits.yaml"):
        assert f"latent_egc/{asset}" in names
    assert "latent_egc/assets/digits_vae/diffusion_pytorch_model.safetensors" in names


def test_every_place_names_the_same_version():
    import latent_egc

    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, flags=re.MULTILINE)[1] == latent_egc.__version__
    assert f"\n## {latent_egc.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names():
    import latent_egc

    assert (
        {"EGCPipeline", "EGCUNet", "EGCTransformer", "EGCObjective"} <= set(latent_egc.__all__) <= set(dir(latent_egc))
    )
    for name in latent_egc.__all__:
        assert getattr(latent_egc, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'EGCPipelines'"):
        latent_egc.EGCPipelines  # noqa: B018


def test_importing_the_package_loads_no_torch():
    command = (
        "import sys, latent_egc; assert 'torch' not in sys.modules; latent_egc.EGCUNet; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", command], check=True)
