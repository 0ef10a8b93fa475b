"""The demo's page: what is shown and what a press of a button calls. What is computed is in `network.py`."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gradio as gr
import pandas
from PIL import Image

from latent_egc.demo.network import (
    HIGH,
    LOW,
    MAX_IMAGES,
    MAX_PIXELS,
    MAX_STEPS,
    THIS_IMAGE,
    Edited,
    Network,
    enlarged,
    read_upload,
)

MAX_FILE_SIZE, MAX_WAITING = "20mb", 16  # of an upload; calls in the queue
CANVAS = 320  # pixels, of the drawing board
ANY_CLASS = -1
ONE_AT_A_TIME = {"concurrency_id": "network", "concurrency_limit": 1}  # of all that compute
GALLERY = {"show_label": False, "height": "auto", "format": "png", "object_fit": "contain", "buttons": ["download"]}
COLOURS = {THIS_IMAGE: "#4f46e5", LOW: "#cbd5e1", HIGH: "#94a3b8"}
STYLE = """
.gradio-container {max-width: 1120px !important; margin: auto;}
#title {padding: 0.6rem 0.2rem 0 0.2rem;}
#title h1 {font-weight: 650; letter-spacing: -0.02em; margin-bottom: 0.1rem;}
.note {opacity: 0.75; font-size: 0.9rem;}
.meter {position: relative; height: 10px; border-radius: 5px; margin: 0.9rem 0 0.3rem 0;
  background: linear-gradient(90deg, #6366f1, #a5b4fc 45%, #fcd34d 75%, #ef4444);}
.meter span {position: absolute; top: -4px; width: 4px; height: 18px; border-radius: 2px; margin-left: -2px;
  background: var(--body-text-color); box-shadow: 0 0 0 2px var(--background-fill-primary);}
.ends {display: flex; justify-content: space-between; font-size: 0.8rem; opacity: 0.7;}
.grid-wrap {min-height: 0 !important; max-height: none !important;}
footer {display: none !important;}
"""


def launch(networks: Mapping[str, Network], host: str = "127.0.0.1", port: int | None = None) -> gr.Blocks:
    """Serves a page for each network by a thread; `block_thread` of what comes back waits until it is interrupted.

    Args:
        networks: what is tried, by the title of its page.
        host: the address it listens at; the default is this machine alone.
        port: None: the first that is free from 7860 on.

    Returns:
        The pages, the first one at their `local_url`.

    Raises:
        OSError: the port cannot be had.
    """
    # Pillow's own limit, beyond which no file is decoded, drawings too; gradio reads them before we see them.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # an error comes at twice as many
    pages = build(networks)
    pages.queue(max_size=MAX_WAITING)
    pages.launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        allowed_paths=[],
        max_file_size=MAX_FILE_SIZE,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        footer_links=[],
        ssr_mode=False,
        theme=_theme(),
        css=STYLE,
    )
    return pages


def build(networks: Mapping[str, Network]) -> gr.Blocks:
    """The pages, not yet served; of several the bar above has a link to each."""
    (first, network), *others = networks.items()
    with gr.Blocks(title=f"latent-egc: {first}", analytics_enabled=False, delete_cache=(3600, 3600)) as pages:
        gr.Navbar(main_page_name=first, visible=bool(others))
        _page(network, first)
    for number, (title, network) in enumerate(others, start=2):
        with pages.route(title, f"/{number}"):
            _page(network, title)
    return pages


def _page(network: Network, title: str) -> None:
    gr.Markdown(f"# latent-egc: {title}\n{_facts(network)}", elem_id="title")
    if network.class_names:
        with gr.Tab("Classify", id="classify"):
            _classify_tab(network)
    with gr.Tab("Generate", id="generate"):
        _generate_tab(network)
    with gr.Tab("Edit", id="edit"):
        _edit_tab(network)
    with gr.Tab("Explore", id="explore"):
        _explore_tab(network)


def _theme() -> gr.Theme:
    """Fonts of the reader's own system: the page asks no other server for any."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Soft(primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", **fonts)


def _facts(network: Network) -> str:
    """A line on the network."""
    model, size = network.pipeline.energy_model, network.pipeline.image_size
    classes = f", {len(network.class_names)} classes" if network.class_names else ""
    facts = f"{model.num_parameters() / 1e6:.2f} M parameters, {size} px{classes}"
    return f"One energy network ({facts}): it classifies by its output and paints by its gradient."


# --- the tabs -------------------------------------------------------------------------------------------------------


def _classify_tab(network: Network) -> None:
    with gr.Row():
        with gr.Column():
            with gr.Tab("Image"):
                image = _upload(network, "classify-image")
            with gr.Tab("Drawing"):
                drawing = _drawing_board(network)
        with gr.Column():
            label = gr.Label(label="Probabilities", num_top_classes=5, elem_id="probabilities")
            energy = gr.HTML(elem_id="energy")

    def classify(picture: Image.Image | None) -> tuple[dict[str, float] | None, str]:
        if picture is None:
            return None, ""
        found = network.classify(picture)
        return found.probabilities, _meter(found.energy, found.percentile, network)

    def classify_upload(path: str | None) -> tuple[dict[str, float] | None, str]:
        return classify(path and read_upload(path))

    def classify_drawing(drawn: dict[str, Any] | None) -> tuple[dict[str, float] | None, str]:
        return classify(drawn and drawn["composite"])

    options = {"outputs": [label, energy], "show_progress": "hidden", "trigger_mode": "always_last"} | ONE_AT_A_TIME
    image.change(_shown(classify_upload), image, **options)
    drawing.input(_shown(classify_drawing), drawing, **options)


def _generate_tab(network: Network) -> None:
    names = network.class_names
    with gr.Row():
        with gr.Column(scale=2):
            chosen = gr.Dropdown(
                _choices(names),
                value=list(range(min(4, len(names)))),
                multiselect=True,
                label="Classes",
                info="none: any, without guidance",
                visible=bool(names),
                elem_id="classes",
            )
            each = gr.Slider(1, MAX_IMAGES, value=4, step=1, label="Images of each class")
            scale = _scale_slider(network)
            with gr.Accordion("More", open=False):
                low = gr.Slider(0, 1, value=0, step=0.05, label="Guidance from noise level")
                high = gr.Slider(0, 1, value=1, step=0.05, label="... to noise level")
                steps = _steps_slider(network)
                seed = gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed")
            with gr.Row():
                start = gr.Button("Generate", variant="primary", elem_id="generate-button")
                stop = gr.Button("Stop")
        with gr.Column(scale=3):
            gallery = gr.Gallery(columns=4, elem_id="samples", **GALLERY)
            progress = gr.Markdown(elem_classes="note", elem_id="sampling")

    def generate(
        class_ids: list[int], each: int, scale: float, low: float, high: float, steps: int, seed: int
    ) -> Iterator[tuple[list[tuple[Image.Image, str]], str]]:
        captions = [names[i] for i in class_ids for _ in range(each)] or [None] * each
        for share, images in network.generate(class_ids, each, scale, (low, high), steps, seed):
            said = "done" if share == 1 else f"denoising, {share:.0%}"
            yield list(zip(map(enlarged, images), captions, strict=True)), said

    inputs = [chosen, each, scale, low, high, steps, seed]
    running = start.click(_shown(generate), inputs, [gallery, progress], show_progress="hidden", **ONE_AT_A_TIME)
    stop.click(lambda: "stopped", None, progress, cancels=running)


def _edit_tab(network: Network) -> None:
    names = network.class_names
    with gr.Row():
        with gr.Column(scale=2):
            brush = gr.Brush(default_size=36, colors=["#f472b6"], default_color="#f472b6", color_mode="fixed")
            canvas = {"canvas_size": (CANVAS, CANVAS), "transforms": (), "layers": False, "format": "png"}
            editor = gr.ImageEditor(
                label="Image",
                type="pil",
                sources=("upload", "clipboard"),
                brush=brush,
                height=430,
                elem_id="editor",
                **canvas,
            )
            _example_button(network, editor, "edit-example")
            gr.Markdown("Draw over what shall be painted anew.", elem_classes="note")
        with gr.Column(scale=3):
            with gr.Row():
                label = gr.Dropdown(
                    [("any, or the second likeliest", ANY_CLASS), *_choices(names)],
                    value=ANY_CLASS,
                    label="Class that it shall become",
                    visible=bool(names),
                    elem_id="edit-class",
                )
                strength = gr.Slider(0.1, 1, value=0.8, step=0.05, label="Strength")
            with gr.Accordion("More", open=False):
                scale, steps = _scale_slider(network), _steps_slider(network)
                near = gr.Slider(0, 2, value=0.3, step=0.05, label="Counterfactual: how strongly it is held near")
                seed = gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Inpainting: seed")
            with gr.Row():
                inpaint = gr.Button("Inpaint", variant="primary", elem_id="inpaint-button")
                change = gr.Button("Edit class", visible=bool(names), elem_id="edit-class-button")
                flip = gr.Button("Counterfactual", visible=bool(names), elem_id="counterfactual-button")
            results = gr.Gallery(columns=4, elem_id="edited", **GALLERY)
            summary = gr.Markdown(elem_classes="note", elem_id="edit-summary")

    def run_inpaint(drawn: dict[str, Any] | None, class_id: int, scale: float, steps: int, seed: int) -> tuple:
        return _pictures(network.inpaint(*_marked(drawn), _class_or_any(class_id), scale, steps, seed))

    def run_edit(drawn: dict[str, Any] | None, class_id: int, strength: float, scale: float, steps: int) -> tuple:
        return _pictures(network.edit_class(_background(drawn), _class_or_any(class_id), strength, scale, steps))

    def run_flip(drawn: dict[str, Any] | None, class_id: int, near: float, strength: float, steps: int) -> tuple:
        return _pictures(network.counterfactual(_background(drawn), _class_or_any(class_id), near, strength, steps))

    outputs = [results, summary]
    inpaint.click(_shown(run_inpaint), [editor, label, scale, steps, seed], outputs, **ONE_AT_A_TIME)
    change.click(_shown(run_edit), [editor, label, strength, scale, steps], outputs, **ONE_AT_A_TIME)
    flip.click(_shown(run_flip), [editor, label, near, strength, steps], outputs, **ONE_AT_A_TIME)


def _explore_tab(network: Network) -> None:
    at_hand = network.references is not None
    what = "Energy above the training images' median" if at_hand else "Energy"
    with gr.Row():
        with gr.Column(scale=2):
            image = _upload(network, "explore-image")
            gr.Markdown(
                "The image is noised step by step, from clean (0) to noise (1), and the network says of each level "
                "how likely it finds it and which class it sees.",
                elem_classes="note",
            )
        with gr.Column(scale=3):
            axes = {"x": "noise level", "x_lim": [0, 1], "height": 230}
            energy = gr.LinePlot(
                y="energy", color="of", title=what, color_title="", color_map=COLOURS, elem_id="energies", **axes
            )
            chances = gr.LinePlot(
                y="probability",
                color="class",
                y_lim=[0, 1],
                title="Class probabilities",
                color_title="",
                elem_id="chances",
                visible=bool(network.class_names),
                **axes,
            )
    gr.Markdown("**Nearest training images**, by the distance of latents", visible=at_hand)
    nearest = gr.Gallery(columns=6, visible=at_hand, elem_id="nearest", **GALLERY)

    def explore(path: str | None) -> tuple[Any, Any, list]:
        if path is None:
            return None, None, []
        picture = read_upload(path)
        curves = network.along_noise(picture)
        near = [(enlarged(found), caption) for found, caption in network.nearest(picture)]
        return pandas.DataFrame(curves.energy), pandas.DataFrame(curves.probabilities), near

    image.change(_shown(explore), image, [energy, chances, nearest], trigger_mode="always_last", **ONE_AT_A_TIME)


# --- parts of them --------------------------------------------------------------------------------------------------


def _upload(network: Network, name: str) -> gr.Image:
    """An image as its file: it is decoded by us, after its size is known."""
    options = {"type": "filepath", "image_mode": None, "format": "png", "sources": ["upload", "clipboard"]}
    image = gr.Image(label="Image", height=360, elem_id=name, **options)
    _example_button(network, image, f"{name}-example")
    return image


def _example_button(network: Network, target: Any, name: str) -> None:
    """Gives a held-out image, another with every press; not there without data."""
    if network.references is None:
        return
    numbers = itertools.count()

    def example() -> Image.Image:
        picture, _ = network.references.example(next(numbers))
        size = network.pipeline.image_size
        factor = max(1, CANVAS // size)
        return network.cropped(picture).resize((factor * size, factor * size), Image.Resampling.LANCZOS)

    gr.Button("A held-out image", size="sm", elem_id=name).click(_shown(example), None, target)


def _drawing_board(network: Network) -> gr.ImageEditor:
    """Black, for bright strokes, as digits are."""
    brush = gr.Brush(default_size=30, colors=["#ffffff", "#9ca3af", "#000000"], default_color="#ffffff")
    board = {"canvas_size": (CANVAS, CANVAS), "fixed_canvas": True, "transforms": (), "layers": False, "format": "png"}
    return gr.ImageEditor(
        value=Image.new("RGB", (CANVAS, CANVAS)),
        label="Drawing",
        type="pil",
        image_mode="RGB",
        sources=("upload",),
        brush=brush,
        height=400,
        elem_id="drawing",
        **board,
    )


def _scale_slider(network: Network) -> gr.Slider:
    value, names = network.pipeline.config.default_guidance_scale, network.class_names
    return gr.Slider(1, max(15, value), value=value, step=0.5, label="Guidance scale", visible=bool(names))


def _steps_slider(network: Network) -> gr.Slider:
    value = min(network.pipeline.config.default_num_inference_steps, MAX_STEPS)
    return gr.Slider(1, MAX_STEPS, value=value, step=1, label="Steps")


def _choices(names: list[str]) -> list[tuple[str, int]]:
    return [(name, i) for i, name in enumerate(names)]


def _class_or_any(class_id: int | None) -> int | None:
    return None if class_id in (None, ANY_CLASS) else class_id


def _meter(energy: float, percentile: float | None, network: Network) -> str:
    """The energy in words, and where it stands among those of the training images."""
    said = f"<b>Energy {energy:,.1f}</b>"
    if percentile is None:
        return f'<div>{said} <span class="note">(low is likely, between images of this network)</span></div>'
    count = len(network.references.rows)
    said += f", above that of {percentile:.0f} % of {count:,} training images"
    mark = f'<div class="meter"><span style="left: {percentile:.1f}%"></span></div>'
    return f'<div>{said}{mark}<div class="ends"><span>likely</span><span>unlikely</span></div></div>'


def _background(drawn: dict[str, Any] | None) -> Image.Image:
    """The image in an editor, without what was drawn on it."""
    if drawn is None or drawn["background"] is None:
        raise ValueError("there is no image yet: upload one or take a held-out one")
    return drawn["background"].convert("RGB")


def _marked(drawn: dict[str, Any] | None) -> tuple[Image.Image, Image.Image]:
    """The image in an editor, and a mask that is white where something was drawn on it."""
    image = _background(drawn)
    mask = Image.new("L", image.size)
    for layer in drawn["layers"]:
        strokes = layer.getchannel("A").resize(image.size).point(lambda alpha: 255 if alpha > 0 else 0)
        mask.paste(255, mask=strokes)
    return image, mask


def _pictures(edited: Edited) -> tuple[list[tuple[Image.Image, str]], str]:
    return [(enlarged(image), caption) for image, caption in edited.pictures], edited.summary


def _shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors that a user can mend, all ValueErrors, are shown to the user; a generator's too."""

    @functools.wraps(function)
    def handler(*arguments: Any) -> Iterator[Any]:
        try:
            found = function(*arguments)
            if isinstance(found, Iterator):
                yield from found
            else:
                yield found
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return handler
