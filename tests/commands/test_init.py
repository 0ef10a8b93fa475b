"""`latent-egc init`: what it writes is taken by the next commands as it is."""

import datasets
import pytest
from command_line import fails
from tiny import tiny_kl, write_images

from latent_egc.commands import main
from latent_egc.config import load_config


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Where relative paths lead, and `datasets` prepares its tables."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)
    tiny_kl().save_pretrained("vae")


def init(capsys, *arguments: str) -> tuple[str, str]:
    """Standard output, in my.yaml too, and standard error."""
    capsys.readouterr()
    assert main(["init", *arguments, "--autoencoder", "./vae", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    with open("my.yaml", "w") as file:
        file.write(captured.out)
    return captured.out, captured.err


def test_the_commands_that_it_names_run(tmp_path, capsys):
    write_images(tmp_path / "photos")
    out, err = init(capsys, "photos")
    for line in ("photos: 16 images to train on, 5 held out.", "3 classes: cat 7, cow 7, dog 7."):
        assert f"# {line}\n" in out
        assert f"{line}\n" in err
    for line in out.splitlines():
        assert line.startswith("#") or line in ("", f"{line.rstrip(':')}:") or "  # " in line, line
    config = load_config("my.yaml")
    assert config.data.data_dir == "photos"
    assert config.model["num_classes"] == 3
    assert main(["train", "my.yaml", "--dry-run"]) == 0
    small = ["training.max_steps=1", "training.trackers=[]", "data.num_views=1", "sampling.num_images_per_label=1"]
    small += ["sampling.num_inference_steps=1", "model.block_out_channels=[32]"]
    lines = err[err.index("Next, ") :].splitlines()[1:]
    encode, train, evaluate, _, export = (line.split("  # ")[0].split() for line in lines)
    assert encode == ["latent-egc", "encode", "my.yaml"]
    assert main([*encode[1:], *small]) == 0
    assert train == ["accelerate", "launch", "-m", "latent_egc", "train", "my.yaml"]
    assert main([*train[4:], *small]) == 0
    assert (tmp_path / "runs" / "photos16" / "pipeline" / "model_index.json").is_file()
    assert main([*evaluate[1:], "--set", "num_resamples=10"]) == 0
    assert (tmp_path / "runs" / "photos16" / "evaluation" / "report.html").is_file()
    assert main(export[1:]) == 0


def test_a_proposal_is_what_it_says_whatever_the_names(tmp_path, capsys):
    write_images(tmp_path / "a: 'b'\n#c", classes=("x\ny: 1", "no"), per_class=3)
    out, _ = init(capsys, "a: 'b'\n#c", "--image-size", "8")
    config = load_config("my.yaml")
    assert (config.data.data_dir, config.data.image_size) == ("a: 'b'\n#c", 8)
    assert "2 classes: no 3, x?y: 1 3." in out
    assert config.output_dir == "runs/a_b_c8"


def test_one_class_is_said_to_be_none(tmp_path, capsys):
    write_images(tmp_path / "photos", classes=("cat",))
    out, _ = init(capsys, "photos")
    assert "# No classes: the model is unlabelled, it only samples.\n" in out
    assert load_config("my.yaml").model["num_classes"] is None


def test_errors(tmp_path, capsys):
    write_images(tmp_path / "photos", per_class=2)
    (tmp_path / "empty").mkdir()
    fails(capsys, ["init", "empty", "--autoencoder", "./vae"], "empty holds no image")
    fails(capsys, ["init", "photos", "--autoencoder", "./none"], "autoencoder.path='./none' cannot be loaded")
    odd = ["init", "photos", "--autoencoder", "./vae", "--image-size", "7"]
    fails(capsys, odd, "data.image_size must be divisible by the autoencoder's factor 2, got 7")
