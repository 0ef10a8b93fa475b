"""Propose a configuration for your own images: look at them, fit a network to them and to this machine.

Nothing is written but the configuration, to standard output; what was found and the next commands come on standard
error, too. Images are a folder with one folder a class (or train/CLASS and validation/CLASS, or no classes), parquet
files, or a dataset of the Hub.

example: latent-egc init photos/ --image-size 64 > my.yaml
"""

import argparse
import shlex
import sys
import textwrap
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from latent_egc.commands.arguments import add_device_argument, device_name, positive_integer

if TYPE_CHECKING:
    from latent_egc.data.inspection import Inspection
    from latent_egc.training.proposal import Choice, Machine, Proposal

MAX_CLASSES_NAMED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The images, and what the user chooses."""
    parser.add_argument("data", help="a folder of images, a .parquet file, pattern or folder, or a Hub dataset's id")
    parser.add_argument("--image-size", type=positive_integer, default=None, help="pixels; default: by the images")
    parser.add_argument("--label-column", default=None, help="of the classes; default: found by its type or name")
    parser.add_argument(
        "--autoencoder",
        default=None,
        metavar="PATH_OR_ID",
        help="an autoencoder's folder or Hub id, or null for pixel space; default: the small madebyollin/taesd on a "
        "CPU, else stabilityai/sd-vae-ft-mse",
    )
    add_device_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Prints the configuration."""
    from latent_egc.config import AutoencoderConfig, ConfigError
    from latent_egc.data.autoencoders import load_autoencoder
    from latent_egc.data.inspection import inspect_images
    from latent_egc.training.proposal import measure_encoding, measure_step, propose, this_machine

    with redirect_stdout(sys.stderr):  # what libraries print is no YAML
        device = device_name(options.device)
        autoencoder = options.autoencoder
        if autoencoder is None:
            autoencoder = "madebyollin/taesd" if device == "cpu" else "stabilityai/sd-vae-ft-mse"
        elif autoencoder == "null":
            autoencoder = None
        found = inspect_images(options.data, options.label_column)
        try:
            vae = load_autoencoder(AutoencoderConfig(path=autoencoder), device)
        except ConfigError as error:
            what = " ".join(str(error).split())
            raise ConfigError(f"{what}; --autoencoder names another, or a folder") from error
        machine = this_machine(device)
        proposal = propose(found, _name(options.data), machine, autoencoder, vae, options.image_size)
        minutes = {"train": proposal.config.training.max_steps * measure_step(proposal, device) / 60}
        if vae is not None:
            data = proposal.config.data
            encodings = found.num_train * (1 + data.horizontal_flip + data.num_views) + found.num_validation
            minutes["encode"] = encodings * measure_encoding(vae, data.image_size) / 60
        summary = _summary(options.data, found, machine, proposal, minutes)
        commands = _commands(found, proposal)
    print("\n".join([*map(_comment, summary), "", *_yaml(proposal), "", *map(_comment, commands)]))
    print("\n".join([*summary, *commands]), file=sys.stderr)


def _name(data: str) -> str:
    """What the images are called: by their folder where `data` is a pattern."""
    path = Path(data)
    if "*" in path.name:
        path = path.parent
    return path.resolve().stem if path.exists() else path.stem


def _summary(
    name: str, found: "Inspection", machine: "Machine", proposal: "Proposal", minutes: dict[str, float]
) -> list[str]:
    """What was found, and what the run will take."""
    present = {label: count for label, count in found.class_counts.items() if count}
    named = ", ".join(f"{label} {count:,}" for label, count in list(present.items())[:MAX_CLASSES_NAMED])
    named += f", and {len(present) - MAX_CLASSES_NAMED} more" if len(present) > MAX_CLASSES_NAMED else ""
    lines = [f"{name}: {found.num_train:,} images to train on, {found.num_validation:,} held out."]
    if len(present) > 1:
        lines += [f"{len(found.class_counts)} classes: {named}."]
        lines += [f"{found.num_unlabelled:,} images have no label."] if found.num_unlabelled else []
        empty = len(found.class_counts) - len(present)
        lines += [f"{empty} classes have no image."] if empty else []
    else:
        classes = f"One class only, {named}" if present else "No classes"
        lines += [f"{classes}: the model is unlabelled, it only samples."]
        if found.why_unlabelled:
            lines += [f"{found.why_unlabelled}; --label-column names it."]
    shorter, longer = found.sizes.min(axis=1), found.sizes.max(axis=1)
    lines += [f"Sizes: {shorter.min()} to {longer.max()} px, shorter sides {int(shorter.mean())} px in the mean."]
    lines += [f"{found.num_looked_at:,} images looked at, {found.num_unreadable:,} of them cannot be read."]
    memory, batch = proposal.memory, proposal.config.training.train_batch_size
    needed = (memory.state + memory.activations) / 2**30
    lines += [
        f"Network: {memory.num_parameters / 1e6:.1f} M parameters, about {needed:.2f} GiB at {batch} images a step; "
        f"{machine.memory / 2**30:.1f} GiB are free on {machine.device}."
    ]
    shown = {name: f"{value:,.0f}" if value >= 10 else f"{value:.2g}" for name, value in minutes.items()}
    encoding = f"the autoencoder {shown['encode']} minutes once, " if "encode" in shown else ""
    lines += [f"Time here, measured by a few steps: {encoding}training {shown['train']} minutes."]
    return [part for line in lines for part in textwrap.wrap(_printable(line), 116, subsequent_indent="  ")]


def _commands(found: "Inspection", proposal: "Proposal") -> list[str]:
    """What to run next."""
    run = shlex.quote(proposal.config.output_dir)
    labelled = proposal.config.model["num_classes"] is not None
    classes = [shlex.quote(label) for label, count in found.class_counts.items() if count][:2]
    shown = f" --classes {' '.join(classes)}" if labelled else ""
    suites = "classification,calibration" if labelled else "generation --features facebook/dinov2-base"
    commands = {
        "latent-egc encode my.yaml": "once; it goes on where it was stopped",
        "accelerate launch -m latent_egc train my.yaml": "training.resume=auto goes on after a stop",
        f"latent-egc evaluate {run} --suite {suites}": "a report; needs the extra eval",
        f"latent-egc sample {run}{shown}": "a grid and single images",
        f"latent-egc export {run} exported": "a folder for the Hub",
    }
    if proposal.config.data.latent_cache is None:
        del commands["latent-egc encode my.yaml"]
    return ["Next, with this configuration in my.yaml:"] + [f"  {line}  # {why}" for line, why in commands.items()]


def _yaml(proposal: "Proposal") -> list[str]:
    """The choices as lines of YAML, each value with its reason."""
    from latent_egc.training.proposal import Choice

    lines = []
    for section, part in proposal.choices.items():
        if isinstance(part, Choice):
            lines.append(_line(section, part))
        else:
            lines += [f"{section}:", *(_line(f"  {key}", choice) for key, choice in part.items())]
    return lines


def _line(key: str, choice: "Choice") -> str:
    import yaml

    value = yaml.safe_dump(choice.value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    return f"{key}: {value}".ljust(42) + f"  {_comment(choice.reason)}"


def _comment(line: str) -> str:
    return f"# {_printable(line)}"


def _printable(text: str) -> str:
    """One line, whatever is in it: names of files and classes may hold line breaks."""
    return "".join(character if character.isprintable() else "?" for character in text)
