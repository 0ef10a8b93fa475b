"""The command line: encode | train | sample | classify | evaluate | probe | info | export | convert | benchmark."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from latent_egc.atomic import CheckpointError
from latent_egc.config import ConfigError
from latent_egc.training.checkpoints import resolve_pipeline

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="latent-egc", description="Train, sample and classify with one energy network in an autoencoder's latents."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, help_text: str, example: str) -> argparse.ArgumentParser:
        return verbs.add_parser(
            name,
            help=help_text,
            description=help_text,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    encode = verb(
        "encode",
        "Encode a dataset once, in several views, into the latent cache that a config names.",
        "latent-egc encode configs/imagenette64.yaml",
    )
    _add_config_arguments(encode)
    encode.add_argument("--batch-size", type=positive_integer, default=64, help="images encoded at once (default 64)")
    encode.add_argument("--device", default=None, help="such as cuda; default: an accelerator if there is one")

    train = verb(
        "train",
        "Train an energy network in this process; `accelerate launch train.py` starts several.",
        "latent-egc train configs/digits.yaml training.max_steps=500 output_dir=runs/a",
    )
    _add_train_arguments(train)

    sample = verb(
        "sample",
        "Sample images: a labelled grid, and every image as a file of its own.",
        "latent-egc sample runs/quickstart --classes 3 8 --images-per-class 4 --output samples",
    )
    sample.add_argument("pipeline", help="a run's folder, a pipeline's folder, or a Hub id")
    sample.add_argument("--output", type=Path, default=Path("samples"), help="folder for the files (default samples)")
    labels = sample.add_mutually_exclusive_group()
    labels.add_argument("--classes", nargs="+", default=None, help="names or ids; default: all, at most 10")
    labels.add_argument("--unlabelled", action="store_true", help="sample without labels, unguided")
    sample.add_argument("--images-per-class", type=positive_integer, default=8, help="images a class (default 8)")
    sample.add_argument("--steps", type=positive_integer, default=50, help="solver steps (default 50)")
    sample.add_argument("--guidance-scale", type=float, default=None, help="default: the pipeline's own")
    sample.add_argument("--seed", type=int, default=0, help="of the starting noise (default 0)")
    sample.add_argument("--device", default=None, help="such as cuda; default: an accelerator if there is one")

    classify = verb(
        "classify",
        "Classify image files and folders of them.",
        "latent-egc classify runs/quickstart photo.png folder/ --top-k 3 --json",
    )
    classify.add_argument("pipeline", help="a run's folder, a pipeline's folder, or a Hub id")
    classify.add_argument("images", nargs="+", type=Path, help="image files, or folders that are searched for them")
    classify.add_argument("--top-k", type=int, default=1, help="classes named for each image (default 1)")
    classify.add_argument("--json", action="store_true", help="print JSON instead of a table")
    classify.add_argument(
        "--batch-size", type=positive_integer, default=64, help="images classified at once (default 64)"
    )
    classify.add_argument("--device", default=None, help="such as cuda; default: an accelerator if there is one")

    evaluate = verb(
        "evaluate",
        "Measure a pipeline on a dataset's validation split, suite by suite, into one report.",
        "latent-egc evaluate runs/quickstart --suite classification,calibration --set num_images=200",
    )
    _add_evaluate_arguments(evaluate)

    probe = verb(
        "probe",
        "Measure what a frozen denoiser's features know of the classes, by block and timestep, into one report.",
        "latent-egc probe runs/quickstart --analysis heatmap,pooling --set timesteps=[30,90]",
    )
    _add_probe_arguments(probe)

    info = verb("info", "Say what a pipeline holds.", "latent-egc info runs/quickstart")
    info.add_argument("pipeline", help="a run's folder, a pipeline's folder, or a Hub id")

    export = verb(
        "export",
        "Write one self-contained folder for the Hugging Face Hub: weights, code, model card.",
        "latent-egc export runs/quickstart exported --push-to-hub USER/NAME",
    )
    export.add_argument("run", type=Path, help="a run's folder")
    export.add_argument("folder", type=Path, help="the folder to write; must not exist or be empty")
    export.add_argument("--push-to-hub", metavar="REPO", default=None, help="upload the folder to this repository")

    convert = verb(
        "convert",
        "Write a checkpoint of another implementation as a pipeline of this one.",
        "latent-egc convert --from-egc 256x256_EGC.pt imagenet256",
    )
    source = convert.add_mutually_exclusive_group(required=True)
    source.add_argument("--from-egc", type=Path, metavar="FILE", help="the published EGC's U-Net, .pt or .safetensors")
    source.add_argument(
        "--from-dit", metavar="SOURCE", help="a diffusers DiT to go on training from: a Hub id or a folder"
    )
    convert.add_argument("folder", type=Path, help="the folder to write; must not exist or be empty")
    convert.add_argument(
        "--autoencoder",
        default=None,
        help="whose latents the network was trained on, a Hub id or a folder (default stabilityai/sd-vae-ft-mse; for "
        "--from-dit the repository's own)",
    )
    only_egc = convert.add_argument_group("what the file of --from-egc does not say")
    only_egc.add_argument("--sample-size", type=positive_integer, help="height and width of the latents (default 32)")
    only_egc.add_argument("--num-attention-heads", type=positive_integer, help="of every block (default 4)")
    only_egc.add_argument("--class-names", type=Path, help="a text file, one class a line; default: ids")

    benchmark = verb(
        "benchmark",
        "Measure what the energy costs beside noise prediction and the published steps, on random data.",
        "latent-egc benchmark configs/digits.yaml training.train_batch_size=16 --repeats 10",
    )
    _add_config_arguments(benchmark)
    benchmark.add_argument("--repeats", type=positive_integer, default=20, help="timings of each step (default 20)")
    benchmark.add_argument("--device", default=None, help="cpu or cuda; default: an accelerator if there is one")
    benchmark.add_argument(
        "--output", type=Path, default=Path("benchmark.json"), help="file for all numbers (default benchmark.json)"
    )
    return parser


def positive_integer(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="such as training.max_steps=500")


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    _add_config_arguments(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved config, parameters and memory; write nothing"
    )


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pipeline", help="a run's folder, a pipeline's folder, or a Hub id")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="CONFIG",
        help="a YAML file with a data section, a training config for example; default: the run's own config.yaml",
    )
    parser.add_argument(
        "--suite", default="classification,calibration", help="one or more, with commas (default %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=None, help="the report's folder (default: evaluation, in the run's folder)"
    )
    parser.add_argument(
        "--no-data-images",
        action="store_true",
        help="leave the pictures that show images of the dataset out of report.html, so that it can be published",
    )
    parser.add_argument(
        "--features",
        nargs="+",
        default=[],
        metavar="EXTRACTOR",
        help="of the suite generation (generation.features): TorchScript files, DINOv2 of transformers, or inception",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY.SUB=VALUE",
        help="settings such as num_images=500; all are in latent_egc/evaluation/settings.py",
    )


def _add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pipeline",
        help="a run's folder, or a folder or Hub id of a pipeline or network: energy network, UNet2DModel, DiT",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="CONFIG",
        help="a YAML file with a data section, whose classes may be any; default: the run's own config.yaml",
    )
    parser.add_argument(
        "--analysis",
        default="heatmap,pooling,heads",
        help="one or more of heatmap, pooling, heads, cka, fusion, few_shot, comparison, with commas "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        help="folder of the report and of the feature cache, which takes rows x channels of all blocks x p x p x 2 "
        "bytes a timestep (default: probe, in the run's folder)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY.SUB=VALUE",
        help="settings such as num_train_images=5000; all are in latent_egc/probing/settings.py",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; errors that a user can mend are printed without a traceback and give exit status 2."""
    options = _parser().parse_args(arguments)
    verbs = {
        "encode": _encode,
        "train": _train,
        "sample": _sample,
        "classify": _classify,
        "evaluate": _evaluate,
        "probe": _probe,
        "info": _info,
        "export": _export,
        "convert": _convert,
        "benchmark": _benchmark,
    }
    return _run(verbs[options.verb], options)


def train_main(arguments: Sequence[str] | None = None) -> int:
    """What train.py does: the verb `train`, as a script that `accelerate launch` and `torchrun` can start."""
    parser = argparse.ArgumentParser(
        description="Train an energy network.",
        epilog="example: accelerate launch train.py configs/digits.yaml training.max_steps=500 output_dir=runs/a",
    )
    _add_train_arguments(parser)
    return _run(_train, parser.parse_intermixed_args(arguments))


def _run(verb, options: argparse.Namespace) -> int:
    try:
        return verb(options) or 0
    except (ConfigError, CheckpointError, FloatingPointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _device(name: str | None) -> str:
    from accelerate import PartialState

    return name or PartialState().device.type


def _load_pipeline(path: str, device: str | None = None):
    from latent_egc.pipelines import EGCPipeline

    if Path(path).exists():
        path = str(resolve_pipeline(path))
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise FileNotFoundError(f"no such run or pipeline: {path}")
    return EGCPipeline.from_pretrained(path).to(_device(device))


def _encode(options: argparse.Namespace) -> None:
    from latent_egc.config import load_config
    from latent_egc.data.latent_cache import encode
    from latent_egc.training.build import resolve_model

    config = load_config(options.config, options.overrides)
    num_classes = resolve_model(config.model)["num_classes"]
    folder = encode(config.data, config.autoencoder, num_classes, options.batch_size, _device(options.device))
    print(f"latent cache written: {folder}")


def _train(options: argparse.Namespace) -> None:
    from latent_egc.config import load_config
    from latent_egc.training.build import describe
    from latent_egc.training.loop import train

    config = load_config(options.config, options.overrides)
    if options.dry_run:
        print(describe(config), end="")
    else:
        train(config)


def _sample(options: argparse.Namespace) -> None:
    from PIL import Image
    from tqdm.auto import tqdm

    from latent_egc.training.figures import sample_rows, save_grid

    pipeline = _load_pipeline(options.pipeline, options.device)
    names = pipeline.id2label
    class_ids = None
    if options.classes or (names and not options.unlabelled):
        wanted = [int(c) if c.isdigit() and c not in names.values() else c for c in options.classes or []]
        class_ids = pipeline.label_ids(wanted or list(names)[:10]).tolist()
    images = sample_rows(
        pipeline, class_ids, options.images_per_class, options.steps, options.guidance_scale, seed=options.seed
    )
    row_names = None if class_ids is None else [names[i] for i in class_ids]
    options.output.mkdir(parents=True, exist_ok=True)
    save_grid(images, options.output / "grid.png", row_names)
    for row, row_images in enumerate(tqdm(images, desc="write")):
        # The row's number keeps apart classes that are asked for twice or whose names become equal here.
        label = f"row{row:02d}"
        if row_names is not None:
            label += "_" + row_names[row].replace("/", "-").replace(" ", "_")
        for column, image in enumerate(row_images):
            Image.fromarray((image * 255).round().astype("uint8")).save(options.output / f"{label}_{column:03d}.png")
    print(f"{images.shape[0] * images.shape[1]} images and grid.png written to {options.output}")


def _classify(options: argparse.Namespace) -> None:
    from tqdm.auto import tqdm

    from latent_egc.data.sources import read_image

    files = _image_files(options.images)
    pipeline = _load_pipeline(options.pipeline, options.device)
    rows = []
    batches = range(0, len(files), options.batch_size)
    for first in tqdm(batches, desc="classify", disable=len(batches) < 2):
        batch = files[first : first + options.batch_size]
        output = pipeline.classify([read_image(file, str(file)) for file in batch], top_k=options.top_k)
        top = output.probabilities.topk(options.top_k, dim=-1).values.tolist()
        for file, labels, probabilities, energy in zip(batch, output.labels, top, output.energy.tolist(), strict=True):
            rows.append({"file": str(file), "labels": labels, "probabilities": probabilities, "energy": energy})
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    width = max(len(row["file"]) for row in rows)
    print(f"{'file':<{width}}  {'energy':>10}  classes")
    for row in rows:
        classes = "  ".join(f"{n} {p:.3f}" for n, p in zip(row["labels"], row["probabilities"], strict=True))
        print(f"{row['file']:<{width}}  {row['energy']:>10.3f}  {classes}")


def _image_files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise FileNotFoundError(f"no image in the folder {path}")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"no such file or folder: {path}")
    return files


def _evaluate(options: argparse.Namespace) -> None:
    from accelerate import Accelerator

    from latent_egc.config import load_data_config

    try:
        from latent_egc.measuring import parse_settings
        from latent_egc.measuring import study as evaluate
    except ModuleNotFoundError as error:
        raise ConfigError(f"evaluate needs more packages ({error}): pip install 'latent-egc[eval]'") from error

    features = [f"generation.features={json.dumps(options.features)}"] if options.features else []
    settings = parse_settings([*features, *options.set])
    own_config = _own_config(options)
    data = load_data_config(options.data or own_config)
    accelerator = Accelerator()
    report = evaluate(
        _load_pipeline(options.pipeline, str(accelerator.device)),
        data,
        options.suite.split(","),
        options.output or (own_config.parent if own_config.is_file() else Path()) / "evaluation",
        settings,
        options.pipeline,
        accelerator,
        with_data_images=not options.no_data_images,
    )
    if accelerator.is_main_process:
        print(f"\n{report.table()}\n\nreport: {report.folder / 'report.html'}")


def _own_config(options: argparse.Namespace) -> Path:
    """Where a run keeps its config.yaml. Raises ConfigError where neither it nor --data says what the images are."""
    own_config = Path(options.pipeline) / "config.yaml"
    if options.data is None and not own_config.is_file():
        raise ConfigError(
            f"--data: {options.pipeline} is no run with a config.yaml; name a YAML file that has a data section"
        )
    return own_config


def _probe(options: argparse.Namespace) -> None:
    from accelerate import Accelerator

    from latent_egc.config import load_data_config

    try:
        from latent_egc.measuring import probe
        from latent_egc.measuring.denoisers import load_denoiser
        from latent_egc.measuring.probe_settings import parse_settings
    except ModuleNotFoundError as error:
        raise ConfigError(f"probe needs more packages ({error}): pip install 'latent-egc[eval]'") from error

    settings = parse_settings(options.set)
    own_config = _own_config(options)
    data = load_data_config(options.data or own_config)
    accelerator = Accelerator()
    report = probe(
        load_denoiser(options.pipeline, accelerator.device),
        data,
        options.analysis.split(","),
        options.output or (own_config.parent if own_config.is_file() else Path()) / "probe",
        settings,
        accelerator,
    )
    if report is not None:
        print(f"\n{report.table()}\n\nreport: {report.folder / 'report.html'}")


def _info(options: argparse.Namespace) -> None:
    pipeline = _load_pipeline(options.pipeline, "cpu")
    model, vae = pipeline.energy_model, pipeline.vae
    names = list(pipeline.id2label.values())
    autoencoder = "none, pixel space"
    if vae is not None:
        autoencoder = f"{type(vae).__name__}, {sum(p.numel() for p in vae.parameters()):,} parameters"
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    config = model.config
    print(f"energy model  {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"head          {config.head}" + (", Gaussian part" if config.gaussian_part else ""))
    print(f"autoencoder   {autoencoder}")
    print(f"images        {pipeline.image_size} x {pipeline.image_size} px")
    print(f"latents       {config.in_channels} x {config.sample_size} x {config.sample_size}")
    print(f"classes       {len(names)}: {shown}" if names else "classes       none")
    print(f"guidance      {pipeline.config.default_guidance_scale:g} by default")
    schedule = f"{config.num_train_timesteps} timesteps, {config.beta_schedule}"
    print(f"scheduler     {type(pipeline.scheduler).__name__}, {schedule}")


def _export(options: argparse.Namespace) -> None:
    from latent_egc.exchange.export import export

    export(options.run, options.folder, push_to_hub=options.push_to_hub)
    print(f"exported to {options.folder}" + (f" and {options.push_to_hub}" if options.push_to_hub else ""))


def _convert(options: argparse.Namespace) -> None:
    from latent_egc.exchange.from_dit import from_dit
    from latent_egc.exchange.from_egc import from_egc

    names = ("autoencoder", "sample_size", "num_attention_heads", "class_names")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.from_dit is not None:
        others = [f"--{name.replace('_', '-')}" for name in given if name != "autoencoder"]
        if others:
            raise ValueError(f"--from-dit reads from its source what {', '.join(others)} would say; leave it out")
        from_dit(options.from_dit, options.folder, **given)
    else:
        if "class_names" in given:
            given["id2label"] = dict(enumerate(given.pop("class_names").read_text().splitlines()))
        from_egc(options.from_egc, options.folder, **given)
    print(f"pipeline written: {options.folder}")


def _benchmark(options: argparse.Namespace) -> None:
    from latent_egc.config import load_config
    from latent_egc.measuring.benchmark import benchmark

    config = load_config(options.config, options.overrides)
    options.output.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes
    report = benchmark(config, options.repeats, _device(options.device))
    print(report)
    options.output.write_text(json.dumps(report.to_dict(), indent=1))


if __name__ == "__main__":
    sys.exit(main())
