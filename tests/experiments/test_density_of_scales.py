"""The experiment in little: the time score finds what the score alone leaves open."""

import runpy

import torch
from tiny import ROOT

SCRIPT = runpy.run_path(str(ROOT / "experiments" / "density_of_scales.py"))


def test_the_relative_mass_of_two_shells_is_found_by_the_time_score_alone():
    narrow, wide, _ = SCRIPT["errors"](SCRIPT["train"](0.0, 150))
    narrow_matched, wide_matched, deviation = SCRIPT["errors"](SCRIPT["train"](0.1, 150))
    assert abs(narrow - wide) > 10, "the score alone should not know"
    assert max(abs(narrow_matched), abs(wide_matched), deviation) < 4


def test_the_truth_is_a_density():
    """At the largest noise level nearly the standard normal one; at none, the mixture's of its own samples."""
    generator = torch.Generator().manual_seed(0)
    latents, _ = SCRIPT["samples"](1000, generator)
    narrow = torch.distributions.Normal(0.0, 0.4).log_prob(latents.double()).sum(dim=(1, 2, 3))
    wide = torch.distributions.Normal(0.0, 1.6).log_prob(latents.double()).sum(dim=(1, 2, 3))
    expected = torch.log(0.8 * narrow.exp() + 0.2 * wide.exp())
    torch.testing.assert_close(SCRIPT["true_log_density"](latents, torch.tensor(1.0), torch.tensor(0.0)), expected)
