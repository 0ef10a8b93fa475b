"""Classification heads on frozen features: the linear probe, and networks with the one loop that trains them."""

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import nn
from tqdm.auto import tqdm

from latent_egc.config import ConfigError, within

NUM_HEADS = 4  # of every attention here


@dataclass(frozen=True)
class LinearSettings:
    """The linear probe: logistic regression by L-BFGS on standardised features."""

    c: tuple[float, ...] = within((1e-3, 1e-2, 1e-1), 1e-12)  # inverse strengths of the L2 penalty to choose from
    held_out: float = within(0.2, 0.01, 0.9)  # share of the training rows that chooses c, and the best cell
    max_iter: int = within(100, 1)


@dataclass(frozen=True)
class ProbeScore:
    """What a linear probe reached."""

    held_out: float  # accuracy on the held-out training rows, with which everything is chosen
    accuracy: float  # on the validation rows, after refitting on all training rows
    c: float  # the chosen inverse strength of the penalty


def standardised(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Every array (N, ...) less the mean of `train` and divided by its deviation; constant features become 0."""
    mean, scale = _mean_and_scale(train)
    return [(array - mean) * scale for array in (train, *others)]


def _mean_and_scale(train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The features' mean, and what they are multiplied by."""
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    return mean, np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 1e-6)


def fit_logistic(features: np.ndarray, labels: np.ndarray, c: float, max_iter: int) -> LogisticRegression:
    """Multinomial logistic regression by L-BFGS: sum of the rows' losses + |W|^2 / 2c.

    Features (N, ...) are standardised, labels (N,) of at least two classes; a fit that has not converged after
    `max_iter` iterations is used as it is.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=max_iter).fit(features.reshape(len(features), -1), labels)


def held_out_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and rows to choose with, drawn by the seed.

    Raises:
        ConfigError: too few rows, or of fewer than two classes.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    count = round(share * len(labels))
    choosing, fitting = order[:count], order[count:]
    if count == 0 or len(np.unique(labels[fitting])) < 2:
        raise ConfigError(
            f"linear.held_out={share:g} of {len(labels)} training rows leaves {len(fitting)} of "
            f"{len(np.unique(labels[fitting]))} classes to fit on and {count} to choose with"
        )
    return fitting, choosing


def linear_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    config: LinearSettings,
    seed: int,
) -> tuple[ProbeScore, np.ndarray]:
    """Chooses c on held-out training rows, refits on all of them, and judges the validation rows.

    Args:
        train, test: (N, ...) and (M, ...), any features.
        train_labels, test_labels: (N,) and (M,).
        config, seed: of the probe, and of the held-out rows.

    Returns:
        The score, and the predicted labels (M,) of `test`.
    """
    fitting, choosing = held_out_split(train_labels, config.held_out, seed)
    train, test = (rows.reshape(len(rows), -1) for rows in standardised(train, test))
    held_out = {}
    for c in config.c:
        model = fit_logistic(train[fitting], train_labels[fitting], c, config.max_iter)
        held_out[c] = float(model.score(train[choosing], train_labels[choosing]))
    c = max(held_out, key=lambda c: (held_out[c], -c))  # of equals the strongest penalty
    predicted = fit_logistic(train, train_labels, c, config.max_iter).predict(test)
    return ProbeScore(held_out[c], float((predicted == test_labels).mean()), c), predicted


def linear_layer(
    features: np.ndarray, labels: np.ndarray, c: float, max_iter: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear probe as a layer on features that are not standardised.

    Args:
        features: (N, ...), D each.
        labels: (N,), of all classes.
        c, max_iter: as for `fit_logistic`.

    Returns:
        Weight (K, D) and bias (K,), float32.
    """
    features = features.reshape(len(features), -1).astype(np.float64)
    mean, scale = _mean_and_scale(features)
    model = fit_logistic((features - mean) * scale, labels, c, max_iter)
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:  # of two classes the second's log odds
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    weight = weight * scale
    return torch.from_numpy(weight).float(), torch.from_numpy(bias - weight @ mean).float()


@dataclass(frozen=True)
class HeadsSettings:
    """The heads other than the linear probe, at the chosen block, timestep and pooling."""

    epochs: int = within(20, 1)
    train_batch_size: int = within(64, 1)
    sgd_learning_rate: float = within(0.003, 1e-9)  # of the linear head, SGD with momentum 0.9
    learning_rates: tuple[float, ...] = within((1e-3,), 1e-9)  # of the others, AdamW; all fall to 0 on a cosine
    weight_decays: tuple[float, ...] = within((0.05,), 0.0)  # AdamW's; of several, held-out rows choose for each head
    width: int = within(256, 4)  # of the hidden layers and of the tokens, divisible by 4
    neighbours: int = within(20, 1)


def linear_head(channels: int, pooling: int, num_classes: int) -> nn.Module:
    """Logits of the flattened map (N, D, p, p)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * pooling**2, num_classes))


def mlp_head(channels: int, pooling: int, num_classes: int, width: int) -> nn.Module:
    """One hidden layer over the flattened map."""
    inner = nn.Linear(channels * pooling**2, width)
    return nn.Sequential(nn.Flatten(), inner, nn.ReLU(), nn.Linear(width, num_classes))


def cnn_head(channels: int, num_classes: int, width: int) -> nn.Module:
    """Two 3x3 convolutions, the mean over positions, a linear layer."""
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )


class FusionHead(nn.Module):
    """Attention over several feature maps: DifFormer; over one map it is the attention head.

    Each map becomes p * p tokens by a 1x1 convolution of its own, with a learned embedding for each position. A class
    token and one transformer block attend to the maps of one timestep; what the class token gathered is joined over the
    timesteps, which share these weights, and classified.

    Args:
        shapes: (D, p) of the maps of one timestep.
        num_timesteps: how many timesteps' maps follow one another in the input.
        num_classes: K.
        width: of the tokens, divisible by 4.

    Source: Mukhopadhyay et al., arXiv 2311.17921, and the attention head of arXiv 2307.08702.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], num_timesteps: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(channels, width, kernel_size=1) for channels, _ in shapes)
        self.positions = nn.Parameter(0.02 * torch.randn(sum(p * p for _, p in shapes), width))
        self.class_token = nn.Parameter(0.02 * torch.randn(width))
        self.attention = nn.TransformerEncoderLayer(
            width, NUM_HEADS, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.num_timesteps = num_timesteps
        self.out = nn.Linear(num_timesteps * width, num_classes)

    def forward(self, *maps: torch.Tensor) -> torch.Tensor:
        """Maps (N, D, p, p), all blocks of one timestep before those of the next -> logits (N, K)."""
        gathered, count = [], len(self.projections)
        for first in range(0, len(maps), count):
            pairs = zip(self.projections, maps[first : first + count], strict=True)
            tokens = torch.cat([project(m).flatten(2).transpose(1, 2) for project, m in pairs], dim=1)
            class_token = self.class_token.expand(len(tokens), 1, -1)
            tokens = self.attention(torch.cat([class_token, tokens + self.positions], dim=1))
            gathered.append(tokens[:, 0])
        return self.out(torch.cat(gathered, dim=1))


def train_head(
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Sequence[torch.Tensor],
    labels: torch.Tensor,
    epochs: int,
    batch_size: int,
    seed: int,
) -> None:
    """Minimises the cross entropy, on the head's device; the learning rate falls to 0 on a cosine.

    Args:
        head: takes the `inputs`' batches, returns logits (N, K).
        optimizer: of its parameters.
        inputs: (N, ...) each, row i of all of them belonging together.
        labels: (N,) int64.
        epochs, batch_size: how often and how many rows.
        seed: of the order.
    """
    device = next(head.parameters()).device
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(labels) // batch_size))
    generator = torch.Generator().manual_seed(seed)
    head.train()
    for _ in tqdm(range(epochs), desc="train head", leave=False):
        for rows in torch.randperm(len(labels), generator=generator).split(batch_size):
            loss = F.cross_entropy(head(*(x[rows].to(device) for x in inputs)), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def fit_head(
    build: Callable[[], nn.Module],
    inputs: Sequence[torch.Tensor],
    labels: torch.Tensor,
    settings: HeadsSettings,
    held_out: float,
    seed: int,
    epochs: int | None = None,
) -> tuple[nn.Module, str]:
    """A head trained by AdamW; held-out rows choose learning rate and weight decay where there are several.

    Args:
        build: makes the head, on its device; its random numbers are those of the seed.
        inputs, labels: as for `train_head`, of all training rows.
        settings: of the heads.
        held_out: share of the rows that chooses; the chosen one is trained anew on all rows.
        seed: of the held-out rows, the head's initialisation and the order.
        epochs: None: those of the settings.

    Returns:
        The head, and what was chosen, for a reader.

    Raises:
        ConfigError: there is a choice, and too few rows for it.
    """

    def trained(rows: torch.Tensor, learning_rate: float, weight_decay: float) -> nn.Module:
        torch.manual_seed(seed)
        head = build()
        optimizer = torch.optim.AdamW(head.parameters(), learning_rate, weight_decay=weight_decay)
        parts = [x[rows] for x in inputs], labels[rows]
        train_head(head, optimizer, *parts, epochs or settings.epochs, settings.train_batch_size, seed)
        return head

    candidates = list(itertools.product(settings.learning_rates, settings.weight_decays))
    scores: dict[tuple[float, float], float] = {}
    if len(candidates) > 1:
        fitting, choosing = (torch.from_numpy(rows) for rows in held_out_split(labels.numpy(), held_out, seed))
        for candidate in candidates:
            head = trained(fitting, *candidate)
            predicted = predict(head, [x[choosing] for x in inputs], settings.train_batch_size)
            scores[candidate] = (predicted == labels[choosing]).double().mean().item()
    learning_rate, weight_decay = max(scores, key=lambda candidate: scores[candidate]) if scores else candidates[0]
    chosen = f"learning rate {learning_rate:g}, weight decay {weight_decay:g}"
    if scores:
        chosen += f", of {len(scores)} by {scores[learning_rate, weight_decay]:.1%} of the held-out rows"
    return trained(torch.arange(len(labels)), learning_rate, weight_decay), chosen


@torch.no_grad()
def predict(head: nn.Module, inputs: Sequence[torch.Tensor], batch_size: int) -> torch.Tensor:
    """(N,) int64, the most probable class of each row."""
    head.eval()
    device = next(head.parameters()).device
    batches = zip(*(x.split(batch_size) for x in inputs), strict=True)
    return torch.cat([head(*(x.to(device) for x in batch)).argmax(dim=1).cpu() for batch in batches])
