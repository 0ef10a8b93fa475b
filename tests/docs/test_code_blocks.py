"""The documentation's code works: Python runs on tiny pipelines, the parsers take command lines and settings.

A block behind the line `<!-- not run: WHY -->` is left out.
"""

import functools
import inspect
import re
import shlex
import shutil
import subprocess
from importlib import import_module
from textwrap import dedent

import pytest
import yaml
from PIL import Image
from tiny import ROOT, tiny_pipeline
from tiny_runs import run_values

from latent_egc import EGCPipeline, commands
from latent_egc.config import Config, load_config, parse_dataclass
from latent_egc.exchange.export import export
from latent_egc.measuring.study import EVALUATION, PROBING, EvaluationSettings, ProbeSettings
from latent_egc.training.build import resolve_model

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(<!-- not run: .+ -->\n+)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A block that is indented and begins with one of our commands.
INDENTED = re.compile(r"(?<=\n\n)    (?:\w+=\S+ )*(?:latent-egc|accelerate launch|torchrun) .*\n(?:    .*\n)*")
# What the pages call their runs, and how many classes their pipelines have; and what they call pipelines.
RUNS = {"runs/my": 3, "runs/other": 3, "runs/quickstart": 10, "runs/earlier": 10}
PIPELINES = {f"{name}/pipeline": n for name, n in RUNS.items()}
PIPELINES |= {"imagenet256": 1000, "release/imagenette64": 10, "release/cifar10_small": 10}

# No call takes more than so many of these, whatever the page says.
MOST = {"num_inference_steps": 4, "num_steps": 4, "n": 20, "n0": 10}


def blocks(page, language):
    """(line, text) of a page's blocks; shell commands may be indented instead of fenced."""
    content = page.read_text()
    found = (match for match in BLOCK.finditer(content) if match[2] == language and not match[1])
    found = [(content.count("\n", 0, match.start(3)), match[3]) for match in found]
    if language == "bash":
        found += [(content.count("\n", 0, match.start()), dedent(match[0])) for match in INDENTED.finditer(content)]
    return found


def with_blocks(language):
    return [pytest.param(page, id=page.name) for page in PAGES if blocks(page, language)]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A folder with tiny things under the names that the pages use."""
    folder = tmp_path_factory.mktemp("stand_ins")
    for name, num_classes in PIPELINES.items():
        names = ("cat", "dog", "cow") if num_classes == 3 else tuple(map(str, range(num_classes)))
        pipeline = tiny_pipeline(names=names, num_classes=num_classes, class_embedding=name == "imagenet256")
        pipeline.save_pretrained(folder / name)
    export(folder / "runs" / "quickstart", folder / "exported")
    for name in ("photo", "other", "mask"):
        Image.new("RGB", (8, 8), "grey").save(folder / f"{name}.png")
    (folder / "photos").mkdir()
    for name in ("my", "other"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(run_values("runs/new")))
    shutil.copytree(ROOT / "configs", folder / "configs")
    return folder


@pytest.fixture
def workplace(stand_ins, tmp_path, monkeypatch):
    """Its own copy of them to work in."""
    shutil.copytree(stand_ins, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def in_small(method):
    """A pipeline's method with at most `MOST` of what its calls ask for."""

    @functools.wraps(method)
    def call(*arguments, **options):
        bound = inspect.signature(method).bind(*arguments, **options)
        bound.apply_defaults()
        bound.arguments.update(
            {key: min(bound.arguments[key] or most, most) for key, most in MOST.items() if key in bound.arguments}
        )
        return method(*bound.args, **bound.kwargs)

    return call


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_runs_from_the_top_of_a_page_to_its_end(page, workplace, monkeypatch):
    for name, method in inspect.getmembers(EGCPipeline, inspect.isfunction):
        if MOST.keys() & inspect.signature(method).parameters.keys():
            monkeypatch.setattr(EGCPipeline, name, in_small(method))
    names = {}
    for line, text in blocks(page, "python"):
        exec(compile("\n" * line + text, str(page), "exec"), names)


@pytest.mark.parametrize("page", with_blocks("bash"))
def test_commands_can_be_given(page, workplace, monkeypatch):
    given = []
    for verb in commands.VERBS:
        monkeypatch.setattr(import_module(f"latent_egc.commands.{verb}"), "run", given.append)
    for line, text in blocks(page, "bash"):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        for command in text.replace("\\\n", " ").splitlines():
            place = f"{page.name}:{line}: {command}"
            words = shlex.split(command.partition(" > ")[0], comments=True)
            while words and re.match(r"\w+=", words[0]):
                words.pop(0)
            assert known(words, given), place
            while given:
                check_settings(given.pop(), place)


def test_every_verb_is_on_the_page_of_commands():
    text = (ROOT / "docs" / "commands.md").read_text()
    assert [verb for verb in commands.VERBS if f"latent-egc {verb} " not in text] == []


def known(words, given):
    """Whether a command line can be given; what our own parser makes of it is then in `given`."""
    if not words or words[0] in ("export", "hf") or "SLURM_JOB_NODELIST" in " ".join(words):
        return True
    if words[0] == "make":
        return set(words[1:]) <= set(re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.M)[1].split())
    if words[:2] == ["pip", "install"]:
        extras = [name for word in words for name in re.findall(r"\[(.*)\]", word)]
        return all(re.search(rf"^{name} = \[", (ROOT / "pyproject.toml").read_text(), re.M) for name in extras)
    if "train.py" in words:
        return commands.train_main(words[words.index("train.py") + 1 :]) == 0
    if "latent_egc" in words:
        return (
            words[words.index("latent_egc") - 1] == "-m" and commands.main(words[words.index("latent_egc") + 1 :]) == 0
        )
    if words[0] == "latent-egc":
        return commands.main(words[1:]) == 0
    return words[0] == "python" and (ROOT / words[1]).is_file()


def check_settings(options, place):
    """A configuration with its overrides, and a study's suites and settings, are taken."""
    if hasattr(options, "overrides"):
        load_config(options.config, options.overrides)
    for name, settings, suites in (("evaluate", EvaluationSettings, EVALUATION), ("probe", ProbeSettings, PROBING)):
        if options.verb.__name__.endswith(f".{name}"):
            assert set(options.suite.split(",")) <= set(suites), place
            settings.parse(options.set)


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_configurations_have_keys_and_values_that_there_are(page, workplace):
    for _, text in blocks(page, "yaml"):
        config = parse_dataclass(Config, {"model": {}} | yaml.safe_load(text), "")
        model = {key: value for key, value in config.model.items() if key != "init_from"}
        assert resolve_model(model).keys() >= model.keys()
