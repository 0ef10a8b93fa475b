"""Configurations: what is accepted, what is refused, and that every refusal names the key."""

import inspect
import math

import pytest
import torch
import yaml
from tiny import ROOT, SHARED

from latent_egc import EGCUNet
from latent_egc.config import Config, ConfigError, load_config, parse_config
from latent_egc.training.build import build_network, resolve, resolve_model

MODEL = {"sample_size": 8, "in_channels": 4, "num_classes": 10, "block_out_channels": [32, 64], "attention_levels": [1]}


@pytest.fixture
def write(tmp_path):
    """Writes YAML text to a file and returns its path."""

    def write_text(text: str):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write_text


def refused(values: dict, *parts: str) -> None:
    """Asserts that `values` beside a usable model raise a ConfigError whose message holds all `parts`."""
    with pytest.raises(ConfigError) as error:
        resolve(parse_config({"model": MODEL} | values))
    for part in parts:
        assert part in str(error.value)


def test_defaults_need_only_a_model():
    config = parse_config({"model": MODEL})
    model = resolve_model(config.model)
    assert model["backbone"] == "unet"
    assert config.data.dataset == "digits"
    assert config.autoencoder.path == "digits_vae"
    assert config.objective.classification_weight == 0.2
    assert model["num_train_timesteps"] == 1000


def test_model_defaults_are_the_constructors():
    model = build_network(resolve_model(parse_config({"model": MODEL}).model))
    for key, value in MODEL.items():
        assert model.config[key] == (tuple(value) if isinstance(value, list) else value)


def test_overrides_win_over_the_file(write):
    path = write(yaml.safe_dump({"model": MODEL, "training": {"max_steps": 5, "seed": 3}}))
    overrides = [
        "training.max_steps=7",
        "model.num_classes=null",
        "model.energy_channels=8",
        "data.horizontal_flip=true",
    ]
    overrides += ["data.random_resized_crop=[0.25, 1]", "output_dir=runs/a=b", "training.trackers=[]"]
    config = load_config(path, overrides)
    assert (config.training.max_steps, config.training.seed) == (7, 3)
    assert resolve_model(config.model)["num_classes"] is None
    assert config.data.horizontal_flip
    assert config.data.random_resized_crop == (0.25, 1.0)
    assert config.output_dir == "runs/a=b"
    assert config.training.trackers == ()


def test_override_of_an_absent_and_of_an_empty_section(write):
    path = write(yaml.safe_dump({"model": MODEL, "training": None}))
    config = load_config(path, ["training.max_steps=7", "sampling.batch_size=2"])
    assert (config.training.max_steps, config.sampling.batch_size) == (7, 2)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("training.max_steps", "KEY.SUB=VALUE"),
        ("training..seed=1", "KEY.SUB=VALUE"),
        ("=1", "KEY.SUB=VALUE"),
        ("output_dir.name=x", "output_dir is a value"),
        ("training.adam_betas=[0.9", "training.adam_betas=[0.9"),
        ("training.max_step=1", "did you mean max_steps?"),
        ("training=5", "training must be a section"),
    ],
)
def test_bad_overrides_are_named(write, override, part):
    path = write(yaml.safe_dump({"model": MODEL, "output_dir": "runs/a"}))
    with pytest.raises(ConfigError) as error:
        load_config(path, [override])
    assert part in str(error.value)


def test_unknown_keys_get_a_suggestion():
    refused({"trainig": {}}, "unknown key trainig", "did you mean training?")
    refused({"data": {"image_siz": 3}}, "unknown key data.image_siz", "did you mean image_size?")
    refused({"model": MODEL | {"num_clases": 3}}, "unknown key model.num_clases", "did you mean num_classes?")
    refused({"data": {"zzz": 3}}, "unknown key data.zzz", "allowed are dataset, ")


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"training": {"max_steps": "many"}}, ["training.max_steps must be int", "'many'"]),
        ({"training": {"max_steps": 1.5}}, ["training.max_steps must be int", "1.5"]),
        ({"training": {"max_steps": True}}, ["training.max_steps must be int", "True"]),
        ({"training": {"learning_rate": "fast"}}, ["training.learning_rate must be float", "'fast'"]),
        ({"training": {"learning_rate": math.inf}}, ["training.learning_rate must be float", "inf"]),
        ({"training": {"lr_schedule": "linear"}}, ["training.lr_schedule must be one of 'constant', 'cosine'"]),
        ({"training": {"adam_betas": [0.9]}}, ["training.adam_betas", "[0.9]"]),
        ({"training": {"trackers": "tensorboard"}}, ["training.trackers", "'tensorboard'"]),
        ({"data": {"horizontal_flip": 1}}, ["data.horizontal_flip must be bool"]),
        ({"data": {"data_files": ["a", "b"]}}, ["data.data_files must be str | dict[str, str] | None"]),
        ({"data": [1]}, ["data must be a section"]),
        ({"model": None}, ["model must be a section"]),
        ({"model": MODEL | {"backbone": ["unet"]}}, ["model.backbone must be one of unet"]),
        ({"model": MODEL | {"block_out_channels": [32, "wide"]}}, ["model.block_out_channels must be int", "'wide'"]),
        ({"output_dir": 3}, ["output_dir must be str"]),
    ],
)
def test_wrong_types_name_key_and_value(values, parts):
    refused(values, *parts)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"training": {"max_steps": 0}}, ["training.max_steps must be in [1, inf], got 0"]),
        ({"training": {"adam_betas": [0.9, 1.5]}}, ["training.adam_betas must be in [0, 1], got [0.9, 1.5]"]),
        ({"data": {"random_resized_crop": [0.0, 1.0]}}, ["data.random_resized_crop must be in [0.01, 1]"]),
        ({"data": {"random_resized_crop": [0.9, 0.5]}}, ["data.random_resized_crop must be (smallest, largest)"]),
        ({"data": {"random_resized_crop_ratio": [2, 1]}}, ["data.random_resized_crop_ratio must be (smallest, lar"]),
        ({"data": {"mixup": -0.1}}, ["data.mixup must be in [0, inf]", "-0.1"]),
        ({"data": {"reprob": 1.5}}, ["data.reprob must be in [0, 1]", "1.5"]),
        ({"data": {"cutmix": 1.0}, "training": {"train_batch_size": 5}}, ["data.cutmix", "must be even, got 5"]),
        (
            {"data": {"mixup": 1.0}, "training": {"train_batch_size": 6}, "objective": {"clean_fraction": 0.5}},
            ["objective.clean_fraction", "must be even, got 3"],
        ),
        ({"objective": {"timestep_log_normal": [0, 0]}}, ["objective.timestep_log_normal", "std > 0, got [0.0, 0.0]"]),
        ({"objective": {"timestep_log_normal": [1]}}, ["objective.timestep_log_normal must be"]),
        ({"objective": {"label_smoothing": 1.0}}, ["objective.label_smoothing must be in [0, 0.99], got 1.0"]),
        ({"sampling": {"guidance_scale": 0.5}}, ["sampling.guidance_scale must be in [1, inf], got 0.5"]),
    ],
)
def test_values_out_of_range_name_key_value_and_range(values, parts):
    refused(values, *parts)


def test_model_is_required():
    with pytest.raises(ConfigError, match="model is missing"):
        parse_config({})


def test_file_errors_name_the_file(tmp_path, write):
    with pytest.raises(ConfigError, match=r"config file not found: .*none\.yaml"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"config\.yaml is not valid YAML"):
        load_config(write("model: ["))
    with pytest.raises(ConfigError, match=r"config\.yaml must hold a mapping"):
        load_config(write("- model"))
    path = tmp_path / "image.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=r"image\.yaml"):
        load_config(path)


def test_missing_files_and_folders_name_the_key(tmp_path):
    gone = str(tmp_path / "gone")
    refused({"data": {"dataset": "imagefolder", "data_dir": gone}}, f"data.data_dir: no such file or folder: {gone}")
    refused({"data": {"dataset": "parquet", "data_files": gone}}, "data.data_files", gone)
    refused({"data": {"dataset": "parquet", "data_files": {"train": gone}}}, "data.data_files", gone)
    refused({"autoencoder": {"path": gone}}, f"autoencoder.path: no such folder: {gone}")


def test_paths_inside_a_hub_repository_and_patterns_are_not_looked_for():
    parse_config({"model": MODEL, "data": {"dataset": "user/name", "data_dir": "inside"}})
    parse_config({"model": MODEL, "data": {"dataset": "parquet", "data_files": "folder/*.parquet"}})


def test_yaml_1_1_spellings(write):
    """YAML 1.1 reads 1e-4 as a string and a bare no as false; both mean what they look like."""
    text = yaml.safe_dump({"model": MODEL}) + "training:\n  learning_rate: 1e-4\n  mixed_precision: no\n"
    training = load_config(write(text), ["training.weight_decay=1e-2"]).training
    assert (training.learning_rate, training.mixed_precision, training.weight_decay) == (1e-4, "no", 1e-2)


def test_duplicate_keys_and_alias_bombs_are_refused_by_file_and_key(write):
    text = yaml.safe_dump({"model": MODEL})
    with pytest.raises(ConfigError, match=r"config\.yaml is not valid YAML: duplicate key 'seed'"):
        load_config(write(text + "training:\n  seed: 1\n  log_every: 2\n  seed: 3\n"))
    bomb = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(12))
    with pytest.raises(ConfigError, match=r"config\.yaml is not valid YAML: with its aliases written out"):
        load_config(write(text + bomb))
    with pytest.raises(ConfigError, match=r"override 'data\.data_files=\{a: b, a: c\}': .*duplicate key 'a'"):
        load_config(write(text), ["data.data_files={a: b, a: c}"])


@pytest.mark.parametrize("text", ["010", "1:30"])
def test_octal_and_sexagesimal_numbers_are_refused(write, text):
    path = write(yaml.safe_dump({"model": MODEL}) + f"training:\n  max_steps: {text}\n")
    with pytest.raises(ConfigError, match=f"training.max_steps must be int, got '{text}'"):
        load_config(path)
    with pytest.raises(ConfigError, match=f"training.seed must be int, got '{text}'"):
        load_config(write(yaml.safe_dump({"model": MODEL})), [f"training.seed={text}"])


def test_home_and_variables_in_paths_are_replaced(tmp_path, monkeypatch):
    """An unknown variable is an error; what is no path stays as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    for name in ("data", "vae"):
        (tmp_path / name).mkdir()
    values = {
        "model": MODEL | {"init_from": "~/vae"},
        "autoencoder": {"path": "~/vae", "subfolder": None},
        "data": {"dataset": "imagefolder", "data_dir": "${DATA}", "latent_cache": "${DATA}/cache", "train_split": "~"},
        "output_dir": "~/runs/${DATA}",
    }
    config = resolve(parse_config(values))
    assert config.model["init_from"] == config.autoencoder.path == str(tmp_path / "vae")
    assert config.data.data_dir == str(tmp_path / "data")
    assert config.data.latent_cache == str(tmp_path / "data" / "cache")
    assert config.data.train_split == "~"
    assert config.output_dir == f"{tmp_path}/runs/{tmp_path}/data"
    files = {"data": {"dataset": "parquet", "data_files": {"train": "${DATA}/*.parquet"}}}
    assert parse_config({"model": MODEL} | files).data.data_files == {"train": f"{tmp_path}/data/*.parquet"}
    monkeypatch.delenv("DATA")
    refused({"output_dir": "${DATA}/runs"}, "output_dir='${DATA}/runs'", "no variable 'DATA'")
    refused({"data": {"latent_cache": "${}"}}, "data.latent_cache='${}'")
    refused({"model": MODEL | {"init_from": "${DATA}"}}, "model.init_from='${DATA}'")


def test_quotes_too_many_and_too_few_are_hinted_at():
    refused(
        {"data": {"horizontal_flip": "true"}}, "data.horizontal_flip must be bool, got 'true' (str)", "without quotes"
    )
    refused({"model": MODEL | {"class_embedding": "No"}}, "model.class_embedding must be bool", "without quotes")
    refused({"data": {"subset": False}}, "data.subset must be str, got False (bool)", "in quotes")


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"training": {"max_steps": 10**30}}, "training.max_steps must be between -2^32 and 2^32, got 1000"),
        ({"model": MODEL | {"num_classes": 2**63}}, "model.num_classes must be between -2^32 and 2^32, got 9223"),
        ({"training": {"seed": 2**63}}, "training.seed"),
        ({"training": {"seed": -1}}, "training.seed must be in [0, 4.29497e+09], got -1"),
        ({"data": {"image_size": 10**6}}, "data.image_size must be in [1, 16384], got 1000000"),
        ({"data": {"num_workers": 10**6}}, "data.num_workers must be in [0, 1024], got 1000000"),
        ({"sampling": {"max_classes": -1}}, "sampling.max_classes"),
        ({"training": {"learning_rate": -1e-3}}, "training.learning_rate must be in [0, inf], got -0.001"),
    ],
)
def test_negative_and_huge_numbers_are_named(values, part):
    refused(values, part)


def test_label_fraction_is_a_share():
    assert parse_config({"model": MODEL}).data.label_fraction == 1.0
    for fraction in (0.0, -0.1, 1.5):
        refused({"data": {"label_fraction": fraction}}, "data.label_fraction must be in", str(fraction))


def test_old_names_of_keys_are_understood_with_one_warning(write):
    text = yaml.safe_dump(
        {
            "model": MODEL,
            "training": {"evaluate_every": 3, "num_evaluation_samples": 5},
            "sampling": {"images_per_class": 2},
        }
    )
    with pytest.warns(UserWarning, match="training.evaluate_every is now training.validate_every") as warned:
        config = load_config(write(text), ["training.num_validation_images=7", "sampling.images_per_class=4"])
    assert len(warned) == 1
    assert "sampling.images_per_class is now sampling.num_images_per_label" in str(warned[0].message)
    training = config.training
    assert (training.validate_every, training.num_validation_images) == (3, 7)
    assert config.sampling.num_images_per_label == 4
    text = yaml.safe_dump({"model": MODEL, "training": {"validate_every": 3}})
    with pytest.warns(UserWarning, match="renamed"):
        assert load_config(write(text), ["training.evaluate_every=9"]).training.validate_every == 9


def test_the_key_that_was_a_boolean_is_understood_with_its_value(write):
    text = yaml.safe_dump({"model": MODEL, "training": {"shard_optimizer": True}})
    with pytest.warns(UserWarning, match="training.shard_optimizer is now training.shard"):
        assert load_config(write(text)).training.shard == "optimizer"
    with pytest.warns(UserWarning, match="renamed"):
        assert load_config(write(text), ["training.shard_optimizer=false"]).training.shard == "none"
    with pytest.warns(UserWarning, match="renamed"):
        assert load_config(write(text), ["training.shard=parameters"]).training.shard == "parameters"
    with pytest.raises(ConfigError, match=r"training.shard must be one of 'none', 'optimizer', 'parameters', got True"):
        load_config(write(yaml.safe_dump({"model": MODEL, "training": {"shard": True}})))


def test_resolved_config_is_valid_input_and_equal(tmp_path):
    config = parse_config(
        {
            "model": MODEL | {"block_out_channels": [32, 48]},
            "autoencoder": {"path": None},
            "data": {"dataset": "user/name", "data_files": {"train": "a.parquet"}, "random_resized_crop": None},
            "training": {"learning_rate": 1e-5, "adam_betas": [0.5, 0.9], "max_grad_norm": None},
        }
    )
    config = resolve(config)
    config.save(tmp_path / "saved.yaml")
    again = resolve(load_config(tmp_path / "saved.yaml"))
    assert isinstance(again, Config)
    assert again == config
    arguments = inspect.signature(EGCUNet.__init__).parameters.keys() - {"self"}
    assert set(yaml.safe_load((tmp_path / "saved.yaml").read_text())["model"]) == {"backbone", "init_from", *arguments}


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"head": "linear"}, "head"),
        ({"num_classes": 1}, "num_classes"),
        ({"num_classes": None}, "energy_channels"),
        ({"norm_num_groups": 7}, "norm_num_groups"),
        ({"attention_levels": [2]}, "attention_levels"),
        ({"sample_size": 7}, "sample_size"),
        ({"beta_start": 0.5}, "beta"),
    ],
)
def test_contradictions_in_the_model_name_the_field(wrong, key):
    config = parse_config({"model": MODEL | wrong})
    with pytest.raises(ConfigError, match=f"model: .*{key}"):
        build_network(resolve_model(config.model))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_parse_and_build(path, monkeypatch):
    if "../shared" in path.read_text() and not SHARED.is_dir():
        pytest.skip("needs the data and weights in ../shared")
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    assert config.output_dir == f"runs/{path.stem}"
    with torch.device("meta"):  # the largest have gigabytes of weights
        model = build_network(resolve_model(config.model))
    assert model.config.num_classes == config.model["num_classes"]


def test_keys_that_are_gone_are_read_where_they_did_nothing():
    idle = {"snr_gamma": None, "classification_log_normal": None, "low_discrepancy_timesteps": False}
    assert parse_config({"model": MODEL, "objective": idle}) == parse_config({"model": MODEL})
    with pytest.raises(ConfigError, match=r"unknown key objective\.snr_gamma"):
        parse_config({"model": MODEL, "objective": {"snr_gamma": 5.0}})
