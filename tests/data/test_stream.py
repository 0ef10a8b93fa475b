"""The training stream: every sample is a function of (seed, number)."""

import os
from itertools import chain, product

import numpy as np
import pytest
import torch
from tiny_images import write_folder
from tiny_runs import run_values
from torch.utils.data import DataLoader

from latent_egc.config import DataConfig, parse_config
from latent_egc.data.sources import load_splits
from latent_egc.data.stream import (
    BatchSchedule,
    SampleStream,
    TimestepSampling,
    TrainingSamples,
    collate,
    noise_generator,
    num_loader_workers,
    random_stream,
    sample_draws,
    timestep_probabilities,
    timestep_sampling,
)
from latent_egc.data.views import PixelViews
from latent_egc.models.noise_schedule import noise_schedule
from latent_egc.training.build import resolve


@pytest.mark.parametrize(("num_processes", "accumulation"), [(1, 1), (3, 1), (2, 4)])
def test_processes_and_micro_batches_partition_the_stream(num_processes, accumulation):
    def samples(first, last):
        """For every step the sorted samples of all processes."""
        schedules = [
            list(BatchSchedule(first, last, 5, accumulation, process, num_processes))
            for process in range(num_processes)
        ]
        assert all(len(schedule) == (last - first) * accumulation for schedule in schedules)
        per_step = []
        for step in range(last - first):
            micro = slice(step * accumulation, (step + 1) * accumulation)
            per_step.append(sorted(s for schedule in schedules for batch in schedule[micro] for s in batch))
        return per_step

    whole = samples(0, 6)
    assert list(chain(*whole)) == list(range(6 * 5 * accumulation * num_processes))
    for resumed_at in range(6):
        assert samples(0, resumed_at) + samples(resumed_at, 6) == whole


def test_global_batch_does_not_depend_on_how_it_is_shared():
    """Two processes, two accumulation steps and one large batch see the same samples in the same step."""
    shares = [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2)]
    steps = []
    for batch_size, accumulation, num_processes in shares:
        batches = [
            b for p in range(num_processes) for b in BatchSchedule(3, 4, batch_size, accumulation, p, num_processes)
        ]
        steps.append(sorted(chain(*batches)))
    assert all(step == list(range(24, 32)) for step in steps)


def test_each_epoch_is_another_permutation():
    stream = SampleStream(50, seed=3)
    epochs = [[stream.image_index(epoch * 50 + i) for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [SampleStream(50, seed=3).image_index(s) for s in (149, 7, 60)] == [
        epochs[2][49],
        epochs[0][7],
        epochs[1][10],
    ]
    assert [SampleStream(50, seed=4).image_index(s) for s in range(50)] != epochs[0]


def test_no_two_streams_or_noises_are_the_same():
    streams = [random_stream(*key).integers(2**62) for key in product((0, 1), range(9), (0, 1))]
    noises = [int(torch.randint(2**62, (), generator=noise_generator(*key))) for key in product(range(3), range(40))]
    for draws in (streams, noises):
        assert len(set(draws)) == len(draws)
    assert streams[-1] == random_stream(1, 8, 1).integers(2**62)


def test_draws_are_a_function_of_seed_and_sample():
    def draws(seed, sample):
        return sample_draws(seed, sample, (2, 4, 4), 1000, 0.5)

    first = draws(0, 5)
    draws(0, 6)
    assert all(torch.equal(value, first[key]) for key, value in draws(0, 5).items())
    for other in (draws(0, 6), draws(1, 5)):
        assert not torch.equal(other["noise"], first["noise"])
    assert not torch.equal(first["noise"], first["posterior_noise"])
    assert not torch.equal(first["posterior_noise"], first["clean_posterior_noise"])


def test_uniform_timesteps_are_those_of_every_run_so_far(tmp_path):
    draws = [sample_draws(3, number, (1, 1, 2), 1000, 0.1) for number in range(6)]
    assert [int(draw["timesteps"]) for draw in draws] == [750, 139, 770, 993, 207, 379]
    values = run_values(tmp_path)
    values["objective"]["timestep_log_normal"] = None
    assert timestep_sampling(resolve(parse_config(values))) is None
    config = write_folder(tmp_path / "images")
    samples = TrainingSamples(PixelViews(load_splits(config, 2).train, config, 3), 3, (1, 1, 2), 1000, 0.1)
    (item,) = samples.__getitems__([5])
    assert torch.equal(item["noise"], draws[5]["noise"])
    assert item["timesteps"] == 379
    assert not item.keys() & {"clean_erasing", "clean_mixing"}


def test_without_a_posterior_its_noise_is_not_drawn_and_the_rest_is_the_same_to_the_bit():
    drawn, expected = (sample_draws(3, 7, (2, 4, 4), 1000, 0.5, posterior) for posterior in (False, True))
    assert expected.keys() - drawn.keys() == {"posterior_noise", "clean_posterior_noise"}
    assert all(torch.equal(value, expected[key]) for key, value in drawn.items())


def test_automatic_workers(monkeypatch):
    """None where nothing is decoded; each process on a machine has its share of processors, less one of its own."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    photos = DataConfig("imagefolder", data_dir="photos")
    assert num_loader_workers(photos, reads_images=True) == 4
    assert num_loader_workers(photos, reads_images=False) == num_loader_workers(DataConfig(), reads_images=True) == 0
    assert num_loader_workers(DataConfig(num_workers=3), reads_images=False) == 3
    for processes, workers in (("2", 3), ("4", 1), ("8", 0), ("9", 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert num_loader_workers(photos, reads_images=True) == workers


def test_draws_are_standard_normal_uniform_and_uncorrelated():
    rows = [sample_draws(0, sample, (2, 4, 4), 1000, 0.1) for sample in range(4000)]
    for key in ("noise", "posterior_noise", "clean_posterior_noise"):
        values = torch.stack([row[key] for row in rows])
        assert values.dtype == torch.float32
        assert abs(values.mean()) < 0.01
        assert abs(values.var() - 1) < 0.02
        assert (values[:-1] * values[1:]).mean().abs() < 0.01
    timesteps = torch.stack([row["timesteps"] for row in rows])
    assert timesteps.dtype == torch.long
    assert 0 <= timesteps.min() < 10 < 990 < timesteps.max() < 1000
    counts = torch.bincount(timesteps // 100, minlength=10)
    assert ((counts - 400).abs() < 80).all()  # four standard deviations
    assert abs(torch.stack([row["label_dropped"] for row in rows]).float().mean() - 0.1) < 0.02
    assert {int(sample_draws(0, sample, (2, 4, 4), 3, 0.1)["timesteps"]) for sample in range(100)} == {0, 1, 2}


def test_workers_give_what_the_main_process_gives(tmp_path):
    config = DataConfig(**{**vars(write_folder(tmp_path / "images")), "horizontal_flip": True})
    views = PixelViews(load_splits(config, 2).train, config, seed=1)
    samples = TrainingSamples(views, 1, (2, 4, 4), 1000, 0.1)
    schedule = BatchSchedule(2, 6, 4)
    alone, shared = (list(DataLoader(samples, batch_sampler=schedule, num_workers=n)) for n in (0, 2))
    assert len(alone) == len(shared) == 4
    for batch, other in zip(alone, shared, strict=True):
        assert set(batch) == set(other)
        assert all(torch.equal(batch[key], other[key]) for key in batch)


@pytest.mark.parametrize(("fraction", "size", "count"), [(1.0, 1, 1), (0.5, 2, 1), (0.1, 10, 1), (0.3, 10, 3)])
def test_the_clean_branch_sees_as_many_samples_in_every_micro_batch(tmp_path, fraction, size, count):
    """Of any size that the fraction allows, the smallest too, whichever process takes it."""
    config = write_folder(tmp_path / "images")
    views = PixelViews(load_splits(config, 2).train, config, seed=1)
    samples = TrainingSamples(views, 1, (2, 4, 4), 1000, 0.1, fraction)
    items = samples.__getitems__(list(range(40)))
    seen = [torch.tensor("clean_view" in item) for item in items]
    assert {key for item in items for key in item if key.startswith("clean_")} == {
        "clean_view",
        "clean_labels",
        "clean_posterior_noise",
    }
    batch = collate(items[:size])
    assert (len(batch["view"]), len(batch["clean_view"]), len(batch["clean_labels"])) == (size, count, count)
    assert torch.stack(seen).view(-1, size).sum(dim=1).tolist() == [count] * (40 // size)


ALPHAS_CUMPROD = noise_schedule(1000, 1e-4, 0.02, "linear", torch.float64).numpy()


def test_log_normal_timesteps_are_distributed_as_said():
    sampling = TimestepSampling(timestep_probabilities(ALPHAS_CUMPROD, (-0.5, 1.2)), 3)
    uniform = [int(sample_draws(3, n, (1, 1, 1), 1000, 0.1)["timesteps"]) for n in range(4000)]
    timesteps = torch.stack([sampling.draw(n, t) for n, t in enumerate(uniform)])
    assert timesteps.dtype == torch.long
    levels = 0.5 * np.log((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD)[timesteps]
    assert levels.mean() == pytest.approx(-0.5, abs=0.06)
    assert levels.std() == pytest.approx(1.2, abs=0.05)
    found = np.bincount(timesteps, minlength=1000).cumsum() / 4000
    expected = timestep_probabilities(ALPHAS_CUMPROD, (-0.5, 1.2)).cumsum()
    assert abs(found - expected).max() < 0.026  # Kolmogorov-Smirnov, 1 %
