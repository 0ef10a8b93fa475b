"""The folder of a Space."""

import ast

import pytest
import yaml
from tiny import ROOT, tiny_pipeline

from latent_egc import EGCPipeline, __version__
from latent_egc.config import ConfigError
from latent_egc.demo.space import GRADIO_VERSION, write_space


def arguments_of(folder) -> list[str]:
    """What app.py calls the command line with."""
    calls = [node for node in ast.walk(ast.parse((folder / "app.py").read_text())) if isinstance(node, ast.Call)]
    return next(ast.literal_eval(call.args[0]) for call in calls if getattr(call.func, "id", "") == "main")


def front_matter(folder) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_a_local_pipeline_is_copied_in(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "cats: dogs")
    assert write_space(str(tmp_path / "cats: dogs"), tmp_path / "space")
    assert arguments_of(tmp_path / "space") == ["demo", "./pipeline", "--host", "0.0.0.0", "--port", "7860"]
    assert EGCPipeline.from_pretrained(tmp_path / "space" / "pipeline").id2label[1] == "dog"
    assert (tmp_path / "space" / "requirements.txt").read_text() == f"latent-egc[demo]=={__version__}\n"
    facts = front_matter(tmp_path / "space")
    assert facts == {
        "title": "latent-egc: cats: dogs",
        "sdk": "gradio",
        "sdk_version": GRADIO_VERSION,
        "app_file": "app.py",
    }
    assert f"gradio=={GRADIO_VERSION}\n" in (ROOT / "constraints.txt").read_text()


def test_a_pipeline_of_the_hub_is_named(tmp_path):
    assert not write_space("user/name", tmp_path / "space")
    assert arguments_of(tmp_path / "space")[:2] == ["demo", "user/name"]
    assert front_matter(tmp_path / "space")["models"] == ["user/name"]
    assert sorted(path.name for path in (tmp_path / "space").iterdir()) == ["README.md", "app.py", "requirements.txt"]


def test_nothing_is_written_where_something_is_or_nothing_can_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such run or pipeline"):
        write_space(str(tmp_path / "none"), tmp_path / "space")
    assert not (tmp_path / "space").exists()
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="already holds something"):
        write_space("user/name", tmp_path / "space")
