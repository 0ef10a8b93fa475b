"""The comparison's script: equal units, a line a form, and a second call that trains nothing."""

import json
import shutil
import sys

import pytest
import torch
from tiny import ROOT, generator, tiny_unet

from latent_egc.config import ConfigError, load_config
from latent_egc.objective import EGCObjective
from latent_egc.training.build import build_network, resolve

TINY = ["model.block_out_channels=[8, 16]", "model.norm_num_groups=4", "training.train_batch_size=4"]
TINY += ["training.warmup_steps=1", "training.num_validation_images=8", "training.trackers=[]"]
TINY += ["data.latent_cache=null", "sampling.max_classes=1"]
CONFIG = ROOT / "configs" / "digits.yaml"


@pytest.fixture
def script(experiment):
    return experiment("compare_objectives")


@pytest.fixture
def table(script, tmp_path, monkeypatch, capsys):
    """A function: which forms, and options -> the printed table's lines, cell by cell."""

    def table(forms, *options):
        arguments = ["compare_objectives.py", str(CONFIG), str(tmp_path), "--forms", forms, *options, *TINY]
        monkeypatch.setattr(sys, "argv", arguments)
        script.main()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
        return [line.strip("| ").split(" | ") for line in lines]

    return table


def test_forms_are_trained_at_equal_units_once(script, table, monkeypatch, capsys, tmp_path):
    names = ["all, drop 0.1", "dropped, drop 0.5, clean 0.5"]
    found = table("embedding", "--only", *names, "--steps", "4")
    assert [cells[:4] for cells in found] == [[names[0], "0", "12", "3"], [names[1], "0", "7.5", "5"]]
    monkeypatch.setattr(script, "train", None)
    assert table("embedding", "--only", *names, "--steps", "4") == found
    with pytest.raises(ConfigError, match=r"training.max_steps=3, asked for is 6"):
        table("embedding", "--only", *names, "--steps", "8")
    with pytest.raises(ConfigError, match=r"training.learning_rate=0.002, asked for is 0.5"):
        table("embedding", "--only", *names, "--steps", "4", "training.learning_rate=0.5")

    # Another seed, of which the accuracy is 20 points higher.
    shutil.copytree(tmp_path / "all_drop_0.1-0", tmp_path / "all_drop_0.1-1")
    config = tmp_path / "all_drop_0.1-1" / "config.yaml"
    config.write_text(config.read_text().replace("  seed: 0\n", "  seed: 1\n"))
    accuracy, loss = float(found[0][4].strip("%")) / 100, float(found[0][5])
    row = {"step": 3, "validation_accuracy": accuracy + 0.2, "validation_denoising_loss": loss}
    with (tmp_path / "all_drop_0.1-1" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    picture = str(tmp_path / "plot.png")
    (cells,) = table("embedding", "--only", names[0], "--seeds", "0", "1", "--steps", "4", "--plot", picture)
    assert cells[1] == "0, 1"
    assert cells[4] == f"{accuracy + 0.1:.1%} ({accuracy:.1%} to {accuracy + 0.2:.1%})"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        table("embedding", "--only", "plain", "--steps", "4")
    assert "no form 'plain' among these" in capsys.readouterr().err


def test_what_is_learned_first_takes_half_of_the_units_and_is_gone_on_from(script, table, tmp_path):
    names = [
        "a noise predictor first",
        "a noise predictor with cross entropy first",
        "cross entropy at low noise alone",
    ]
    found = table("orders", "--only", *names, "--steps", "2")
    assert [cells[2:4] for cells in found] == [["3, then 9", "3 + 1"], ["6, then 9", "2 + 1"], ["9", "2"]]
    run = tmp_path / "a_noise_predictor_first-0"
    second, first = (load_config(folder / "config.yaml") for folder in (run, run.with_name(f"{run.name}-before")))
    assert second.model["init_from"] == str(run.with_name(f"{run.name}-before"))
    assert second.training.seed != first.training.seed
    assert second.model | {"init_from": None} == first.model


def test_every_form_is_a_run_and_the_ablations_change_the_first(script):
    for forms in script.FORMS.values():
        for form in forms.values():
            for part in (form, *filter(None, [form.before])):
                build_network(resolve(load_config(CONFIG, [*TINY, *part.overrides])).model)
    keys = {
        "head inner": {"model.head"},
        "no Gaussian part": {"model.gaussian_part"},
        "class embedding": {"model.class_embedding", "objective.noisy_classification", "objective.label_drop"},
        "no label smoothing": {"objective.label_smoothing"},
        "classification weight 0.05": {"objective.classification_weight"},
        "classification weight 0.5": {"objective.classification_weight"},
        "Mixup 0.2 and CutMix 1 in half the pairs": {"data.mixup", "data.cutmix", "data.mixup_prob"},
        "timesteps uniform": {"objective.timestep_log_normal"},
    }

    def flat(form):
        sections = resolve(load_config(CONFIG, [*TINY, *form.overrides])).to_dict()
        del sections["output_dir"]
        return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}

    first, *_ = forms = list(script.FORMS["ablations"])
    assert {"transformer", *keys} == set(forms[1:])
    base = flat(script.FORMS["ablations"][first])
    for name, changed in keys.items():
        found = flat(script.FORMS["ablations"][name])
        assert {key for key in base if base[key] != found[key]} == changed


def test_the_transformer_costs_what_the_unet_does(script, experiment):
    unet = load_config(ROOT / "configs" / "one_or_two.yaml", ["data.data_files=null", "autoencoder.path=null"])
    transformer = load_config(CONFIG, script.FORMS["ablations"]["transformer"].overrides)
    costs = [experiment("one_or_two").multiply_adds(config.model) for config in (transformer, unet)]
    assert costs[0] == pytest.approx(costs[1], rel=0.01)


def test_at_low_noise_alone_the_other_noisy_rows_have_no_label(script):
    draws = generator()
    latents, clean_latents, noise = (torch.randn(4, 2, 4, 4, generator=draws) for _ in range(3))
    labels, timesteps = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 249, 250, 999])
    inputs = {"clean_latents": clean_latents, "clean_labels": labels, "noise": noise, "timesteps": timesteps}
    found = script.LowNoiseObjective(tiny_unet())(latents, labels, **inputs)
    expected = EGCObjective(tiny_unet())(latents, torch.tensor([0, 1, -1, -1]), **inputs)
    torch.testing.assert_close(found, expected)
