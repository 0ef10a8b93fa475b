"""experiments/few_labels.py: who sees which labels."""

import numpy as np
import pytest

OVERRIDES = ["data.num_views=1", "model.width=16", "model.num_layers=1", "training.max_steps=2"]
OVERRIDES += ["training.train_batch_size=4", "training.warmup_steps=1", "training.num_validation_images=20"]


@pytest.fixture
def few_labels(experiment):
    return experiment("few_labels")


def test_half_of_the_stream_is_labelled_or_all_of_it(few_labels, tmp_path, monkeypatch):
    seen = {}

    def trained(config, data, images, labels, weight):
        seen[config.output_dir.rsplit("/", 1)[1].partition("-")[0]] = images, labels, weight, config.training.seed
        return 0.5

    monkeypatch.setattr(few_labels, "trained", trained)
    number, found = few_labels.accuracies(few_labels.TASKS["digits"], OVERRIDES, tmp_path, 30 / 1437, 3)
    assert number == 30
    assert (found["all"], found["labelled"]) == (0.5, 0.5)
    assert 0.6 < found["SVC"] < found["LabelSpreading"] < 1
    images, labels, weight, seed = seen["labelled"]
    assert len(images) == len(set(images)) == 30
    assert np.array_equal(np.bincount(labels), [3] * 10)
    assert (weight, seed) == (0.1, 3)
    stream, its_labels, double, _ = seen["all"]
    assert double == 2 * weight
    assert set(stream) == set(range(1437))
    assert (its_labels >= 0).mean() == pytest.approx(0.5, abs=0.001)
    assert set(stream[its_labels >= 0]) == set(images)
    few_labels.accuracies(few_labels.TASKS["digits"], OVERRIDES, tmp_path, 30 / 1437, 4)
    assert set(seen["labelled"][0]) != set(images)  # drawn anew


def test_what_is_there_is_read_and_table_and_plot_are_of_all_seeds(few_labels, tmp_path, monkeypatch, capsys):
    task = few_labels.TASKS["digits"]._replace(shares=(10 / 1437, 30 / 1437), seeds=(0, 1), on_pixels=False)
    monkeypatch.setitem(few_labels.TASKS, "digits", task)
    drawn = []
    monkeypatch.setattr(few_labels, "plot", lambda found, path: drawn.append(found))
    arguments = ["few_labels.py", "digits", *OVERRIDES, "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*arguments, "--seeds", "1"])
    few_labels.main()
    assert not drawn
    monkeypatch.setattr("sys.argv", arguments)
    few_labels.main()
    first = capsys.readouterr().out.splitlines()[-4:]
    assert first[0] == "|  | 10 labels | 30 labels |"
    assert first[3].startswith("| energy network, labelled images alone |")
    monkeypatch.setattr(few_labels, "train", None)
    few_labels.main()
    assert capsys.readouterr().out.splitlines()[-4:] == first
    assert list(drawn[0]) == [10, 30]
    assert {len(values) for values in drawn[0][10].values()} == {2}


def test_the_plot(few_labels, tmp_path):
    found = {10: {"all": [0.4, 0.5], "labelled": [0.3, 0.3]}, 30: {"all": [0.6, 0.7], "labelled": [0.5, 0.5]}}
    few_labels.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
