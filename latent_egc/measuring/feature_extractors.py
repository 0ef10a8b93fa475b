"""Image features and what is computed on them: Frechet distance, KID, precision and recall.

An extractor is a TorchScript file (images (N, 3, H, W) in [0, 1] to (N, D)), a DINOv2 of transformers by its Hub id or
folder, or `inception`: the published FID's Inception-v3. A number on other features than these is no FID, so the
extractor's name stands in the metric's.

A TorchScript file is a program: run, it can write files. A transformers model is weights, read without running code.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors
from torchmetrics.image.fid import NoTrainInceptionV3
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd
from transformers import AutoModel

from latent_egc.config import ConfigError
from latent_egc.measuring.meaning import file_digest

INCEPTION = "Inception-v3"
# FD-DINOv2 as published (Stein et al., NeurIPS 2023): the class token behind the last norm; images of any size resized
# to 224 px, aspect and all, by the antialiased bicubic kernel, with ImageNet's mean and deviation.
DINO_MEAN, DINO_STD, DINO_SIZE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224
POINTS_AT_ONCE = 2000
TORCHSCRIPT_SUFFIXES = (".pt", ".pth", ".ts", ".torchscript", ".jit")


@dataclass(frozen=True)
class Extractor:
    """A named function: images (N, 3, H, W) in [0, 1] -> features (N, D)."""

    name: str  # as it stands in the metrics' names
    function: Callable[[torch.Tensor], torch.Tensor]
    digest: str = ""  # of its weights and of what it does to images before; another value means other features
    to_logits: Callable[[torch.Tensor], torch.Tensor] | None = None  # features -> (N, K), of a classifier's trunk

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(N, D) float32. Raises ConfigError: the extractor returns anything else."""
        features = self.function(images)
        if not torch.is_tensor(features) or features.ndim != 2 or len(features) != len(images):
            found = tuple(features.shape) if torch.is_tensor(features) else type(features).__name__
            raise ConfigError(f"extractor {self.name} must return ({len(images)}, D) features, got {found}")
        return features.float()


def load_torchscript(path: str, key: str, device: torch.device) -> torch.jit.ScriptModule:
    """A TorchScript module. Raises ConfigError: no such file, or no TorchScript; it names `key` and how to make one."""
    how = "a TorchScript module for images (N, 3, H, W) in [0, 1] is wanted, as torch.jit.save writes it"
    if not Path(path).is_file():
        raise ConfigError(f"{key}: no such weights file: {path}; {how}")
    try:
        return torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise ConfigError(f"{key}: {path} cannot be loaded; {how} ({str(error).strip().splitlines()[0]})") from error


def load_extractor(source: str, device: torch.device, key: str = "generation.features") -> Extractor:
    """The extractor of a TorchScript file, of a DINOv2's Hub id or folder, or `inception`.

    Raises:
        ConfigError: it cannot be loaded; it names `key`.
    """
    if source == "inception":
        return _load_inception(key, device)
    if source.endswith(TORCHSCRIPT_SUFFIXES):
        program = load_torchscript(source, key, device)
        return Extractor(Path(source).stem.removesuffix("_features"), program, file_digest(Path(source)))
    try:
        network = AutoModel.from_pretrained(source).float().eval().to(device)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}: {source!r} is neither a TorchScript file ({', '.join(TORCHSCRIPT_SUFFIXES)}) nor a DINOv2 that "
            f"transformers can load, such as facebook/dinov2-base or a folder with its weights: {error}"
        ) from error
    if network.config.model_type != "dinov2":
        raise ConfigError(f"{key}: {source!r} is a {network.config.model_type}; only dinov2 is supported")
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (DINO_MEAN, DINO_STD))

    def class_token(images: torch.Tensor) -> torch.Tensor:
        images = F.interpolate(images, (DINO_SIZE, DINO_SIZE), mode="bicubic", antialias=True).clamp(0, 1)
        return network(pixel_values=(images - mean) / std).last_hidden_state[:, 0]

    return Extractor(Path(source).name, class_token, f"{_digest(network)}, bicubic to {DINO_SIZE} px")


def _digest(network: torch.nn.Module) -> str:
    """Of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load_inception(key: str, device: torch.device) -> Extractor:
    """Inception-v3 with the weights, the 8-bit input and the resizing of the published FID (torch-fidelity's port)."""
    try:
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], antialias=False).to(device)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{key}: inception needs torch-fidelity, which needs torchvision: {error}") from error
    except (URLError, OSError) as error:
        raise ConfigError(
            f"{key}: the weights of inception could not be fetched ({error}); torch-fidelity looks for "
            f"weights-inception-2015-12-05-6726825d.pth of its release v0.2.0 in {torch.hub.get_dir()}/checkpoints"
        ) from error
    return Extractor(
        INCEPTION,
        lambda images: network((images * 255).round().to(torch.uint8)),
        f"{_digest(network)}, bilinear to 299 px as TensorFlow 1",
        to_logits=lambda features: features @ network.fc.weight.T.to(features),
    )


def inception_score(logits: torch.Tensor, seed: int, num_splits: int = 10) -> tuple[float, float]:
    """exp of the mean divergence KL(p(y|x) || p(y)): mean and standard deviation over `num_splits` parts of the images.

    Args:
        logits: (N, K) of the generated images.
        seed: of the assignment of images to parts.
        num_splits: as published; each part should have many more images than there are classes.

    Source: Salimans et al. (NeurIPS 2016), computed by torchmetrics.
    """
    score = InceptionScore(feature=torch.nn.Identity(), splits=num_splits)
    score.update(logits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = score.compute()
    return float(mean), float(deviation)


Moments = tuple[np.ndarray, np.ndarray]  # mean (D,) and covariance (D, D), float64


def moments(features: np.ndarray) -> Moments:
    """Of features (N, D)."""
    features = features.astype(np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of features, by their moments.

    The trace of the root is computed on the symmetric C1^(1/2) C2 C1^(1/2), which has the eigenvalues of C1 C2 and none
    below zero. Source: Heusel et al. (NeurIPS 2017).
    """
    difference, covariances = first[0] - second[0], (first[1], second[1])
    values, vectors = scipy.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(scipy.linalg.eigvalsh(root @ covariances[1] @ root).clip(min=0)).sum()
    return float(difference @ difference + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * cross)


def kernel_distance(
    first: np.ndarray, second: np.ndarray, num_subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
    """KID: the unbiased squared MMD with the cubic kernel, mean and standard deviation over random subsets.

    Source: Binkowski et al. (ICLR 2018); the kernel is torchmetrics'.
    """
    rng = np.random.default_rng(seed)
    size = min(subset_size, len(first), len(second))
    sets = [torch.from_numpy(rows).double() for rows in (first, second)]
    values = [
        float(poly_mmd(*(rows[rng.choice(len(rows), size, replace=False)] for rows in sets)))
        for _ in range(num_subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def precision_and_recall(real: np.ndarray, generated: np.ndarray, num_neighbours: int = 3) -> tuple[float, float]:
    """Shares of generated features within the real manifold and of real ones within the generated manifold.

    A set's manifold is the union of the balls around its points that reach their `num_neighbours`-th neighbour. Source:
    Kynkaanniemi et al. (NeurIPS 2019).
    """

    def covered(points: np.ndarray, support: np.ndarray) -> float:
        # The nearest neighbour of a support point is itself.
        radii = NearestNeighbors(n_neighbors=num_neighbours + 1).fit(support).kneighbors(support)[0][:, -1]
        radii, support = torch.from_numpy(radii), torch.from_numpy(support).double()
        inside = [
            (torch.cdist(part.double(), support) <= radii).any(dim=1)
            for part in torch.from_numpy(points).split(POINTS_AT_ONCE)  # all distances may be more than memory holds
        ]
        return float(torch.cat(inside).double().mean())

    return covered(generated, real), covered(real, generated)
