"""The exported folder: it loads with latent-egc and without it, and gives the same numbers."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import DiffusionPipeline
from fake_hub import serve
from safetensors.torch import load_file
from tiny import WITHOUT_THE_PACKAGE, tiny_dc, tiny_kl, tiny_pipeline, tiny_qwen, tiny_taesd
from tiny_runs import run_values
from transformers import AutoModelForImageClassification

import latent_egc.methods
from latent_egc import EGCPipeline, EGCUNet
from latent_egc.commands import main
from latent_egc.config import ConfigError, parse_config
from latent_egc.exchange import export as export_module
from latent_egc.exchange.export import export
from latent_egc.pipelines import pipeline_egc
from latent_egc.pipelines.code_files import bundle
from latent_egc.training.figures import save_grid
from latent_egc.training.loop import train

TESTS = Path(__file__).resolve().parents[1]

# Runs where importing latent_egc fails, as on a machine that has only diffusers.
STRANGER = (
    WITHOUT_THE_PACKAGE
    + """
import torch
from diffusers import DiffusionPipeline
source, out, tests = sys.argv[1:]
if source == "someone/digits":
    sys.path.insert(0, tests)
    from fake_hub import serve
    serve(out + "/exported", out + "/downloaded")
pipeline = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
assert "latent_egc" not in sys.modules
assert type(pipeline).__module__.startswith("diffusers_modules"), type(pipeline).__module__
assert type(pipeline.energy_model).__module__.startswith("diffusers_modules")
output = pipeline.classify(torch.load(out + "/pixels.pt"))
images = pipeline(["cat", "cow"], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt")
torch.save({"images": images.images, "logits": output.logits, "energy": output.energy}, out + "/values.pt")
"""
)


def make_run(folder, **overrides):
    """A run's folder as training leaves it, with a tiny random pipeline."""
    folder.mkdir()
    pipeline = tiny_pipeline(**overrides)
    pipeline.save_pretrained(folder / "pipeline")
    (folder / "config.yaml").write_text("model:\n  backbone: unet\nsampling:\n  num_inference_steps: 7\n")
    rows = [
        {"step": 3, "validation_denoising_loss": 0.5, "validation_accuracy": 0.625},
        {"step": 5, "loss": 1.0},
        {"step": 5, "validation_denoising_loss": 0.25, "validation_accuracy": 0.875},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples").mkdir()
    save_grid(torch.rand(1, 2, 8, 8, 3).numpy(), folder / "samples" / "step-00000005.png")
    return pipeline


def sample(pipeline, labels):
    generator = torch.Generator().manual_seed(0)
    return pipeline(labels, num_inference_steps=3, generator=generator, output_type="pt").images


@pytest.mark.parametrize(
    ("source", "variant"),
    [("folder", {}), ("hub", {"vae": False, "in_channels": 3, "head": "inner", "class_embedding": True})],
    ids=["folder", "hub"],
)
def test_export_loads_with_and_without_the_package(tmp_path, source, variant, monkeypatch):
    pipeline = make_run(tmp_path / "run", **variant)
    folder = export(tmp_path / "run", tmp_path / "exported")
    pixels = torch.rand(2, 3, 8, 8)
    torch.save(pixels, tmp_path / "pixels.pt")
    output = pipeline.classify(pixels)
    expected = {"images": sample(pipeline, ["cat", "cow"]), "logits": output.logits, "energy": output.energy}

    # With the package: no flag, and its own classes.
    loaded = EGCPipeline.from_pretrained(folder)
    assert type(loaded) is EGCPipeline
    assert type(loaded.energy_model) is EGCUNet
    output = loaded.classify(pixels)
    own = {"images": sample(loaded, ["cat", "cow"]), "logits": output.logits, "energy": output.energy}

    # Without it: diffusers alone, running the code beside the weights.
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    name = str(folder) if source == "folder" else "someone/digits"
    subprocess.run([sys.executable, "-c", STRANGER, name, str(tmp_path), str(TESTS)], check=True, cwd=tmp_path)
    strange = torch.load(tmp_path / "values.pt")
    for name, value in expected.items():
        assert torch.equal(own[name], value), name
        assert torch.equal(strange[name], value), name


def test_loading_from_the_hub_needs_no_flag_where_the_package_is(tmp_path, monkeypatch):
    make_run(tmp_path / "run")
    serve(export(tmp_path / "run", tmp_path / "exported"), tmp_path / "downloaded", monkeypatch.setattr)
    assert type(EGCPipeline.from_pretrained("someone/digits").energy_model) is EGCUNet


def test_remote_code_needs_the_flag(tmp_path):
    make_run(tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "exported")
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder)


def test_contents_and_model_card(tmp_path):
    make_run(tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "exported")
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert names == {
        "README.md",
        "config.json",
        "image_classification.py",
        "model_index.json",
        "pipeline_egc.py",
        "preprocessor_config.json",
        "samples.png",
        "energy_model/config.json",
        "energy_model/diffusion_pytorch_model.safetensors",
        "energy_model/unet.py",
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    card = (folder / "README.md").read_text()
    for part in (
        "library_name: diffusers",
        "validation_accuracy | 0.875",
        "image = pipe('cat').images[0]",
        "backbone: unet",
        "(image, pool=True)",
    ):
        assert part in card
    assert "0.625" not in card  # an earlier evaluation
    assert str(tmp_path) not in card


@pytest.mark.parametrize("make", [tiny_dc, tiny_qwen])
def test_every_kind_of_autoencoder_is_trained_with_and_exported(make, tmp_path):
    make().save_pretrained(tmp_path / "vae")
    values = run_values(tmp_path / "run", max_steps=1, num_validation_images=4)
    values["autoencoder"] = {"path": str(tmp_path / "vae")}
    values["model"] |= {"sample_size": 16, "in_channels": 2}
    train(parse_config(values))
    pipeline = EGCPipeline.from_pretrained(export(tmp_path / "run", tmp_path / "exported"))
    assert type(pipeline.vae) is type(make())
    assert pipeline.image_size == 32
    assert pipeline.classify(torch.rand(2, 3, 32, 32)).logits.isfinite().all()
    assert sample(pipeline, ["0", "1"]).shape == (2, 3, 32, 32)


def test_unfinished_run_exports_its_best_checkpoint(tmp_path):
    run = tmp_path / "run"
    make_run(run)
    for step, score in ((5, 0.9), (10, 0.8)):
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        tiny_pipeline(head="map" if step == 5 else "inner").save_pretrained(checkpoint / "pipeline")
        (checkpoint / "checkpoint.json").write_text(json.dumps({"global_step": step, "score": score}))
    (run / "pipeline").rename(tmp_path / "elsewhere")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 10, "validation_denoising_loss": 0.125, "validation_accuracy": 0.75}) + "\n")
    folder = export(run, tmp_path / "exported")
    assert EGCPipeline.from_pretrained(folder).energy_model.config.head == "map"
    card = (folder / "README.md").read_text()
    assert "validation_accuracy | 0.875" in card
    assert "0.75" not in card  # measured after that checkpoint


def test_errors_lose_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pipeline"):
        export(tmp_path, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    make_run(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="already holds"):
        export(tmp_path / "run", tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "precious"


def test_push_uploads_the_folder(tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo, exist_ok):
            calls.append(("create", repo, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, folder_path))

    monkeypatch.setattr(export_module, "HfApi", Api)
    make_run(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "exported", push_to_hub="someone/digits")
    assert calls == [("create", "someone/digits", True), ("upload", "someone/digits", tmp_path / "exported")]
    assert 'from_pretrained("someone/digits"' in (tmp_path / "exported" / "README.md").read_text()


def test_methods_are_bundled_with_the_pipeline_each_once_before_what_needs_them(tmp_path, monkeypatch):
    """A made-up method between two modules of this package; the bundle runs where latent_egc cannot be imported."""
    (tmp_path / "made_up_method.py").write_text(
        "from latent_egc.models.noise_schedule import add_noise\n"
        "from latent_egc.pipelines.latents import vae_scale_factor\n\n\n"
        "def noised(latents):\n"
        "    levels = vae_scale_factor(None) * latents.new_ones(1), latents.new_zeros(1)\n"
        "    return add_noise(latents, 0 * latents, levels)\n"
    )
    monkeypatch.setattr(latent_egc.methods, "__path__", [*latent_egc.methods.__path__, str(tmp_path)])
    source = inspect.getsource(pipeline_egc)
    source = source.replace(
        "from .schedulers", "from latent_egc.methods.made_up_method import noised\nfrom .schedulers", 1
    )
    (tmp_path / "pipeline_copy.py").write_text(source + "\nHALF = noised(torch.full((1, 1, 1, 1), 0.5))\n")
    monkeypatch.setattr(latent_egc.pipelines, "__path__", [*latent_egc.pipelines.__path__, str(tmp_path)])
    code = bundle("latent_egc.pipelines.pipeline_copy")
    for line in ("def add_noise(", "def vae_scale_factor(", "def noised("):
        assert code.count("\n" + line) == 1
    (tmp_path / "bundled.py").write_text(code + "\nassert HALF == 0.5\nprint(EGCPipeline.__module__)\n")
    command = [sys.executable, "-c", STRANGER.partition("import torch")[0] + "import bundled"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "bundled\n"


# --- an autoencoder by its name, half floats, a licence ---------------------------------------------------------------


def test_an_autoencoder_that_is_named_is_left_out_and_everything_still_works(tmp_path, capsys):
    pipeline = make_run(tmp_path / "run")
    name = str(tmp_path / "vae")
    pipeline.vae.save_pretrained(name)
    folder = export(tmp_path / "run", tmp_path / "exported", autoencoder=name, license="mit")
    assert not (folder / "vae").exists()
    pixels = torch.rand(2, 3, 8, 8)
    expected = pipeline.classify(pixels)
    loaded = EGCPipeline.from_pretrained(folder)
    assert torch.equal(loaded.classify(pixels).logits, expected.logits)
    assert torch.equal(sample(loaded, ["cat", "cow"]), sample(pipeline, ["cat", "cow"]))
    assert main(["info", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"parameters, of {name}\n" in said
    assert "licence       mit\n" in said
    exported_again = EGCPipeline.from_pretrained(export(folder, tmp_path / "again"))
    assert exported_again.config.autoencoder == name
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(model(2 * pixels - 1).logits, expected.logits)
    model.save_pretrained(tmp_path / "classifier")
    shutil.rmtree(name)
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "classifier")  # its own file, encoder and all
    assert torch.equal(again(2 * pixels - 1).logits, expected.logits)
    with pytest.raises(ValueError, match=r"autoencoder='.*vae' cannot be loaded"):
        AutoModelForImageClassification.from_pretrained(folder)
    card = " ".join((folder / "README.md").read_text().split())
    assert f"The autoencoder is `{name}`. Its weights are not in this folder" in card
    assert "license: mit" in card
    assert "float16" not in card


def test_half_floats_are_stored_and_loaded_as_floats(tmp_path):
    pipeline = make_run(tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "exported", dtype=torch.float16)
    for part in ("energy_model", "vae"):
        tensors = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    loaded = EGCPipeline.from_pretrained(folder)
    assert (loaded.energy_model.dtype, loaded.vae.dtype) == (torch.float32, torch.float32)
    for name, tensor in loaded.energy_model.state_dict().items():
        assert torch.equal(tensor, pipeline.energy_model.state_dict()[name].half().float())
    assert sample(loaded, ["cat", "cow"]).isfinite().all()
    pixels = torch.rand(2, 3, 8, 8)
    logits = loaded.classify(pixels).logits
    torch.testing.assert_close(logits, pipeline.classify(pixels).logits, atol=0.02, rtol=0.02)
    assert torch.equal(AutoModelForImageClassification.from_pretrained(folder)(2 * pixels - 1).logits, logits)
    assert "stored as float16 and loaded as float32" in (folder / "README.md").read_text()


def test_an_autoencoder_that_is_another_is_refused(tmp_path):
    make_run(tmp_path / "run")
    for name, vae, message in (
        ("weights", tiny_kl(), r"'.*weights' is not the one .* it differs in decoder\.conv_in\.bias$"),
        ("scale", tiny_kl(scaling_factor=0.5), r"'.*scale' is not the one .* it differs in scaling_factor$"),
        ("kind", tiny_taesd(), r"'.*kind' is not the one .* it differs in _class_name, .* more$"),
    ):
        if name == "weights":
            vae.decoder.conv_in.bias.data += 1e-3
        vae.save_pretrained(tmp_path / name)
        with pytest.raises(ConfigError, match=message):
            export(tmp_path / "run", tmp_path / "exported", autoencoder=str(tmp_path / name))
    tiny_kl().half().save_pretrained(tmp_path / "half")  # the same, as it is stored on the Hub or beside a run
    export(tmp_path / "run", tmp_path / "named", autoencoder=str(tmp_path / "half"))
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        with pytest.raises(ConfigError, match=rf"autoencoder='.*{name}' cannot be loaded"):
            export(tmp_path / "run", tmp_path / "exported", autoencoder=str(tmp_path / name))
    make_run(tmp_path / "pixels", vae=False, in_channels=3)
    with pytest.raises(ConfigError, match="'someone/taesd': the pipeline is in pixel space"):
        export(tmp_path / "pixels", tmp_path / "exported", autoencoder="someone/taesd")
    with pytest.raises(ConfigError, match=r"dtype must be torch\.float32 or torch\.float16, got torch\.int8"):
        export(tmp_path / "run", tmp_path / "exported", dtype=torch.int8)
    assert not (tmp_path / "exported").exists()


def test_a_weight_that_no_half_float_holds_is_named(tmp_path):
    pipeline = make_run(tmp_path / "run")
    pipeline.energy_model.conv_in.bias.data[0] = 1e5
    pipeline.save_pretrained(tmp_path / "run" / "pipeline")
    with pytest.raises(ValueError, match=r"NaN or infinite: conv_in\.bias"):
        export(tmp_path / "run", tmp_path / "exported", dtype=torch.float16)
    assert not (tmp_path / "exported").exists()


def test_a_hub_id_that_cannot_be_reached_is_believed_with_a_warning(tmp_path, monkeypatch, capsys):
    """The folder is loaded by what the user gives it, and says whose autoencoder it wants."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pipeline = make_run(tmp_path / "run")
    options = ["--autoencoder", "someone/taesd", "--dtype", "float16", "--license", "mit"]
    with pytest.warns(UserWarning, match="not compared with the pipeline's own autoencoder") as caught:
        assert main(["export", str(tmp_path / "run"), str(tmp_path / "exported"), *options]) == 0
    assert len([warning for warning in caught if "not compared" in str(warning.message)]) == 1
    assert EGCPipeline.from_pretrained(tmp_path / "exported", vae=pipeline.vae).classify(torch.rand(1, 3, 8, 8))
    assert main(["info", str(tmp_path / "exported")]) == 2
    assert "autoencoder='someone/taesd' cannot be loaded" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "onnx"), "--onnx", *options]) == 2
    assert "not for --onnx" in capsys.readouterr().err
