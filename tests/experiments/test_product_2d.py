"""AND of two networks in the plane: the corrected sampler ends near the true product, the steps alone do not."""

import runpy

import pytest
import torch
from tiny import ROOT


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "experiments" / "product_2d.py"))


def test_the_product_is_the_product(script):
    first, second = script["two_mixtures"]()
    truth = script["product"](first, second)
    points = torch.randn(20, 2, dtype=torch.float64)
    difference = truth.log_density(points) - first.log_density(points) - second.log_density(points)
    torch.testing.assert_close(difference, difference.mean().expand(20))
    axis = torch.linspace(-6, 6, 400, dtype=torch.float64)
    total = truth.log_density(torch.cartesian_prod(axis, axis)).exp().sum() * (axis[1] - axis[0]) ** 2
    assert float(total) == pytest.approx(1, abs=1e-3)


def test_corrected_is_closer_than_the_steps_alone(script):
    found = script["compare"](300, 30)
    exact, likelihood, alone = (found[name][1] for name in ("exact", "corrected", "DDIM"))
    assert abs(likelihood - exact) < 0.5 < abs(alone - exact)
    floor, distance, alone, noisy = (found[name][2] for name in ("exact", "corrected", "DDIM", "DDIM, eta 1"))
    assert distance < floor + 0.25
    assert distance < noisy < alone
