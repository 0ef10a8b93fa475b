"""Every configuration in configs/: it loads, dry-runs at its full width, and trains two steps at a reduced one."""

import datasets
import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from tiny import ROOT, tiny_kl

from latent_egc import EGCPipeline
from latent_egc.commands import main
from latent_egc.config import load_config
from latent_egc.training.build import resolve_model
from latent_egc.training.checkpoints import read_metrics
from latent_egc.training.loop import train

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
NUM_IMAGES = 6

# Sizes that a smoke test has time for, where a recipe names the field.
SMALL = {
    "unet": {
        "layers_per_block": 1,
        "class_embedding_dim": 4,
        "num_attention_heads": 1,
        "attention_head_dim": 4,
        "energy_channels": 3,
        "norm_num_groups": 2,
    },
    "transformer": {"width": 8, "num_layers": 2, "num_attention_heads": 1},
}
SMOKE = (
    "training.max_steps=2",
    "training.compile=false",
    "training.train_batch_size=2",
    "training.gradient_accumulation_steps=1",
    "training.num_validation_images=1",
    "training.trackers=[]",
    "sampling.num_inference_steps=1",
    "sampling.num_images_per_label=1",
    "sampling.max_classes=1",
)


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    """Tables are prepared below the test's own folder; Accelerate's state is each run's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def stand_ins(recipe, folder) -> list[str]:
    """Overrides that put generated images and a tiny autoencoder, of the recipe's shapes, in the place of its own."""
    config = load_config(recipe, ["autoencoder.path=null", "data.data_dir=null", "data.data_files=null"])
    model, data = resolve_model(config.model), config.data
    overrides = [f"output_dir={folder / 'run'}", "data.latent_cache=null"]
    overrides += ["data.dataset=parquet", "data.data_dir=null", "data.subset=null", "data.num_workers=0"]

    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (NUM_IMAGES, 1, 1, 3), dtype=np.uint8)
    images = [Image.fromarray(np.broadcast_to(c, (data.image_size, data.image_size, 3))) for c in colours]
    image_column, label_column = data.image_column or "image", data.label_column or "label"
    names = [f"class {i}" for i in range(model["num_classes"] or 2)]
    features = datasets.Features({image_column: datasets.Image(), label_column: datasets.ClassLabel(names=names)})
    columns = {image_column: images, label_column: [0, 1] * (NUM_IMAGES // 2)}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "images.parquet")
    splits = {split for split in (data.train_split, data.validation_split) if split is not None}
    overrides.append(f"data.data_files={dict.fromkeys(sorted(splits), str(folder / 'images.parquet'))}")

    if yaml.safe_load(recipe.read_text())["autoencoder"]["path"] is not None:  # else pixel space
        halvings = (data.image_size // model["sample_size"]).bit_length() - 1
        vae = tiny_kl(
            latent_channels=model["in_channels"],
            block_out_channels=(2,) * (halvings + 1),
            down_block_types=("DownEncoderBlock2D",) * (halvings + 1),
            up_block_types=("UpDecoderBlock2D",) * (halvings + 1),
            layers_per_block=1,
        )
        vae.save_pretrained(folder / "vae")
        overrides.append(f"autoencoder.path={folder / 'vae'}")
    return overrides


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_dry_runs(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), *stand_ins(recipe, tmp_path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "parameters" in out
    assert not (tmp_path / "run").exists()
    if recipe.stem == "imagenet256":
        assert "EGCUNet: 543,119,208 parameters" in out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains(recipe, tmp_path):
    named = resolve_model(load_config(recipe, ["autoencoder.path=null", "data.data_files=null"]).model)
    small = dict(SMALL[named["backbone"]])
    if named["backbone"] == "unet":
        small["block_out_channels"] = [4] * len(named["block_out_channels"])
    overrides = [f"model.{name}={value}" for name, value in small.items() if named[name] is not None]
    config = load_config(recipe, [*stand_ins(recipe, tmp_path), *overrides, *SMOKE])
    run = train(config)
    losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert losses
    assert np.isfinite(losses).all()
    pipeline = EGCPipeline.from_pretrained(run / "pipeline")
    assert pipeline.image_size == config.data.image_size
    assert len(pipeline.id2label) == (named["num_classes"] or 0)
