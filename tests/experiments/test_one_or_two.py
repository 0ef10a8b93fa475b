"""One network or two: what is counted, every form in little, and the table."""

import json
import re
import shutil
import sys

import datasets
import pytest
import torch
import yaml
from tiny import ROOT, generator, tiny_kl, tiny_unet, write_images

from latent_egc.config import ConfigError
from latent_egc.objective import EGCObjective
from latent_egc.training.build import resolve_model
from latent_egc.training.checkpoints import read_metrics

MODEL = {"sample_size": 4, "in_channels": 2, "num_classes": 3, "layers_per_block": 1, "attention_levels": [1]}
MODEL |= {"block_out_channels": [12, 24], "norm_num_groups": 2, "num_attention_heads": 2}
FAST = ["num_resamples=10", "classification.num_timesteps=2", "corruption.num_images=2", "robustness.num_images=2"]
FAST += ["robustness.pgd_steps=1", "robustness.pgd_restarts=1", "robustness.check_steps=[1]", "ood.timesteps=[]"]
FAST += ["generation.num_samples=6", "generation.num_judge_images=14", "generation.kid_subset_size=4"]


@pytest.fixture
def script(experiment):
    return experiment("one_or_two")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A joint network's run on images of three classes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    write_images(tmp_path / "images")
    tiny_kl().save_pretrained(tmp_path / "vae")
    data = {"dataset": "imagefolder", "data_dir": str(tmp_path / "images"), "image_size": 8, "validation_fraction": 0.3}
    training = {"max_steps": 2, "train_batch_size": 4, "warmup_steps": 0, "trackers": []}
    values = {"model": MODEL, "autoencoder": {"path": str(tmp_path / "vae")}, "data": data, "training": training}
    values["sampling"] = {"num_inference_steps": 2, "guidance_scale": 3.0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "config.yaml"


@pytest.mark.parametrize("class_embedding", [False, True])
def test_the_multiply_adds_of_a_transformer_by_hand(script, class_embedding):
    width, patch, channels, classes, layers, tokens = 16, 2, 2, 3, 3, 4
    section = {"backbone": "transformer", "sample_size": 4, "in_channels": channels, "num_classes": classes}
    section |= {"patch_size": patch, "width": width, "num_layers": layers, "num_attention_heads": 2}
    patches = tokens * patch**2 * width * (channels + classes)  # in and out, head map
    conditioning = 256 * width + width * width + 2 * width * width
    attention = tokens * 4 * width * width + 2 * tokens**2 * width
    block = attention + tokens * 8 * width * width + 6 * width * width
    found = script.multiply_adds(section | {"class_embedding": class_embedding})  # a look-up multiplies nothing
    assert found == patches + conditioning + layers * block


def test_what_forms_cost_in_units(script, config, tmp_path):
    def cost(name, *overrides):
        own, joint = script.config_of(name, config, tmp_path, 0, overrides)
        return script.units_an_image(script.FORMS[name].objective, own, script.multiply_adds(joint.model)), own

    units, joint = cost("joint")
    assert units == 9
    passes = {name: script.training_passes(form.objective, joint) for name, form in script.FORMS.items()}
    assert [*passes.values()] == [9, 3, 6, 3, 3, 3, 3, 3]
    assert cost("joint", "model.class_embedding=true", "objective.clean_fraction=0.5")[0] == 10.5
    assert cost("noised_classifier", "objective.clean_fraction=0.5")[0] == 4.5
    units, own = cost("noise_predictor")
    more = script.multiply_adds(own.model) / script.multiply_adds(MODEL)
    assert units == 3 * more
    assert 1 < more < 1.3
    objective = script.FORMS["noise_predictor"].objective
    assert script.sampling_passes(objective, own) == script.sampling_passes(EGCObjective, joint) == 4

    longer = [cost(f"small_{name}_units", "training.max_steps=1000") for name in ("classifier", "noise_predictor")]
    assert [own.model["block_out_channels"] for _, own in longer] == [[8, 16], [8, 16]]
    units = sum(units * own.training.max_steps for units, own in longer)
    assert units == pytest.approx(9 * 1000, abs=sum(units for units, _ in longer))
    assert len({own.training.max_steps for _, own in longer}) == 1


def test_widths_are_narrowed_as_group_norms_and_heads_allow(script):
    def narrowed(**section):
        return script.narrowed(resolve_model({"num_classes": 3} | section))

    assert narrowed(block_out_channels=[96, 192]) == "model.block_out_channels=[64, 128]"
    assert narrowed(block_out_channels=[96, 192], norm_num_groups=4) == "model.block_out_channels=[68, 136]"
    assert narrowed(backbone="transformer", width=320, num_attention_heads=5) == "model.width=220"


def test_the_noised_classifier_learns_the_joint_objectives_classification_loss_alone(script):
    draws = generator()
    latents, clean_latents, noise = (torch.randn(4, 2, 4, 4, generator=draws) for _ in range(3))
    labels, timesteps = torch.tensor([0, 1, 2, -1]), torch.tensor([0, 300, 600, 999])
    inputs = {"clean_latents": clean_latents, "clean_labels": labels, "noise": noise, "timesteps": timesteps}
    options = {"classification_weight": 0.5, "label_smoothing": 0.1}
    found = script.NoisedObjective(tiny_unet(), **options)(latents, labels, **inputs)
    expected = EGCObjective(tiny_unet(), **options)(latents, labels, **inputs)
    torch.testing.assert_close(found.classification_loss, expected.classification_loss)
    torch.testing.assert_close(found.loss, 0.5 * found.classification_loss)
    assert found.denoising_loss == 0


def test_every_form_is_trained_measured_and_shown(script, config, tmp_path, monkeypatch, capsys, extractor):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["one_or_two.py", *map(str, arguments)])
        script.main()
        return capsys.readouterr().out

    folder = tmp_path / "forms"
    suites = ["--set", *FAST, f"ood.data={config}", f"generation.features=[{extractor}]"]
    call("train", config, folder, "noise_predictor", "training.max_steps=1")
    shutil.rmtree(folder / "noise_predictor" / "0" / "pipeline")  # as if it had been stopped; it goes on below
    for name in script.FORMS:
        assert call("train", config, folder, name).strip().endswith(str(folder / name / "0"))
    assert [row["step"] for row in read_metrics(folder / "noise_predictor" / "0" / "metrics.jsonl")] == [1, 1, 2, 2]
    monkeypatch.setattr(script, "train", None)
    call("train", config, folder, "noise_predictor")
    cost = (folder / "joint" / "0" / "form.json").read_text()
    with pytest.raises(ConfigError, match=r"holds a run of training.max_steps=2, asked for is 9"):
        call("train", config, folder, "joint", "training.max_steps=9")
    assert (folder / "joint" / "0" / "form.json").read_text() == cost
    for name in ("joint", "classifier", "noise_predictor"):
        call("measure", folder / name / "0", *suites)
    call("measure", folder / "noised_classifier" / "0", "--suites", "classification", "generation", *suites)

    def shown():
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in call("table", folder).splitlines()]
        return {name: {row[0]: row[number] for row in rows[2:]} for number, name in enumerate(rows[0]) if name}

    found = shown()
    assert [*found] == ["joint", "noised_classifier", "two networks"]
    assert all(found["joint"].values())
    assert all(found["two networks"].values())
    sampled, classified = ("FD", "class agreement", "denoising loss", "units a sample"), ("accuracy", "PGD 2/255")
    assert found["noised_classifier"]["accuracy"]
    assert not any(found["noised_classifier"][column] for column in sampled)
    shutil.move(folder / "classifier", tmp_path / "aside")
    alone = shown()
    assert [*alone] == ["joint", "noised_classifier", "noise_predictor"]
    assert not any(alone["noise_predictor"][column] for column in (*classified, "OOD AUROC, energy"))
    assert all(alone["noise_predictor"][column] == found["two networks"][column] for column in sampled)
    shutil.move(tmp_path / "aside", folder / "classifier")
    values = json.loads((folder / "classifier" / "0" / "measured.json").read_text())["values"]
    assert all(f"{values[column]:.1%}" == found["two networks"][column] for column in classified)
    parts = [json.loads((folder / name / "0" / "measured.json").read_text()) for name in ("joint", "noise_predictor")]
    read = read_metrics(folder / "noise_predictor" / "0" / "metrics.jsonl")[-1]["validation_denoising_loss"]
    assert parts[1]["values"]["denoising loss"] != pytest.approx(read, rel=1e-6), "the field's, not the energy's"
    last = [row for row in read_metrics(folder / "joint" / "0" / "metrics.jsonl") if "validation_accuracy" in row][-1]
    assert parts[0]["values"]["denoising loss"] == pytest.approx(last["validation_denoising_loss"], rel=1e-5)

    parts[0]["values"]["denoising loss"] += 0.1
    (folder / "joint" / "7").mkdir()
    (folder / "joint" / "7" / "measured.json").write_text(json.dumps(parts[0] | {"seed": 7}))
    loss = parts[0]["values"]["denoising loss"]
    assert shown()["joint"]["seeds"] == "0, 7"
    assert shown()["joint"]["denoising loss"] == f"{loss - 0.05:.4f} ({loss - 0.1:.4f} to {loss:.4f})"


def test_the_documented_table_is_that_of_the_documented_measurements(script):
    """Row by row and number by number; the page names the columns in words, and the parameters in millions."""
    columns = {
        "joint energy": "joint",
        "two networks": "two networks",
        "two small, equal images": "two small networks, equal images",
        "two small, equal units": "two small networks, equal units",
        "classifier with the joint one's noise": "noised_classifier",
    }
    lines = script.table(ROOT / "docs" / "reports" / "one_or_two").splitlines()
    measured = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    page = (ROOT / "docs" / "results.md").read_text().partition("## One network or two?")[2]
    rows = [line for line in page.partition("\n\nA unit is")[0].splitlines() if line.startswith("| ")]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]
    assert shown[0][1:] == [*columns]
    measured_rows = [row for row in measured[2:] if row[0] != "seeds"]
    assert len(shown[1:]) == len(measured_rows)
    for row, own in zip(shown[1:], measured_rows, strict=True):
        for title, cell in zip(shown[0][1:], row[1:], strict=True):
            numbers = re.findall(r"[\d.,]+", own[measured[0].index(columns[title])])
            if own[0] == "parameters":
                numbers = [f"{float(number.replace(',', '')) / 1e6:.1f}" for number in numbers]
            assert re.findall(r"[\d.,]+", cell) == numbers, (row[0], title)
