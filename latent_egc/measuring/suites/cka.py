"""Suite `cka`: how alike are the features of two blocks, or of one block at two timesteps?"""

from dataclasses import dataclass

import numpy as np

from latent_egc.config import ConfigError, within
from latent_egc.measuring import plots
from latent_egc.measuring.probe_context import Place, ProbeContext
from latent_egc.measuring.results import Figure, Metric, SuiteResult


@dataclass(frozen=True)
class Settings:
    """Linear centred kernel alignment."""

    num_images: int = within(500, 3)  # of the validation rows; memory is this squared times blocks, in float32
    pooling: int = within(2, 1)


def linear_cka(features: list[np.ndarray]) -> np.ndarray:
    """Linear centred kernel alignment of every pair.

    CKA(X, Y) = |X'Y|^2 / (|X'X| |Y'Y|) in Frobenius norms, for centred X and Y: the cosine of the angle between their
    Gram matrices, by which it is computed. 1 for features that are rotations and scalings of each other.

    Args:
        features: L arrays (N, ...), the rows belonging together.

    Returns:
        (L, L) in [0, 1]; NaN where features are constant.

    Source: Kornblith et al. (ICML 2019), arXiv 1905.00414.
    """
    grams = []
    for array in features:
        rows = array.reshape(len(array), -1)
        rows = rows - rows.mean(axis=0)
        gram = (rows @ rows.T).ravel()
        norm = np.linalg.norm(gram)
        grams.append(gram / norm if norm > 0 else np.full_like(gram, np.nan))
    stacked = np.stack(grams)
    return stacked @ stacked.T


def run(context: ProbeContext, settings: Settings) -> SuiteResult:
    """CKA among the blocks at the chosen timestep, and among the timesteps at the chosen block.

    Raises:
        ConfigError: too few images.
    """
    chosen = context.place
    count = min(settings.num_images, len(context.labels))
    if count < 3:
        raise ConfigError(f"cka needs at least three validation images, got {count}")
    blocks, timesteps, p = context.cache.blocks, context.settings.timesteps, settings.pooling

    def among(places: list[Place]) -> np.ndarray:
        return linear_cka([context.features("validation", place)[:count] for place in places])

    by_block = among([Place(block, chosen.timestep, p) for block in blocks])
    by_timestep = among([Place(chosen.block, t, p) for t in timesteps])
    steps = [str(t) for t in timesteps]
    block_map = plots.heat_map(by_block, blocks, blocks, ("block", "block", "linear CKA"), decimals=2)
    timestep_map = plots.heat_map(by_timestep, steps, steps, ("timestep", "timestep", "linear CKA"), decimals=2)
    return SuiteResult(
        num_samples=count,
        metrics={
            f"CKA of {blocks[0]} and {blocks[-1]} at timestep {chosen.timestep}": Metric(float(by_block[0, -1])),
            f"CKA of timesteps {steps[0]} and {steps[-1]} at {chosen.block}": Metric(float(by_timestep[0, -1])),
        },
        figures=[
            Figure("blocks", f"Linear CKA between blocks at timestep {chosen.timestep}.", block_map),
            Figure("timesteps", f"Linear CKA of {chosen.block} between timesteps.", timestep_map),
        ],
        notes=[
            f"Maps pooled to {p} x {p}, {count} validation images. With few images and many features the estimate is "
            "biased upwards; compare only values of one report."
        ],
    )
