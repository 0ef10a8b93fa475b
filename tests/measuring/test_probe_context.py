"""What the suites of a probe are given, and the settings that choose it."""

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from tiny import write_images
from tiny_studies import FAST_PROBE

from latent_egc.config import ConfigError
from latent_egc.data.sources import load_splits
from latent_egc.measuring.probe_context import ProbeContext
from latent_egc.measuring.study import ProbeSettings


def test_classes_need_not_be_the_pipelines(tmp_path):
    """Integer labels without names: as many classes as there are."""
    rows = datasets.Dataset.from_dict({"image": [np.zeros((8, 8, 3), np.uint8)] * 6, "label": [0, 1, 4, -1, 1, 0]})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "a.parquet")
    data = replace(write_images(tmp_path / "images"), dataset="parquet", data_dir=None, validation_fraction=0.5)
    data = replace(data, data_files=str(tmp_path / "a.parquet"))
    assert load_splits(data, "any").class_names == ["0", "1", "2", "3", "4"]


def test_corrupt_images_are_skipped_where_they_may_be(probe_context):
    """In the rows that heads train on and in those that judge them."""
    context = probe_context(extract=False)
    for table, row in ((context.splits.train, 3), (context.splits.validation, 5)):
        Path(table.rows[row]["image"]["path"]).write_bytes(b"no image")
    data, folder = replace(context.data, skip_corrupt=True), context.cache.folder.parent
    with pytest.warns(UserWarning, match="skipped 1 corrupt images of the train split, the first is row 3"):
        context = ProbeContext(context.denoiser, data, context.settings, context.accelerator, folder)
    context.cache.extract([90], context.accelerator)
    for split, labels in (("train", context.train_labels), ("validation", context.labels)):
        assert len(context.cache.features(split, 90, "in", 1)) == len(labels)
    assert (len(context.train_labels), len(context.labels)) == (13, 6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("timestep=5", r"timestep must be of timesteps=\[0, 90\], got 5"),
        ("poolings=[2,3]", "poolings must all divide the largest, got 2 beside 3"),
        ("heatmap.pooling=4", r"heatmap.pooling must be one of poolings=\[1, 2\], got 4"),
        ("timesteps=[]", "timesteps must not be empty"),
        ("heads.width=6", "heads.width must be divisible by 4"),
        ("head.width=8", r"unknown key head; did you mean heads\?"),
    ],
)
def test_settings_that_cannot_be_used(override, message):
    with pytest.raises(ConfigError, match=message):
        ProbeSettings.parse([*FAST_PROBE, override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("blocks=[mid.7]", r"blocks: the network has no block 'mid.7', it has in, down.0.0"),
        ("block=up.9.0", r"block: 'up.9.0' is not among the blocks in, "),
        ("timesteps=[1000]", "timesteps must be below 1000, got 1000"),
    ],
)
def test_settings_that_do_not_fit_the_network(probe_context, override, message):
    with pytest.raises(ConfigError, match=message):
        probe_context(override, extract=False)


def test_a_killed_heat_map_goes_on_behind_its_last_cell(probe_context, monkeypatch):
    first = probe_context()
    fitted = []
    plain = ProbeContext.probe

    def counted(self, place):
        fitted.append(place)
        if len(fitted) == 4:
            raise KeyboardInterrupt
        return plain(self, place)

    monkeypatch.setattr(ProbeContext, "probe", counted)
    with pytest.raises(KeyboardInterrupt):
        _ = first.scores
    scores = probe_context().scores
    assert len(fitted) == 4 + len(scores) - 3
    assert all(scores[place] == plain(first, place)[0] for place in fitted[:3])


def test_only_the_needed_timestep_is_computed(probe_context, tmp_path):
    made = probe_context("block=mid.0", "timestep=90", extract=False)
    assert made.timesteps_of(["heads", "few_shot"]) == [90]
    assert made.timesteps_of(["heads", "cka"]) == [0, 90]
    assert probe_context("block=mid.0", extract=False).timesteps_of(["heads"]) == [0, 90]
