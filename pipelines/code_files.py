"""The code beside a pipeline's weights, with which a folder loads where latent_egc is not installed."""

import inspect
import json
import re
import sys
from importlib import import_module
from importlib.util import resolve_name
from pathlib import Path


def add_code_files(folder: Path, pipeline_class: type, network_class: type) -> None:
    """Puts the code files beside the weights and names them in model_index.json as diffusers wants it.

    The folders of this machine that parts were loaded from are left out.

    Does nothing for a class of somebody else's: that is loaded where it can be imported.

    Args:
        folder: with a model_index.json.
        pipeline_class: of this package, or of a repository's own code that diffusers has loaded.
        network_class: likewise.
    """
    places = {pipeline_class: folder, network_class: folder / "energy_model"}
    if not all(kind.__module__.split(".")[0] in ("latent_egc", "diffusers_modules") for kind in places):
        return
    for kind, place in places.items():
        place.mkdir(exist_ok=True)
        (place / f"{_stem(kind)}.py").write_text(code_file(kind.__module__))
    index_file = folder / "model_index.json"
    for file in (index_file, *folder.glob("*/config.json")):
        config = json.loads(file.read_text())
        if Path(config.get("_name_or_path") or "").is_absolute():  # where it was loaded from is no stranger's business
            del config["_name_or_path"]
        if file == index_file:
            config["_class_name"] = [_stem(pipeline_class), pipeline_class.__name__]
            config["energy_model"] = [_stem(network_class), network_class.__name__]
        file.write_text(json.dumps(config, indent=2) + "\n")


def _stem(kind: type) -> str:
    return kind.__module__.rpartition(".")[2]


def code_file(module: str) -> str:
    """The text of a module's code file; a repository's own, which is one already, travels on as it is."""
    if module.split(".")[0] == "latent_egc":
        return bundle(module)
    return Path(sys.modules[module].__file__).read_text()


def bundle(module: str, included: set[str] | None = None) -> str:
    """A module's source, behind that of the modules of this package that it imports, each once, in order of need.

    One file, because diffusers downloads none but the one that model_index.json names. A test keeps such imports to
    two forms, of names from `.x` and of names from `latent_egc.ROOM.x`, one line each.

    Args:
        module: its dotted name.
        included: modules that are there already; those that are added here join them.
    """
    included = set() if included is None else included
    included.add(module)
    own, bundled = [], ""
    for line in inspect.getsource(import_module(module)).splitlines(keepends=True):
        imported = re.match(r"from (\.\w+|latent_egc\.[\w.]+) import ", line)
        if imported is None:
            own.append(line)
        elif (name := resolve_name(imported[1], module.rpartition(".")[0])) not in included:
            bundled += bundle(name, included)
    return bundled + f"# {module.replace('.', '/')}.py\n" + "".join(own) + "\n\n"
