"""Training from another network's weights: what is taken over, what starts fresh, what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY_BACKBONES, tiny_pipeline, tiny_transformer, tiny_unet
from tiny_runs import run_values

from latent_egc.config import ConfigError, parse_config
from latent_egc.training.checkpoints import resolve_pipeline
from latent_egc.training.loop import train
from latent_egc.training.warm_start import load_initial_weights


@pytest.mark.parametrize("backbone", TINY_BACKBONES)
def test_weights_of_a_folder_come_back(backbone, tmp_path):
    source = TINY_BACKBONES[backbone](class_embedding=True)
    source.save_pretrained(tmp_path)
    model = TINY_BACKBONES[backbone](class_embedding=True, randomise=False, sample_size=8)
    load_initial_weights(model, str(tmp_path))
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_pipeline_folder(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    model = tiny_unet(randomise=False)
    load_initial_weights(model, str(tmp_path))
    latents = torch.randn(2, 2, 4, 4)
    torch.testing.assert_close(model.eval()(latents, 10).energy, pipeline.energy_model(latents, 10).energy)


@pytest.mark.parametrize(
    ("config", "num_classes", "fresh"),
    [
        ({"head": "inner"}, 5, {"class_out.weight", "class_out.bias"}),
        ({"head": "inner"}, None, {"class_out.weight", "class_out.bias"}),  # from an unlabelled network
        ({"head": "map", "class_embedding": True}, 5, {"proj_out.weight", "proj_out.bias", "label_embedding.weight"}),
    ],
)
def test_other_classes_start_fresh(config, num_classes, fresh, tmp_path):
    source = tiny_transformer(**config, num_classes=num_classes)
    source.save_pretrained(tmp_path)
    model = tiny_transformer(**config, num_classes=3, randomise=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(UserWarning, match="freshly initialised are " + ", ".join(sorted(fresh))):
        load_initial_weights(model, str(tmp_path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in fresh else source.state_dict()[name]), name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"width": 24, "num_layers": 2}, "num_layers is 2 there, 3 here; width is 24 there, 16 here"),
        ({"beta_schedule": "scaled_linear"}, "beta_schedule is 'scaled_linear' there, 'linear' here"),
        ({"gaussian_part": False}, "only num_classes, energy_channels, sample_size may differ"),
    ],
)
def test_other_networks_are_refused(overrides, message, tmp_path):
    tiny_transformer(**overrides).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_initial_weights(tiny_transformer(), str(tmp_path))


def test_what_cannot_be_loaded_is_refused(tmp_path):
    tiny_unet().save_pretrained(tmp_path / "unet")
    tiny_transformer().save_pretrained(tmp_path / "damaged")
    weights = tmp_path / "damaged" / "diffusion_pytorch_model.safetensors"
    save_file({n: t.clone() for n, t in load_file(weights).items() if n != "proj_out.bias"}, weights)
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("unet", "holds an EGCUNet, it cannot be loaded as an EGCTransformer"),
        ("damaged", "missing: proj_out.bias"),
        ("empty", "holds no pipeline"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_initial_weights(tiny_transformer(), str(tmp_path / folder))


def test_training_starts_from_a_run(tmp_path):
    first = run_values(tmp_path / "first", max_steps=1)
    folder = train(parse_config(first))
    second = run_values(tmp_path / "second", max_steps=1, learning_rate=0.0)
    second["model"]["init_from"] = str(folder)
    config = parse_config(second)
    assert parse_config(config.to_dict()) == config
    train(config)
    weights = "energy_model/diffusion_pytorch_model.safetensors"
    expected, found = (load_file(resolve_pipeline(tmp_path / run) / weights) for run in ("first", "second"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    # What training started from need not be there any more when it is resumed.
    second["model"]["init_from"] = None
    second["training"] |= {"max_steps": 2, "resume": "auto"}
    train(parse_config(second))


def test_nothing_is_written_where_it_cannot_be_loaded(tmp_path):
    values = run_values(tmp_path / "run")
    values["model"]["init_from"] = str(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"model.init_from: no such folder"):
        train(parse_config(values))
    tiny_unet().save_pretrained(tmp_path / "other")
    values["model"]["init_from"] = str(tmp_path / "other")
    with pytest.raises(ConfigError, match="in_channels is 2 there, 4 here"):
        train(parse_config(values))
    assert not (tmp_path / "run").exists()
