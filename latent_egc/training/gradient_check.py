"""Are the gradients that this run will learn from right, on this machine?

A kernel whose second derivative is missing or wrong gives the right loss and wrong gradients, in silence, and which
kernel runs depends on device, precision, batch size and version. So one micro-batch of the run's own is differentiated
twice before training: as the run will do it, and by plain float32 operations on the same device.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction

import torch
from accelerate import Accelerator

from latent_egc.objective import EGCObjective

# The error of all parameters together, of the gradient's norm, and of the worst one alone. Both are needed: the output
# layers outweigh all others in a fresh network, so a kernel that spoils every attention by 200 % was seen to move the
# whole by 1 to 18 %. Where all is right in bf16, 0.2 to 3 % and up to 7 % were measured. TF32, which a GPU's
# convolutions use by default, rounds to 3 bits more than bf16: 0.1 % was seen.
ALLOWED = {"bf16": (0.1, 0.5), "tf32": (0.02, 0.1), "float32": (1e-3, 1e-2)}
# Of the whole norm: below it a parameter's own gradient is rounding (a key's bias under softmax has none at all).
SMALLEST_SHARE = 1e-4
ROWS_AT_ONCE = 8  # of the plain side, which recomputes nothing and must fit where the run barely does
NUM_NAMED = 5


class GradientError(FloatingPointError):
    """The run's gradients are wrong on this machine; nothing was written."""


def check_gradients(objective: EGCObjective, inputs: Mapping[str, torch.Tensor], accelerator: Accelerator) -> float:
    """Compares the run's parameter gradients with plain float32's.

    Args:
        objective: as the run will call it (compiled, recomputing, ...), before DDP wraps it.
        inputs: one micro-batch, the arguments of `EGCObjective.forward`, all of them: nothing is drawn here.
        accelerator: whose autocast the run will use, and whose processes all check.

    Returns:
        ||g - g_plain|| / ||g_plain|| over all parameters together, the largest of all processes.

    Raises:
        GradientError: it is above what is `ALLOWED` in the run's precision, or a single parameter's is; names the worst
            parameters.
    """
    parameters = dict(objective.named_parameters())
    with _nothing_at_zero(parameters.values()):
        with accelerator.autocast():
            losses = objective(**inputs)
        found = _gradients(losses.loss, parameters)
        with _without_tf32():
            expected = _plain_gradients(objective, inputs, parameters)
    norm = math.hypot(*(gradient.norm().item() for gradient in expected.values()))
    differences = {name: (found[name] - expected[name]).norm().item() for name in parameters}
    errors = {
        name: differences[name] / max(gradient.norm().item(), SMALLEST_SHARE * norm, 1e-30)
        for name, gradient in expected.items()
    }
    # NaN is as wrong as can be, and would be lost in a maximum.
    errors = {name: math.inf if math.isnan(error) else error for name, error in errors.items()}
    worst = sorted(errors, key=errors.get, reverse=True)[:NUM_NAMED]
    whole = math.hypot(*differences.values()) / max(norm, 1e-30) if math.isfinite(errors[worst[0]]) else math.inf
    own = torch.tensor([[whole, errors[worst[0]]]], device=accelerator.device)
    error, single_error = accelerator.gather(own).amax(dim=0).tolist()
    allowed, single_allowed = ALLOWED[_precision(accelerator)]
    if error > allowed or single_error > single_allowed:
        named = ", ".join(f"{name} {errors[name]:.0%}" for name in worst)
        raise GradientError(
            f"training.check_gradients: this run's gradients are {error:.1%} of their norm off plain float32 (allowed "
            f"are {allowed:.1%}), a single parameter's {single_error:.0%} (allowed are {single_allowed:.0%}); worst "
            f"are {named}. A kernel of this machine is wrong for these shapes: set training.mixed_precision=no, "
            "training.compile=false or another training.train_batch_size; on a CPU with AMX the environment variable "
            "ONEDNN_MAX_CPU_ISA=AVX512_CORE helps bf16 (docs/decisions.md). training.check_gradients=false trains all "
            "the same"
        )
    accelerator.print(f"gradients are {error:.2%} off plain float32")
    return error


def _precision(accelerator: Accelerator) -> str:
    """What the run's products and convolutions are rounded to."""
    if accelerator.mixed_precision == "bf16":
        return "bf16"
    tf32 = torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    return "tf32" if accelerator.device.type == "cuda" and tf32 else "float32"


@contextmanager
def _without_tf32() -> Iterator[None]:
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


@contextmanager
def _nothing_at_zero(parameters: Iterator[torch.nn.Parameter]) -> Iterator[None]:
    """Gives parameters that are zero some values for a while: behind a fresh network's zeros no gradient is seen."""
    filled = [parameter for parameter in parameters if not parameter.any()]
    generator = torch.Generator().manual_seed(0)  # of its own: the run's random numbers stay as they are
    with torch.no_grad():
        for parameter in filled:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in filled:
                parameter.zero_()


def _gradients(loss: torch.Tensor, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """d loss / d parameter by name, float32; zeros where the loss does not depend on it."""
    gradients = torch.autograd.grad(loss, tuple(parameters.values()), allow_unused=True, materialize_grads=True)
    return {name: gradient.float() for name, gradient in zip(parameters, gradients, strict=True)}


def _plain_gradients(
    objective: EGCObjective, inputs: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """`_gradients` by the class's own forward in float32, a few rows at a time: losses are means over rows."""
    model, num_rows = objective.energy_model, len(inputs["latents"])
    recomputing = model.gradient_checkpointing
    if recomputing:  # set only then: a compiled step would see a changed attribute, and compile anew
        model.disable_gradient_checkpointing()
    total = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    # The clean branch may see fewer rows; in every part the same share of them.
    clean = Fraction(len(inputs.get("clean_latents", inputs["latents"])), num_rows)
    at_once = clean.denominator * max(1, ROWS_AT_ONCE // clean.denominator)
    try:
        for first in range(0, num_rows, at_once):
            part = slice(first, first + at_once)
            clean_part = slice(int(first * clean), int((first + at_once) * clean))
            rows = {key: value[clean_part if "clean" in key else part] for key, value in inputs.items()}
            losses = type(objective).forward(objective, **rows)
            share = len(rows["latents"]) / num_rows
            for name, gradient in _gradients(losses.loss, parameters).items():
                total[name] += share * gradient
    finally:
        if recomputing:
            model.enable_gradient_checkpointing()
    return total
