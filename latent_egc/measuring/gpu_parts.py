"""What `make gpu-check` measures on a device: a function a part, which yields one row of plain values after the other.

A row that fails (out of memory, a kernel or the compiler does not work there) holds its `failure`, and the rows after
it are measured all the same. Every part takes a device and whether to be `tiny`, which is a rehearsal of seconds on a
CPU: networks of a few thousand parameters, traced but without generated code.
"""

import copy
import dataclasses
import gc
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from latent_egc.config import Config, parse_config
from latent_egc.data.encoding import encode
from latent_egc.measuring import benchmark_steps as steps
from latent_egc.measuring.benchmark import embedding_pairs, published_pairs, sampling_pairs, training_pairs
from latent_egc.measuring.benchmark_steps import Workload, make_workload
from latent_egc.measuring.timing import Pair, Side, measure, peak_memory_of, seconds_of
from latent_egc.objective import CompiledForward, EGCObjective
from latent_egc.training.checkpoints import read_metrics
from latent_egc.training.loop import train

Row = dict[str, Any]

LATENTS = {"sample_size": 32, "in_channels": 4, "num_classes": 1000}
# DiT's size B at patch 2, 256 tokens: configs/imagenet256_transformer_b.yaml.
TRANSFORMER_B = LATENTS | {
    "backbone": "transformer",
    "patch_size": 2,
    "width": 768,
    "num_layers": 12,
    "num_attention_heads": 12,
    "qk_norm": True,
    "long_skips": True,
}
# The published network, configs/imagenet256.yaml, at a third of its width.
PUBLISHED_UNET = LATENTS | {
    "backbone": "unet",
    "gaussian_part": False,
    "block_out_channels": [128, 256, 512],
    "attention_levels": [0, 1, 2],
    "num_attention_heads": 4,
    "attention_head_dim": 64,
}
# What gradients are compared of: small, so that float64 is quick, and the compiler too.
PARITY_LATENTS = {"sample_size": 16, "in_channels": 4, "num_classes": 10}
PARITY_UNET = {"block_out_channels": [32, 64], "layers_per_block": 1, "attention_levels": [1]}
PARITY_TRANSFORMER = {"width": 128, "num_layers": 3, "num_attention_heads": 4, "long_skips": True}
PARITY_NETWORKS = {
    "unet": PARITY_LATENTS | {"backbone": "unet"} | PARITY_UNET,
    "transformer": PARITY_LATENTS | {"backbone": "transformer"} | PARITY_TRANSFORMER,
}
TINY_LATENTS = {"sample_size": 8, "in_channels": 2, "num_classes": 3, "num_attention_heads": 2}
TINY_UNET = {"block_out_channels": [8, 16], "layers_per_block": 1, "attention_levels": [1], "norm_num_groups": 4}
TINY_NETWORKS = {
    "unet": TINY_LATENTS | {"backbone": "unet"} | TINY_UNET,
    "transformer": TINY_LATENTS | {"backbone": "transformer", "width": 16, "num_layers": 1},
}
# Backbone, head, and whose noisy latents are classified; "none": without a class embedding.
PARITY_CASES = [
    (backbone, head, noisy)
    for backbone in PARITY_NETWORKS
    for head in ("map", "inner")
    for noisy in ("none", "all", "dropped")
]
# The compiler takes half a minute to two minutes for each: both backbones, both heads, and what `training` compiles
# another time, in bf16.
COMPILED_CASES = [
    ("transformer", "inner", "dropped", "float32"),
    ("transformer", "inner", "dropped", "bf16"),
    ("unet", "map", "none", "float32"),
]
TOKENS = (256, 1024, 4096, 16384)


def parity(device: torch.device, tiny: bool) -> Iterator[Row]:
    """Eager parameter gradients against float64's on the same device: `error`, of all parameters together."""
    for case in PARITY_CASES:
        for precision in ("float32", "bf16"):
            yield _parity_row(*case, precision, None, device, tiny)


def compiled_parity(device: torch.device, tiny: bool) -> Iterator[Row]:
    """As `parity`, of the compiled step."""
    for case in COMPILED_CASES:
        yield _parity_row(*case, _backend(tiny), device, tiny)


def transformer_speed(device: torch.device, tiny: bool) -> Iterator[Row]:
    """The benchmark's training and sampling steps of a transformer of size B."""
    yield from _speed(TINY_NETWORKS["transformer"] if tiny else TRANSFORMER_B, 32, device, tiny)


def unet_speed(device: torch.device, tiny: bool) -> Iterator[Row]:
    """As `transformer_speed`, of the published U-Net at reduced width."""
    yield from _speed(TINY_NETWORKS["unet"] if tiny else PUBLISHED_UNET, 8, device, tiny)


def compiled_speed(device: torch.device, tiny: bool) -> Iterator[Row]:
    """The compiled bf16 step of a transformer of size B, and its guided step."""
    network = TINY_NETWORKS["transformer"] if tiny else TRANSFORMER_B
    config, repeats = _config(network, 2 if tiny else 32), 1 if tiny else 5
    options = {"fullgraph": True, "dynamic": False, "backend": _backend(tiny)}

    def training_pair() -> list[Pair]:
        work = make_workload(config, device)
        bf16 = dataclasses.replace(work, mixed_precision="bf16")
        step = partial(steps.full_step, bf16, torch.compile(work.objective.forward, **options))
        published = Side("step as published, float32", partial(steps.published_step, work))
        return [Pair(Side("full step, bf16, compiled", step), published)]

    def guided_pair() -> list[Pair]:
        work = dataclasses.replace(make_workload(config, device), mixed_precision="bf16")
        eager = Side("guided sampling step", partial(steps.guided_step, work, work.model.epsilon))
        compiled = torch.compile(work.model.epsilon, **options)
        return [Pair(Side("guided sampling step, compiled", partial(steps.guided_step, work, compiled)), eager)]

    for make in (training_pair, guided_pair):
        yield _attempt({"precision": "bf16"}, partial(_measured, make, device, repeats), device)


def memory(device: torch.device, tiny: bool) -> Iterator[Row]:
    """Peak memory, beyond weights and batch, of a bf16 training step of size B on one row, by the number of tokens."""
    network, rows = (TINY_NETWORKS["transformer"], 2) if tiny else (TRANSFORMER_B, 1)
    kernels = {("chunked", False): 1, ("chunked", True): 1, ("math", False): math.inf}
    for num_tokens in (16, 64) if tiny else TOKENS:
        size = 2 * math.isqrt(num_tokens)
        work = make_workload(_config(network | {"sample_size": size}, rows, "bf16"), device)
        for (attention, checkpointing), chunked_from in kernels.items():
            row = {"tokens": num_tokens, "attention": attention, "checkpointing": checkpointing, "rows": rows}
            yield _attempt(row, partial(_step_memory, work, device, checkpointing, chunked_from), device)


def sharding(device: torch.device, tiny: bool) -> Iterator[Row]:
    """Gradients of an objective whose parameters FSDP2 shards in a group of one process, against the plain ones."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)  # no port, no name of a host
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            for backbone in PARITY_NETWORKS:
                for precision in ("float32", "bf16"):
                    row = {"backbone": backbone, "precision": precision}
                    yield _attempt(row, partial(_sharding_error, backbone, precision, device, tiny), device)
        finally:
            dist.destroy_process_group()


def training(device: torch.device, tiny: bool) -> Iterator[Row]:
    """A short training run on handwritten digits by `train`, in bf16 and compiled, its gradient check included."""
    yield _attempt({"data": "digits"}, partial(_train_digits, device, tiny), device)


def _attempt(row: Row, work: Callable[[], Row], device: torch.device) -> Row:
    """The row with what the work found or its failure, and the seconds it took; memory is free again after it."""
    start = time.perf_counter()
    try:
        row = row | work()
    except Exception as error:
        row = row | {"failure": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}
    gc.collect()  # by now nothing holds the tensors of the call that failed
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row | {"seconds": time.perf_counter() - start}


def _backend(tiny: bool) -> str:
    return "aot_eager" if tiny else "inductor"


def _config(network: Row, batch_size: int, mixed_precision: str = "no") -> Config:
    """A configuration of which the workload reads the network, the objective and the batch size."""
    return parse_config(
        {
            "model": network,
            "autoencoder": {"path": None},
            "objective": {"classification_weight": 0.5, "label_smoothing": 0.1},
            "training": {"train_batch_size": batch_size, "mixed_precision": mixed_precision},
        }
    )


def _objective(work: Workload, noisy: str) -> EGCObjective:
    """The workload's objective, or that of dropped rows alone."""
    if noisy != "dropped":
        return work.objective
    weights = work.objective.classification_weight, work.objective.label_smoothing
    return EGCObjective(work.model, *weights, label_drop=0.5, noisy_classification="dropped")


# --- gradients -------------------------------------------------------------------------------------------------------


def _parity_work(backbone: str, device: torch.device, tiny: bool, noisy: str, head: str) -> Workload:
    network = (TINY_NETWORKS if tiny else PARITY_NETWORKS)[backbone]
    work = make_workload(_config(network | {"head": head}, 4 if tiny else 16), device, noisy != "none")
    return dataclasses.replace(work, objective=_objective(work, noisy))


def _parity_row(
    backbone: str, head: str, noisy: str, precision: str, backend: str | None, device: torch.device, tiny: bool
) -> Row:
    def error() -> Row:
        work = _parity_work(backbone, device, tiny, noisy, head)
        expected = _float64_gradients(work)
        work = dataclasses.replace(work, mixed_precision="bf16" if precision == "bf16" else "no")
        if backend is None:
            return {"error": _error(steps.full_step(work, work.objective), expected)}
        torch.compiler.reset()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="training.compile")  # the plain step would look like the compiled
            return {"error": _error(steps.full_step(work, CompiledForward(work.objective, backend=backend)), expected)}

    row = {"backbone": backbone, "head": head, "noisy_classification": noisy, "precision": precision}
    return _attempt(row | {"compiled": backend is not None}, error, device)


def _float64_gradients(work: Workload) -> Sequence[torch.Tensor]:
    """The eager full step's."""
    objective = copy.deepcopy(work.objective).double()
    tensors = {name: value for name, value in vars(work).items() if torch.is_tensor(value)}
    doubled = {name: value.double() for name, value in tensors.items() if value.is_floating_point()}
    work = dataclasses.replace(work, model=objective.energy_model, objective=objective, mixed_precision="no", **doubled)
    return steps.full_step(work, objective)


def _error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """||found - expected|| / ||expected||, all parameters together."""
    found, expected = (torch.cat([tensor.flatten().double() for tensor in tensors]) for tensors in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


def _sharding_error(backbone: str, precision: str, device: torch.device, tiny: bool) -> Row:
    mixed_precision = "bf16" if precision == "bf16" else "no"
    work = _parity_work(backbone, device, tiny, "all", "map")
    work = dataclasses.replace(work, mixed_precision=mixed_precision)
    expected = steps.full_step(work, work.objective)
    sharded = copy.deepcopy(work.objective)
    mesh = init_device_mesh(device.type, (1,))
    fully_shard(sharded, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    given = {"noise": work.noise, "timesteps": work.timesteps, "label_dropped": work.label_dropped}
    with work.autocast():
        losses = sharded(work.latents, work.class_labels, work.clean_latents, **given)
    losses.loss.backward()  # autograd.grad would leave out the hooks that reduce the gradients
    return {"error": _error([parameter.grad.full_tensor() for parameter in sharded.parameters()], expected)}


# --- speed and memory ------------------------------------------------------------------------------------------------


def _speed(network: Row, batch_size: int, device: torch.device, tiny: bool) -> Iterator[Row]:
    config, repeats = _config(network, 2 if tiny else batch_size), 1 if tiny else 3
    for class_embedding in (False, True):
        work = make_workload(config, device, class_embedding)
        if not class_embedding:
            published = partial(published_pairs, work, with_bf16=True)
            yield _attempt({"precision": "as named"}, partial(_measured, published, device, repeats), device)
        for precision in ("float32", "bf16"):
            sides = dataclasses.replace(work, mixed_precision="bf16" if precision == "bf16" else "no")
            for make in (embedding_pairs,) if class_embedding else (training_pairs, _eager_sampling_pairs):
                pairs = partial(_measured, partial(make, sides), device, repeats)
                yield _attempt({"precision": precision}, pairs, device)


def _eager_sampling_pairs(work: Workload) -> list[Pair]:
    return [pair for pair in sampling_pairs(work) if "compiled" not in pair.side.name]


def _measured(make: Callable[[], list[Pair]], device: torch.device, repeats: int) -> Row:
    torch.compiler.reset()
    pairs = make()
    measure("", pairs, device, repeats)
    return {"pairs": [pair.to_dict() for pair in pairs]}


def _step_memory(work: Workload, device: torch.device, checkpointing: bool, chunked_from: float) -> Row:
    if checkpointing:
        work = steps.with_checkpointing(work)
    step = partial(steps.chunked_step, work, chunked_from)
    step()  # libraries allocate their workspaces once
    seconds: list[float] = []
    peak_bytes = peak_memory_of(lambda: seconds.append(seconds_of(step, device)), device)
    return {"step_seconds": seconds[0], "peak_bytes": peak_bytes}


# --- training --------------------------------------------------------------------------------------------------------


def _train_digits(device: torch.device, tiny: bool) -> Row:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = _digits_config(Path(folder), tiny)
        encode(config.data, config.autoencoder, num_classes=10, device=str(device))
        metrics = read_metrics(train(config) / "metrics.jsonl")
    logged = [values for values in metrics if "loss" in values]
    (gradient_error,) = (values["gradient_error"] for values in metrics if "gradient_error" in values)
    (accuracy,) = (values["validation_accuracy"] for values in metrics if "validation_accuracy" in values)
    return {
        "steps": config.training.max_steps,
        "compiled": config.training.compile and not any("training.compile" in str(w.message) for w in caught),
        "losses": [values["loss"] for values in logged],
        "seconds_of_the_last_steps": logged[-1]["seconds_since_last_log"],
        "gradient_error": gradient_error,
        "validation_accuracy": accuracy,
    }


def _digits_config(folder: Path, tiny: bool) -> Config:
    """configs/digits.yaml, 100 steps of it, in bf16 and compiled."""
    network = {"backbone": "unet", "block_out_channels": [32, 64], "norm_num_groups": 16, "gaussian_part": True}
    network = (TINY_NETWORKS["unet"] if tiny else network | PARITY_UNET) | {
        "sample_size": 8,
        "in_channels": 4,
        "num_classes": 10,
    }
    num_steps = 2 if tiny else 100
    training = {
        "max_steps": num_steps,
        "train_batch_size": 8 if tiny else 64,
        "learning_rate": 2e-3,
        "warmup_steps": 20,
        "ema_decay": 0.9,
        "mixed_precision": "no" if tiny else "bf16",
        "compile": not tiny,
        "check_gradients": True,
        "log_every": num_steps // 2 if tiny else 10,
        "validate_every": num_steps,
        "sample_every": num_steps,
        "checkpoint_every": num_steps,
        "trackers": [],
    }
    data = {
        "dataset": "digits",
        "image_size": 32,
        "random_resized_crop": [0.7, 1.0],
        "num_views": 1 if tiny else 4,
        "latent_cache": str(folder / "latents"),
    }
    return parse_config(
        {
            "model": network,
            "autoencoder": {"path": "digits_vae"},
            "data": data,
            "objective": {"classification_weight": 0.1, "label_smoothing": 0.1},
            "training": training,
            "sampling": {"num_inference_steps": 2 if tiny else 20},
            "output_dir": str(folder / "run"),
        }
    )
