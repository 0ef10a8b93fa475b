"""The page: what it is made of, what it refuses, and that no file of this machine can be had through it."""

import json

import pytest
from PIL import Image
from tiny import gradient_image
from tiny_demo import tiny_network

pytest.importorskip("gradio", reason="needs gradio, of the extra demo")

import httpx  # gradio brings it

from latent_egc.demo.interface import MAX_WAITING, build, launch

COMPUTING = ("classify_upload", "classify_drawing", "generate", "run_inpaint", "run_edit", "run_flip", "explore")


def parts(page) -> set[str]:
    """The elem_ids of what can be seen."""
    shown = [component["props"] for component in page.config["components"] if component["props"].get("visible", True)]
    return {properties.get("elem_id") for properties in shown}


def test_the_page_has_what_the_network_can_do(tmp_path):
    everything = parts(build({"mine": tiny_network(tmp_path / "images")}))
    assert {"probabilities", "samples", "editor", "energies", "chances", "nearest"} <= everything
    assert {"inpaint-button", "edit-class-button", "counterfactual-button", "edit-example"} <= everything
    bare = parts(build({"mine": tiny_network(tmp_path, references=False, num_classes=None, energy_channels=3)}))
    assert {"samples", "editor", "energies", "inpaint-button"} <= bare
    assert not {"probabilities", "chances", "nearest", "classes", "edit-class-button", "edit-example"} & bare


def test_the_sliders_begin_at_the_pipelines_own_settings(tmp_path):
    network = tiny_network(tmp_path / "images")
    network.pipeline.register_to_config(default_num_inference_steps=7, default_guidance_scale=2.5)
    components = [component["props"] for component in build({"mine": network}).config["components"]]
    for label, own in (("Steps", 7), ("Guidance scale", 2.5)):
        assert {properties["value"] for properties in components if properties.get("label") == label} == {own}


def test_several_networks_are_linked_and_compute_one_at_a_time(tmp_path):
    networks = {name: tiny_network(tmp_path, references=False) for name in ("first", "second")}
    pages = build(networks)
    assert [title for _, title, shown in pages.pages[1:] if shown] == ["second"]
    (bar,) = (part["props"] for part in pages.config["components"] if part["type"] == "navbar")
    assert (bar["main_page_name"], bar["visible"]) == ("first", True)
    computing = [call for call in pages.fns.values() if call.name in COMPUTING]
    assert len(computing) == 2 * len(COMPUTING)
    assert {(call.concurrency_id, call.concurrency_limit) for call in computing} == {("network", 1)}
    alone = build({"first": networks["first"]})
    (bar,) = (part["props"] for part in alone.config["components"] if part["type"] == "navbar")
    assert not bar["visible"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    limit = Image.MAX_IMAGE_PIXELS
    folder = tmp_path_factory.mktemp("demo")
    page = launch({"mine": tiny_network(folder / "images")})
    yield page
    page.close()
    Image.MAX_IMAGE_PIXELS = limit


def ask(page, name: str, *data) -> dict:
    """What the server answers to a press of a button, by its handler's name."""
    number = next(i for i, call in enumerate(page.config["dependencies"]) if call["api_name"] == name)
    base = f"{page.local_url}gradio_api/queue"
    question = {"fn_index": number, "data": data, "session_hash": name}
    httpx.post(f"{base}/join", json=question).raise_for_status()
    with httpx.stream("GET", f"{base}/data", params={"session_hash": name}, timeout=60) as stream:
        for line in stream.iter_lines():
            answer = json.loads(line.removeprefix("data:") or "{}")
            if answer.get("msg") == "process_completed":
                return answer
    raise AssertionError("no answer")


def test_it_listens_at_this_machine_alone_and_lets_few_wait(page):
    assert page.local_url.startswith("http://127.0.0.1:")
    assert page.share_url is None
    assert not page.analytics_enabled
    assert page._queue.max_size == MAX_WAITING
    computing = [call for call in page.fns.values() if call.name in COMPUTING]
    assert {call.name for call in computing} == set(COMPUTING)
    assert {(call.concurrency_id, call.concurrency_limit) for call in computing} == {("network", 1)}


def test_no_file_of_this_machine_is_served(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("secret")
    gradient_image().save(tmp_path / "image.png")
    for path in ("/etc/passwd", tmp_path / "config.yaml", "config.yaml", "image.png", "../../etc/passwd"):
        for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/"):
            answer = httpx.get(f"{page.local_url}{route}{path}")
            assert answer.status_code in (403, 404), answer.url
            assert "secret" not in answer.text
            assert "root:" not in answer.text


def test_no_file_of_this_machine_is_taken_for_an_upload(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gradient_image().save(tmp_path / "image.png")
    mark = {"meta": {"_type": "gradio.FileData"}}
    for path in ("/etc/passwd", str(tmp_path / "image.png"), "image.png", f"{page.local_url}config"):
        assert not ask(page, "explore", {"path": path} | mark)["success"], path
    with open(tmp_path / "image.png", "rb") as file:
        (uploaded,) = httpx.post(f"{page.local_url}gradio_api/upload", files={"files": file}).json()
    answer = ask(page, "explore", {"path": uploaded} | mark)
    assert answer["success"]
    assert len(answer["output"]["data"][2]) == 6  # the nearest training images


def test_errors_are_shown(page):
    for data, message in (
        ([[0, 1, 2], 9, 2.0, 0.0, 1.0, 4, 0], "at most 24 images are allowed here, got 27"),
        ([[0], 1, 2.0, 0.5, 0.4, 4, 0], "guidance_interval must be two shares"),
        ([[0], 1, 2.0, 0.0, 1.0, 10**6, 0], "greater than maximum value 200"),
    ):
        answer = ask(page, "generate", *data)
        assert not answer["success"]
        assert message in answer["output"]["error"]
    nothing_drawn = {"background": None, "layers": [], "composite": None}
    answer = ask(page, "run_flip", nothing_drawn, 0, 0.3, 0.8, 4)
    assert "there is no image yet" in answer["output"]["error"]
