"""The exported folder as a model of transformers: the numbers of `classify`, without the package too."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import TINY_BACKBONES, WITHOUT_THE_PACKAGE, gradient_image, tiny_kl, tiny_pipeline, tiny_qwen, tiny_taesd
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments
from transformers import pipeline as transformers_pipeline

from latent_egc import EGCForImageClassification, EGCPipeline
from latent_egc.exchange.export import export
from latent_egc.exchange.image_classification import EGCConfig, EGCImageProcessor, EGCModel
from latent_egc.measuring.denoisers import load_denoiser
from latent_egc.pipelines.schedulers import default_scheduler
from latent_egc.training.warm_start import load_initial_weights

NAMES = {0: "cat", 1: "dog", 2: "cow"}


def make_export(folder, backbone="unet", vae="kl", **overrides):
    """A tiny pipeline's export, by its backbone."""
    model = TINY_BACKBONES[backbone](**overrides).eval()
    vae = {"kl": tiny_kl, "taesd": tiny_taesd, "qwen": tiny_qwen, "pixels": lambda: None}[vae]()
    EGCPipeline(model, vae, default_scheduler(model), NAMES).save_pretrained(folder / "run" / "pipeline")
    return export(folder / "run", folder / "exported")


def odd_images():
    """Of other sizes, modes and orientations."""
    turned = gradient_image(30, 14)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    grey16 = Image.new("I;16", (9, 8))
    grey16.putdata([i * 900 for i in range(72)])
    return [gradient_image(), turned, grey16, gradient_image(8, 8).convert("P"), gradient_image(200, 9).convert("RGBA")]


@pytest.fixture(scope="module", params=[("unet", "kl"), ("transformer", "taesd")], ids=["unet", "transformer"])
def exported(request, tmp_path_factory):
    return make_export(tmp_path_factory.mktemp(request.param[0]), *request.param)


def test_logits_and_energy_are_those_of_classify_to_the_bit(exported):
    """By the installed classes, which no flag has to allow; so is what is saved again, with the code beside it."""
    pipe, images = EGCPipeline.from_pretrained(exported), odd_images()
    expected = pipe.classify(images)
    processor = AutoImageProcessor.from_pretrained(exported)
    model = AutoModelForImageClassification.from_pretrained(exported)
    assert (type(processor), type(model)) == (EGCImageProcessor, EGCForImageClassification)
    assert model.config.id2label == NAMES
    inputs = processor(images, return_tensors="pt")
    found = model(**inputs)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.energy, expected.energy)
    assert found.loss is None
    assert torch.equal(model(**inputs, return_dict=False)[0], expected.logits)

    again = exported.parent / "again"
    model.save_pretrained(again)
    processor.save_pretrained(again)
    assert torch.equal(AutoModelForImageClassification.from_pretrained(again)(**inputs).logits, expected.logits)
    assert (again / "image_classification.py").read_text() == (exported / "image_classification.py").read_text()
    assert str(exported) not in (again / "config.json").read_text()
    assert AutoImageProcessor.from_pretrained(again).image_size == pipe.image_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_a_device_map_give_what_the_pipeline_gives(exported, dtype):
    pixels = torch.rand(3, 3, 8, 8)
    expected = EGCPipeline.from_pretrained(exported, torch_dtype=dtype).classify(pixels)
    model = EGCForImageClassification.from_pretrained(exported, dtype=dtype, device_map="auto")
    assert model.dtype == dtype
    assert torch.equal(model(2 * pixels - 1).logits, expected.logits)


def test_offloaded_modules_give_the_same_numbers(exported, tmp_path):
    pixels = 2 * torch.rand(2, 3, 8, 8) - 1
    expected = EGCForImageClassification.from_pretrained(exported)(pixels).logits
    device_map, offload_folder = {"energy_model": "disk", "vae": "cpu"}, tmp_path / "offloaded"
    model = EGCForImageClassification.from_pretrained(exported, device_map=device_map, offload_folder=offload_folder)
    assert model.energy_model.device.type == "meta"
    assert {"EGCUNet", "EGCTransformer"} & set(model._no_split_modules)  # skip connections need a whole network
    assert torch.equal(model(pixels).logits, expected)


def test_the_pipelines_of_transformers(exported):
    image = gradient_image()
    expected = EGCPipeline.from_pretrained(exported).classify(image, top_k=3)
    classify = transformers_pipeline("image-classification", model=str(exported))
    (found,) = classify([image])
    assert [entry["label"] for entry in found] == expected.labels[0]
    assert found[0]["score"] == pytest.approx(expected.probabilities.max().item(), abs=1e-6)
    for (best,) in classify([image] * 3, batch_size=2, top_k=1):
        assert best == {"label": found[0]["label"], "score": pytest.approx(found[0]["score"], abs=1e-6)}
    extract = transformers_pipeline("image-feature-extraction", model=str(exported))
    assert extract(image, pool=True, return_tensors=True).ndim == 2


@pytest.mark.parametrize("vae", ["qwen", "pixels"])
def test_every_kind_of_autoencoder_and_none(tmp_path, vae):
    folder = make_export(tmp_path, vae=vae, **({"in_channels": 3} if vae == "pixels" else {}))
    pixels = torch.rand(2, 3, 4, 4) if vae == "pixels" else torch.rand(2, 3, 8, 8)
    expected = EGCPipeline.from_pretrained(folder).classify(pixels).logits
    assert torch.equal(AutoModelForImageClassification.from_pretrained(folder)(2 * pixels - 1).logits, expected)


def test_weights_are_stored_once_and_the_decoders_are_not_read(tmp_path):
    folder = make_export(tmp_path)
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.safetensors"))
    assert files == [f"{part}/diffusion_pytorch_model.safetensors" for part in ("energy_model", "vae")]
    tensors = load_file(folder / files[1])
    encoder = {k: v for k, v in tensors.items() if not k.startswith(("decoder.", "post_quant_conv."))}
    assert 0 < len(encoder) < len(tensors)
    save_file(encoder, folder / files[1])
    model = EGCForImageClassification.from_pretrained(folder)
    assert {k for k in model.state_dict() if k.startswith("vae.")} == {f"vae.{k}" for k in encoder}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("conv_in.bias"), r"missing: energy_model\.conv_in\.bias"),
        (lambda t: t.update(other=torch.zeros(1)), r"unexpected: energy_model\.other"),
        (lambda t: t["conv_in.bias"].fill_(torch.nan), r"NaN or infinite: energy_model\.conv_in\.bias"),
    ],
    ids=["missing", "unexpected", "nan"],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    folder = make_export(tmp_path)
    path = folder / "energy_model" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        EGCForImageClassification.from_pretrained(folder)


def test_weights_in_shards(tmp_path):
    folder = make_export(tmp_path)
    pipe = EGCPipeline.from_pretrained(folder)
    (folder / "energy_model" / "diffusion_pytorch_model.safetensors").unlink()
    pipe.energy_model.save_pretrained(folder / "energy_model", max_shard_size="20KB")
    assert len(list((folder / "energy_model").glob("*.safetensors"))) > 1
    pixels = torch.rand(2, 3, 8, 8)
    found = EGCForImageClassification.from_pretrained(folder)(2 * pixels - 1).logits
    assert torch.equal(found, pipe.classify(pixels).logits)


def test_backward_reaches_the_network_and_the_pixels_but_no_weight_of_the_encoder(exported):
    model = EGCForImageClassification.from_pretrained(exported).train()
    pixels = (2 * torch.rand(3, 3, 8, 8) - 1).requires_grad_()
    output = model(pixels, labels=torch.tensor([0, 1, 2]))
    assert output.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(output.logits, torch.arange(3)).item())
    output.loss.backward()
    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.vae.parameters())
    assert sum(parameter.grad is not None for parameter in model.energy_model.parameters()) > 10


def test_trainer_fine_tunes_and_its_checkpoint_loads(tmp_path):
    model = EGCForImageClassification.from_pretrained(make_export(tmp_path))
    rows = [{"pixel_values": torch.full((3, 8, 8), i / 3), "labels": i} for i in range(3)] * 2
    arguments = {"max_steps": 3, "per_device_train_batch_size": 6, "learning_rate": 1e-2, "use_cpu": True}
    options = TrainingArguments(str(tmp_path / "trained"), report_to=[], disable_tqdm=True, **arguments)
    trainer = Trainer(model, options, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    encoder = {k: v.clone() for k, v in model.vae.state_dict().items()}
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert all(torch.equal(v, encoder[k]) for k, v in model.vae.state_dict().items())
    predictions = trainer.predict(rows).predictions
    assert predictions.shape == (6, 3)  # the logits; the energy is left out
    trained = AutoModelForImageClassification.from_pretrained(tmp_path / "trained" / "checkpoint-3")
    pixels = torch.stack([row["pixel_values"] for row in rows])
    assert torch.allclose(trained(pixels).logits, torch.from_numpy(predictions), atol=1e-5)


def test_features_are_those_that_a_probe_reads(exported):
    denoiser = load_denoiser(str(exported))
    pixels = 2 * torch.rand(3, 3, 8, 8) - 1
    latents = denoiser.encode(pixels)
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(5)).expand_as(latents)
    expected = denoiser.features(denoiser.noised(latents, noise, 90), 90)
    for block in ("in", [*expected][2], [*expected][-1]):
        features = expected[block]
        model = AutoModel.from_pretrained(exported, block=block, timestep=90, pooling=2, noise_seed=5)
        assert type(model) is EGCModel
        output = model(pixels)
        assert torch.equal(output.last_hidden_state, features)
        p = min(2, features.shape[-1])
        assert torch.equal(output.pooler_output, torch.nn.functional.adaptive_avg_pool2d(features, p).flatten(1))
    last = EGCModel.from_pretrained(exported)(pixels).last_hidden_state  # by default the last block's
    assert last.shape == [*expected.values()][-1].shape


def test_a_new_linear_head_for_other_classes(exported):
    names = dict(enumerate("abcde"))
    options = {"classifier": "linear", "pooling": 2, "id2label": names, "label2id": {}}
    model = EGCForImageClassification.from_pretrained(exported, **options)
    loss = model(torch.rand(4, 3, 8, 8), labels=torch.arange(4)).loss
    loss.backward()
    assert model.linear.weight.shape == (5, model.feature_width)
    assert model.linear.weight.grad.abs().sum() > 0
    assert next(model.energy_model.parameters()).grad is not None
    model.save_pretrained(exported.parent / "linear")
    again = AutoModelForImageClassification.from_pretrained(exported.parent / "linear")
    assert torch.equal(again.linear.weight, model.linear.weight)
    assert AutoModel.from_pretrained(exported.parent / "linear").config.pooling == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id2label": {0: "a", 1: "b"}}, "the energy network has 3 classes, got num_labels=2; classifier='linear'"),
        ({"classifier": "mlp"}, "classifier must be 'energy' or 'linear', got 'mlp'"),
        ({"block": "up.9"}, r"block must be one of in, down\.0\.0, .*, got 'up\.9'"),
        ({"timestep": 1000}, r"timestep must be in \[0, 1000\), got 1000"),
        ({"pooling": 0}, "pooling must be at least 1, got 0"),
    ],
)
def test_configurations_that_do_not_fit_are_refused_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        EGCForImageClassification.from_pretrained(make_export(tmp_path), **options)


def test_a_network_without_classes_gives_features_alone(tmp_path):
    tiny_pipeline(num_classes=None, energy_channels=2).save_pretrained(tmp_path / "run" / "pipeline")
    folder = export(tmp_path / "run", tmp_path / "exported")
    assert 'pipeline("image-classification"' not in (folder / "README.md").read_text()
    assert EGCModel.from_pretrained(folder)(torch.rand(1, 3, 8, 8)).pooler_output.isfinite().all()
    with pytest.raises(ValueError, match="the energy network has no classes"):
        EGCForImageClassification.from_pretrained(folder)


def test_the_image_processor_takes_no_other_options():
    with pytest.raises(ValueError, match="takes images and return_tensors, got do_resize"):
        EGCImageProcessor(8)(gradient_image(), do_resize=False)


def test_an_exported_folder_is_still_a_pipeline_to_start_and_to_probe_from(tmp_path):
    """Its config.json, transformers', is not taken for a network's."""
    folder = make_export(tmp_path)
    model = TINY_BACKBONES["unet"](randomise=False)
    load_initial_weights(model, str(folder))
    expected = EGCPipeline.from_pretrained(folder).energy_model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert load_denoiser(str(folder)).class_names == list(NAMES.values())


# Runs where importing latent_egc fails, as on a machine that has transformers and diffusers alone.
STRANGER = (
    WITHOUT_THE_PACKAGE
    + """
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
out, *sources = sys.argv[1:]
images, found = torch.load(out + "/images.pt", weights_only=False), []
for source in sources:
    processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=True)
    model = AutoModelForImageClassification.from_pretrained(source, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    inputs = processor(images, return_tensors="pt")
    found.append(model(**inputs).logits.detach())
    model.save_pretrained(out + "/resaved")
    again = AutoModelForImageClassification.from_pretrained(out + "/resaved", trust_remote_code=True)
    assert torch.equal(again(**inputs).logits, found[-1])
    assert AutoModel.from_pretrained(source, trust_remote_code=True)(**inputs).pooler_output.isfinite().all()
classify = pipeline("image-classification", model=sources[0], trust_remote_code=True)
assert classify(images[0], top_k=1)[0]["label"] == model.config.id2label[found[0][0].argmax().item()]
assert "latent_egc" not in sys.modules
torch.save(found, out + "/found.pt")
"""
)


def test_without_the_package_the_code_in_the_folder_gives_the_same_bits(tmp_path):
    """From a folder, and from the Hub's cache."""
    folders = [make_export(tmp_path / name, name, "taesd") for name in TINY_BACKBONES]
    images = odd_images()
    torch.save(images, tmp_path / "images.pt")
    repository = tmp_path / "hub" / "hub" / "models--someone--tiny"
    shutil.copytree(folders[1], repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, str(tmp_path), str(folders[0]), "someone/tiny"]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    for folder, found in zip(folders, torch.load(tmp_path / "found.pt"), strict=True):
        assert torch.equal(found, EGCPipeline.from_pretrained(folder).classify(images).logits)


def test_no_code_of_a_folder_is_run_without_the_flag(tmp_path):
    folder = make_export(tmp_path)
    (folder / "image_classification.py").write_text("raise SystemExit('was run')")
    assert type(AutoModelForImageClassification.from_pretrained(folder)) is EGCForImageClassification
    assert type(AutoImageProcessor.from_pretrained(folder)) is EGCImageProcessor
    assert EGCConfig.from_pretrained(folder).weights_in_components
