"""The demo as its user meets it, in a headless browser.

It shows the quickstart's network where there is one (`make quickstart`), else a tiny one of random weights. With
DEMO_SCREENSHOTS=FOLDER the pictures of docs/demo.md are written there.
"""

import os
from pathlib import Path

import pytest
from PIL import Image
from tiny import ROOT, gradient_image
from tiny_demo import tiny_network

pytest.importorskip("gradio", reason="needs gradio, of the extra demo")
pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")

from playwright import sync_api as playwright

from latent_egc import EGCPipeline
from latent_egc.config import load_data_config
from latent_egc.demo.interface import launch
from latent_egc.demo.network import Network
from latent_egc.demo.references import read_references

CHROMIUM = Path("/usr/bin/chromium")
QUICKSTART = ROOT / "runs" / "quickstart"
SECONDS = 60_000  # milliseconds that anything may take

pytestmark = [
    pytest.mark.demo,
    pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"needs {CHROMIUM}: apt-get install -y chromium"),
]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    if not (QUICKSTART / "pipeline").is_dir():
        return tiny_network(tmp_path_factory.mktemp("demo") / "images")
    pipeline = EGCPipeline.from_pretrained(QUICKSTART / "pipeline")
    return Network(pipeline, read_references(pipeline, load_data_config(QUICKSTART / "config.yaml"), 1000))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])  # root in containers
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(network):
    limit = Image.MAX_IMAGE_PIXELS
    page = launch({"quickstart": network})
    yield page.local_url
    page.close()
    Image.MAX_IMAGE_PIXELS = limit


@pytest.fixture
def page(browser, served):
    """A fresh page; what it asks for and logs is in order at the end."""
    page = browser.new_page(viewport={"width": 1180, "height": 760})
    page.set_default_timeout(SECONDS)
    asked, errors = set(), []
    page.on("request", lambda request: asked.add(request.url))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(served)
    page.wait_for_selector("#title h1")
    yield page
    page.close()
    assert all(url.startswith((served, "data:", "blob:")) for url in asked), "the page loads nothing from elsewhere"
    assert errors == []


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def draw(page, where: str, points) -> None:
    """A stroke through points in [0, 1]^2 of an editor's canvas."""
    canvas = page.locator(f"{where} canvas").first
    canvas.wait_for(state="visible")
    page.wait_for_timeout(1500)  # it settles its size
    box = canvas.bounding_box()
    places = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=3)  # drawing without a graphics card takes its time
    page.mouse.up()


def take_example(page, name: str, times: int = 1) -> None:
    """Presses a button that gives a held-out image."""
    for _ in range(times):
        with page.expect_response(lambda response: "queue/data" in response.url):
            page.click(f"#{name}")
        page.wait_for_timeout(1500)


def pictures(page, gallery: str, count: int) -> list[str]:
    """The addresses of a gallery's pictures, when there are `count`."""
    images = page.locator(f"#{gallery} .grid-container img")
    playwright.expect(images).to_have_count(count, timeout=SECONDS)
    for number in range(count):
        playwright.expect(images.nth(number)).to_have_js_property("complete", True)
        assert images.nth(number).evaluate("image => image.naturalWidth") >= 8
    return [images.nth(number).get_attribute("src") for number in range(count)]


def save(page, name: str) -> None:
    """A picture for the documentation, where that is asked for."""
    if folder := os.environ.get("DEMO_SCREENSHOTS"):
        page.mouse.move(5, 5)
        page.wait_for_timeout(800)
        page.screenshot(path=Path(folder) / f"{name}.jpg", type="jpeg", quality=85, full_page=True)


def test_an_upload_is_classified(page, network, tmp_path):
    gradient_image(48, 40).save(tmp_path / "upload.png")
    page.set_input_files("#classify-image input[type=file]", tmp_path / "upload.png")
    page.wait_for_selector("#energy .meter")
    expected = network.classify(gradient_image(48, 40))
    likeliest = max(expected.probabilities, key=expected.probabilities.get)
    playwright.expect(page.locator("#probabilities h2")).to_have_text(likeliest)
    assert f"Energy {expected.energy:,.1f}" in page.locator("#energy").inner_text()


def test_a_drawing_is_classified(page):
    open_tab(page, "Drawing")
    draw(page, "#drawing", [(0.35, 0.2), (0.6, 0.15), (0.6, 0.4), (0.45, 0.5), (0.65, 0.6), (0.6, 0.85), (0.35, 0.8)])
    page.wait_for_selector("#energy .meter")
    assert page.locator("#probabilities h2").inner_text()


def test_generating_shows_the_denoising_and_then_the_samples(page):
    open_tab(page, "Generate")
    seen = page.evaluate_handle(
        """() => { const seen = []; new MutationObserver(() => seen.push(document.querySelector('#sampling').innerText))
        .observe(document.querySelector('#sampling'), {subtree: true, childList: true, characterData: true});
        return seen; }"""
    )
    page.click("#generate-button")
    playwright.expect(page.locator("#sampling")).to_have_text("done", timeout=SECONDS)
    assert any("denoising" in text for text in seen.json_value())
    assert len(set(pictures(page, "samples", 4 * page.locator("#classes .token").count()))) > 1
    save(page, "generate")


def test_what_a_mask_marks_is_painted_anew(page):
    open_tab(page, "Edit")
    page.click("#inpaint-button")
    playwright.expect(page.get_by_text("there is no image yet")).to_be_visible(timeout=SECONDS)
    take_example(page, "edit-example")
    page.click("#inpaint-button")
    playwright.expect(page.get_by_text("nothing is marked")).to_be_visible(timeout=SECONDS)
    draw(page, "#editor", [(0.4, 0.35), (0.6, 0.35)])
    page.wait_for_timeout(1000)
    page.click("#inpaint-button")
    assert len(set(pictures(page, "edited", 4))) == 4
    assert "to the bit" in page.locator("#edit-summary").inner_text()


def test_a_counterfactual_shows_before_after_and_difference(page):
    open_tab(page, "Edit")
    take_example(page, "edit-example")
    page.click("#counterfactual-button")
    assert len(set(pictures(page, "edited", 3))) == 3
    assert "It was" in page.locator("#edit-summary").inner_text()
    save(page, "edit")


def test_exploring_shows_curves_and_neighbours(page):
    open_tab(page, "Explore")
    take_example(page, "explore-image-example")
    pictures(page, "nearest", 6)
    for plot in ("energies", "chances"):
        playwright.expect(page.locator(f"#{plot} canvas, #{plot} svg.marks").first).to_be_visible(timeout=SECONDS)
    save(page, "explore")


def test_several_networks_have_a_page_each(browser, network, tmp_path):
    other = tiny_network(tmp_path / "images", references=False)
    pages = launch({"quickstart": network, "other": other})
    page = browser.new_page()
    page.set_default_timeout(SECONDS)
    page.goto(pages.local_url)
    playwright.expect(page.locator("#title h1")).to_have_text("latent-egc: quickstart")
    page.locator("nav").get_by_text("other", exact=True).click()
    playwright.expect(page.locator("#title h1")).to_have_text("latent-egc: other")
    gradient_image(48, 40).save(tmp_path / "upload.png")
    page.set_input_files("#classify-image input[type=file]", tmp_path / "upload.png")
    page.wait_for_selector("#energy b")
    expected = other.classify(gradient_image(48, 40))
    assert f"Energy {expected.energy:,.1f}" in page.locator("#energy").inner_text()
    page.close()
    pages.close()
