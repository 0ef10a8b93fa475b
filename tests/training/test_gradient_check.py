"""The gradient check at the start of training: passes what is right, refuses what is not, leaves no trace."""

import copy
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny import TINY_BACKBONES, bf16_convolution_is_right
from tiny_runs import run_config, run_values

from latent_egc import EGCObjective
from latent_egc.commands import main
from latent_egc.models import attention as attention_module
from latent_egc.objective import CompiledForward
from latent_egc.training import gradient_check
from latent_egc.training.checkpoints import read_metrics
from latent_egc.training.gradient_check import GradientError, check_gradients
from latent_egc.training.loop import train


def inputs(num_rows=8):
    generator = torch.Generator().manual_seed(5)
    latents, clean, noise = torch.randn(3, num_rows, 2, 8, 8, generator=generator)
    return {
        "latents": latents,
        "class_labels": torch.arange(num_rows) % 4 - 1,
        "clean_latents": clean,
        "noise": noise,
        "timesteps": torch.linspace(3, 980, num_rows).long(),
        "label_dropped": torch.arange(num_rows) % 3 == 0,
    }


@pytest.fixture(params=TINY_BACKBONES)
def objective(request):
    """Freshly initialised, as training begins: with layers at zero, behind which nothing has a gradient."""
    return EGCObjective(TINY_BACKBONES[request.param](randomise=False, sample_size=8, class_embedding=True), 0.5, 0.1)


def test_float32_is_exact_and_leaves_no_trace(objective):
    before, random_state = copy.deepcopy(objective.state_dict()), torch.get_rng_state()
    assert check_gradients(objective, inputs(11), Accelerator(cpu=True)) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_a_part_of_the_clean_rows_is_checked_too(objective):
    batch = inputs(12)
    batch["clean_latents"], batch["clean_labels"] = batch["clean_latents"][::3], batch["class_labels"][::3]
    assert check_gradients(objective, batch, Accelerator(cpu=True)) < 1e-5


def test_recomputing_and_compiled_steps_pass(objective):
    objective.energy_model.enable_gradient_checkpointing()
    assert check_gradients(objective, inputs(), Accelerator(cpu=True)) < 1e-5
    assert objective.energy_model.gradient_checkpointing


def test_a_compiled_step_passes_and_is_not_compiled_again_for_training():
    model = TINY_BACKBONES["transformer"](num_layers=1, sample_size=8)
    objective = EGCObjective(model, 0.5)
    objective.forward = CompiledForward(objective, backend="aot_eager")
    accelerator = Accelerator(cpu=True)
    torch.compiler.reset()  # the objectives of other tests are compiled forms of the same function
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert check_gradients(objective, inputs(), accelerator) < 1e-5
        prepared = accelerator.prepare(objective)
        for _ in range(2):
            prepared(**inputs()).loss.backward()


def test_bf16_passes_where_the_convolution_is_right_and_is_refused_where_it_is_not(objective):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    if "UNet" in type(objective.energy_model).__name__ and not bf16_convolution_is_right():
        with pytest.raises(GradientError, match="of their norm off plain float32"):
            check_gradients(objective, inputs(), accelerator)
    else:
        assert 1e-4 < check_gradients(objective, inputs(), accelerator) < 0.1


class WrongInBF16(torch.autograd.Function):
    """Attention as on a machine whose half-precision kernel has the right values and a wrong backward pass."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return attention_module.chunked_attention(query, key, value)

    @staticmethod
    def backward(ctx, gradient):
        gradients = attention_module._AttentionBackward.apply(*ctx.saved_tensors, gradient)
        return tuple(3 * gradient for gradient in gradients) if gradient.dtype == torch.bfloat16 else gradients


def test_a_wrong_kernel_is_refused_by_the_layers_that_it_spoils(objective, monkeypatch):
    monkeypatch.setattr(attention_module, "math_attention", WrongInBF16.apply)
    before = copy.deepcopy(objective.state_dict())
    with pytest.raises(
        GradientError, match=r"single parameter's 2\d\d%.*worst are energy_model\.\S*attn\S+ .*mixed_precision=no"
    ):
        check_gradients(objective, inputs(), Accelerator(cpu=True, mixed_precision="bf16"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.state_dict().items())
    AcceleratorState._reset_state(reset_partial_state=True)
    assert check_gradients(objective, inputs(), Accelerator(cpu=True)) < 1e-5


def test_tf32_may_be_off_by_its_rounding_and_is_off_on_the_plain_side(objective, monkeypatch):
    """A GPU's default for convolutions; two groupings of the same rows then differ by 0.1 %."""
    gpu = SimpleNamespace(device=torch.device("cuda"), mixed_precision="no")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert gradient_check._precision(gpu) == "tf32"
    assert gradient_check._precision(Accelerator(cpu=True)) == "float32"
    plain, seen = gradient_check._plain_gradients, []
    monkeypatch.setattr(
        gradient_check, "_plain_gradients", lambda *given: seen.append(torch.backends.cudnn.allow_tf32) or plain(*given)
    )
    check_gradients(objective, inputs(), Accelerator(cpu=True))
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert gradient_check._precision(gpu) == "float32"


def test_gradients_that_are_not_finite_are_refused(objective):
    with pytest.raises(GradientError, match="are inf% of their norm off"):
        check_gradients(objective, inputs() | {"noise": torch.full((8, 2, 8, 8), torch.nan)}, Accelerator(cpu=True))


def test_a_run_is_checked_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention_module, "math_attention", WrongInBF16.apply)
    values = run_values(tmp_path / "run", mixed_precision="bf16", train_batch_size=2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert "training.check_gradients: this run's gradients are" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_check_is_logged_and_changes_nothing(tmp_path, capsys):
    losses = {}
    for name, checked in (("plain", False), ("checked", True)):
        train(run_config(tmp_path / name, max_steps=2, checkpoint_every=2, check_gradients=checked))
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        assert [row["gradient_error"] < 1e-5 for row in rows if "gradient_error" in row] == [True] * checked
        assert ("off plain float32" in capsys.readouterr().out) == checked
        losses[name] = [row["loss"] for row in rows if "loss" in row]
    assert losses["plain"] == losses["checked"]


def test_bf16_compiled_and_sharded_runs_are_checked_unless_told_otherwise():
    for settings in ({"mixed_precision": "bf16"}, {"compile": True}, {"shard": "parameters"}):
        assert run_config("runs/none", **settings).training.checks_gradients
        assert not run_config("runs/none", check_gradients=False, **settings).training.checks_gradients
    assert not run_config("runs/none").training.checks_gradients
