"""The verb demo, as far as it goes without a browser."""

import pytest
from command_line import fails
from tiny import tiny_pipeline

from latent_egc.commands import demo, main


def test_a_space_is_written_without_gradio(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    tiny_pipeline().save_pretrained(tmp_path / "mine")
    assert main(["demo", str(tmp_path / "mine"), "--space", str(tmp_path / "space")]) == 0
    assert f"a Space with the pipeline in it written to {tmp_path / 'space'}" in capsys.readouterr().out
    assert main(["demo", "user/name", "--space", str(tmp_path / "other")]) == 0
    assert "a Space that loads user/name written" in capsys.readouterr().out


def test_errors(tmp_path, capsys, monkeypatch):
    fails(capsys, ["demo", "user/name", "--port", "70000"], "--port must be in [1, 65535], got 70000")
    fails(capsys, ["demo", "user/name", "--num-references=-1"], "--num-references must be at least 0, got -1")
    for option in ("--space=s", "--data=d.yaml"):
        fails(capsys, ["demo", "user/a", "user/b", option], "--space and --data are for one pipeline, got 2")
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    fails(capsys, ["demo"], "the demo needs gradio", 'pip install "latent-egc[demo]"')  # before anything is trained
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(demo, "find_spec", lambda name: object())
    fails(capsys, ["demo", tmp_path / "none"], "no such run or pipeline")


@pytest.mark.parametrize("host", [[], ["--host", "0.0.0.0"]])
def test_it_listens_at_this_machine_alone_unless_told(host, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gradio", reason="needs gradio")
    from latent_egc.demo import interface

    asked = []

    class Page:
        local_url = "http://127.0.0.1:1/"

        def block_thread(self):
            asked.append("blocked")

    monkeypatch.setattr(interface, "launch", lambda pages, *arguments: asked.append((*pages, *arguments)) or Page())
    tiny_pipeline().save_pretrained(tmp_path / "mine")
    assert main(["demo", str(tmp_path / "mine"), "--port=7999", *host]) == 0
    assert asked == [("mine", host[1] if host else "127.0.0.1", 7999), "blocked"]
    assert "the demo is at http://127.0.0.1:1/" in capsys.readouterr().out


def test_without_a_name_it_opens_what_is_at_hand(tmp_path, capsys, monkeypatch):
    """Only where there is nothing it trains."""
    pytest.importorskip("gradio", reason="needs gradio")
    from latent_egc.demo import interface, opening

    class Page:
        local_url = "http://127.0.0.1:1/"

        def block_thread(self):
            pass

    opened = []
    monkeypatch.setattr(interface, "launch", lambda pages, *arguments: opened.append(list(pages)) or Page())
    monkeypatch.setattr(opening, "trained_quickstart", lambda config: str(tmp_path / "trained"))
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained("trained")
    main(["demo"])
    for folder in ("release/one", "release/two", "other/one"):
        tiny_pipeline().save_pretrained(folder)
    main(["demo"])
    main(["demo", "release/one", "trained"])
    main(["demo", "release/one", "other/one"])
    assert opened == [["trained"], ["one", "two"], ["one", "trained"], ["release/one", "other/one"]]
    capsys.readouterr()
    fails(capsys, ["demo", "release/one", tmp_path / "none"], "no such run or pipeline")
    fails(capsys, ["demo", "--data=d.yaml"], "--data is for one pipeline, at hand are release/one, release/two")
