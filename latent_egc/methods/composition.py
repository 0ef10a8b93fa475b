"""Composition: AND, OR and NOT of one network's classes, and of two networks.

With p = p(y | z, t), the classifier at the null label, S a set of classes, and a scale w on each:

    all of S      -w sigma_t sum over S of log p(y)
    any of S      -w sigma_t log sum over S of p(y)
    none of S     -w sigma_t log[ (1 - d) (1 - sum over S of p(y)) + d ]

are terms to be added to a potential of the same network, and share its forward pass. At w = 1 the second is exact: with
the energy it is -sigma_t times the log of the joint summed over S. The third is bounded, between 0 and w sigma_t
log(1 / d): its factor on the density is at most 1, so that what is composed stays a density, and at least d^w, so that
no latents are forbidden for good. (+w sigma_t log p(y), the negated guidance, is neither: it rewards without end
whatever the classifier is surest of not being y.)

Of two networks on one latent space, whose energies each have a constant of their own:

    U_1 + U_2                                                         both: the product of their densities at t
    -sigma_t log[ exp(-U_1 / sigma_t) + exp(v - U_2 / sigma_t) ]      either: their mixture; v sets the constants right

The product of noised densities is not the noised product, except at no noise: its score is not that of any diffusion,
and a sampler that only follows it ends elsewhere. What a corrector samples at each level is the product at that level,
down to the product of the clean densities. The same holds for `all of`, and for any w other than 1; mixtures commute
with noise, and `any of` and `none of` are mixtures at w = 1. Source: Du et al. (ICML 2023, arXiv 2302.11552).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import ModelMixin

from latent_egc.models.potentials import Lookup, Potential

NEGATION_FLOOR = 1e-4  # d


def all_classes(model: ModelMixin, class_ids: Sequence[int], scale: float) -> Potential:
    """-scale sigma_t times the sum of log p(y | z, t) over `class_ids`; free beside what reads the null label."""
    return _class_term(model, class_ids, scale, lambda chosen, others: chosen.sum(dim=1))


def any_class(model: ModelMixin, class_ids: Sequence[int], scale: float) -> Potential:
    """-scale sigma_t times the log of the sum of p(y | z, t) over `class_ids`; free as `all_classes` is."""
    return _class_term(model, class_ids, scale, lambda chosen, others: chosen.logsumexp(dim=1))


def no_class(model: ModelMixin, class_ids: Sequence[int], scale: float) -> Potential:
    """-scale sigma_t log[(1 - d) (1 - the sum of p(y | z, t) over `class_ids`) + d]; free as the others are.

    1 - p is summed from the other classes' probabilities, so that its gradient is right where p rounds to 1.
    """

    def log_factor(chosen: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        floor = others.new_tensor(math.log(NEGATION_FLOOR))
        return torch.logaddexp(math.log1p(-NEGATION_FLOOR) + others.logsumexp(dim=1), floor)

    return _class_term(model, class_ids, scale, log_factor)


def _class_term(
    model: ModelMixin,
    class_ids: Sequence[int],
    scale: float,
    log_factor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Potential:
    """-scale sigma_t log_factor, a function of log p(y | z, t) of the classes that are meant, (N, S), and others."""
    num_classes = model.config.num_classes or 0
    chosen = sorted(set(class_ids))
    others = [i for i in range(num_classes) if i not in chosen]
    if not chosen or not others or len(chosen) + len(others) != num_classes:
        raise ValueError(f"class_ids must be some, but not all, of 0 to {num_classes - 1}, got {list(class_ids)}")

    def value(read: Lookup, sigma: torch.Tensor) -> torch.Tensor:
        log_p = F.log_softmax(read(model, None).logits, dim=-1)
        return -scale * sigma * log_factor(log_p[:, chosen], log_p[:, others])

    return Potential([(model, None)], value)


def either_of(first: Potential, second: Potential, log_weight: float | Callable[[torch.Tensor], float]) -> Potential:
    """OR of two networks: -sigma_t log[exp(-U_1 / sigma_t) + exp(log_weight - U_2 / sigma_t)].

    One forward pass a network. (AND is first + second.)

    Args:
        first, second: potentials of networks with the same noise schedule and latent space.
        log_weight: v, which says how much of the second there is, and balances the constants of the two energies, that
            training does not fix; or a function from sigma_t (N,) to it, as those constants differ by noise level.
    """

    def value(read: Lookup, sigma: torch.Tensor) -> torch.Tensor:
        shift = log_weight(sigma) if callable(log_weight) else log_weight
        one, other = (-potential.value(read, sigma) / sigma for potential in (first, second))
        return -sigma * torch.logaddexp(one, other + shift)

    return Potential([*first.readings, *second.readings], value)
