"""Open a page in the browser: classify, generate, edit and explore with one network, or a page each with several.

example: latent-egc demo runs/my --port 7861
         latent-egc demo
         latent-egc demo USER/NAME --space my_space

Without a pipeline it opens what is at hand: the digits of the quickstart in runs/quickstart, and the networks in
release/ that come with a checkout and are whole; where there is neither, it trains the digits. The page listens at
this machine alone, unless --host says otherwise. With --space nothing is opened: the folder of a Space for the Hub is
written. Needs the extra demo: pip install "latent-egc[demo]"
"""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from latent_egc.commands.arguments import add_device_argument, load_pipeline

if TYPE_CHECKING:
    from latent_egc.demo.network import Network


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to open, and where."""
    parser.add_argument("pipelines", nargs="*", metavar="pipeline", help="a run's or a pipeline's folder, or a Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1; 0.0.0.0: any)")
    parser.add_argument("--port", type=int, default=None, help="default: the first free one from 7860 on")
    parser.add_argument(
        "--data",
        type=Path,
        default=None,
        metavar="YAML",
        help="a file with a data section, the training images; default: the run's own config.yaml",
    )
    parser.add_argument(
        "--num-references",
        type=int,
        default=1000,
        metavar="NUMBER",
        help="training images that others are compared with, one forward pass each; 0: none (default 1000)",
    )
    parser.add_argument("--space", type=Path, default=None, metavar="FOLDER", help="write a Space's folder, and end")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Serves the page until it is interrupted, or writes the Space."""
    from latent_egc.config import ConfigError
    from latent_egc.demo.opening import names_at_hand, quickstart_config, trained_quickstart
    from latent_egc.demo.space import write_space

    if options.num_references < 0:
        raise ConfigError(f"--num-references must be at least 0, got {options.num_references}")
    if options.port is not None and not 1 <= options.port < 2**16:
        raise ConfigError(f"--port must be in [1, {2**16 - 1}], got {options.port}")
    if len(options.pipelines) > 1 and (options.space is not None or options.data is not None):
        raise ConfigError(f"--space and --data are for one pipeline, got {len(options.pipelines)}")
    if options.space is None and find_spec("gradio") is None:
        raise ConfigError('the demo needs gradio: pip install "latent-egc[demo]"')
    if options.space is not None:
        (name,) = options.pipelines or [trained_quickstart(quickstart_config())]
        what = "with the pipeline in it" if write_space(name, options.space) else f"that loads {name}"
        print(f"a Space {what} written to {options.space}; hf upload USER/NAME {options.space} --repo-type space")
        return

    names = options.pipelines or names_at_hand() or [trained_quickstart(quickstart_config())]
    if len(names) > 1 and options.data is not None:
        raise ConfigError(f"--data is for one pipeline, at hand are {', '.join(names)}: name one of them")
    networks = {name: _load(name, options) for name in names}

    from latent_egc.demo.interface import launch  # imports gradio, for seconds: errors before it come at once

    short = {name: Path(name).resolve().name for name in networks}
    titles = short if len(set(short.values())) == len(short) else {name: name for name in networks}
    pages = launch({titles[name]: network for name, network in networks.items()}, options.host, options.port)
    print(f"the demo is at {pages.local_url} (Ctrl-C ends it)", flush=True)
    pages.block_thread()


def _load(name: str, options: argparse.Namespace) -> "Network":
    """A pipeline with its training images, if they are at hand. Raises ConfigError where it cannot be loaded."""
    from latent_egc.demo.network import Network
    from latent_egc.demo.opening import references_at_hand

    pipeline = load_pipeline(name, options.device)
    return Network(pipeline, references_at_hand(pipeline, name, options.data, options.num_references))
