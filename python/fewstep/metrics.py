"""How good digit images are: Frechet distance and class accuracy, and how near two tensors are.

    frechet(a, b) = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)
    psnr(a, b)    = 10 log10(range^2 / mean (a - b)^2)
    relative_l2   = |a - b| / |b|

mu, S: mean and covariance (divisor n - 1) of features [n, D]; images [n, 1, 16, 16] in [-1, 1].

Features are the penultimate activations (D = 32) of a small CNN that the project trains on the
training half of scikit-learn's digits. The reference is the held-out half, which trains nothing.
The perfect score is therefore not 0 but what the real training half scores against it
(`real_frechet_distance`): a generator that copied its training set would score exactly that.

A Frechet distance from n samples is biased upwards by about D/n times a variance, so compare only
equal sample counts: about 900 images with the labels of `reference_labels()`, several seeds.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

CLASSIFIER_PATH = Path(__file__).parent / "assets" / "digits" / "classifier.safetensors"
FEATURES = 32
_IMAGE_SHAPE = (1, 16, 16)


class DigitClassifier(nn.Module):
    """[n, 1, 16, 16] in [-1, 1] -> logits [n, 10]; `features` gives the 32 numbers before them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(48 * 4 * 4, FEATURES),
            nn.SiLU(),
        )
        self.head = nn.Linear(FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """[n, 1, 16, 16] -> [n, 32]."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """[n, 1, 16, 16] -> [n, 10] logits."""
        return self.head(self.features(images))


def _check_images(images: Tensor) -> None:
    if not torch.is_tensor(images) or not images.is_floating_point():
        raise TypeError(
            f"images: expected a floating tensor, got {getattr(images, 'dtype', type(images))}"
        )
    if images.ndim != 4 or tuple(images.shape[1:]) != _IMAGE_SHAPE:
        raise ValueError(f"images: expected shape [n, 1, 16, 16], got {tuple(images.shape)}")


@lru_cache(maxsize=2)
def load_classifier(path: Path | str = CLASSIFIER_PATH) -> DigitClassifier:
    """The packaged classifier in fp32 and eval mode, on the CPU."""
    from safetensors.torch import load_file

    model = DigitClassifier()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def digit_features(images: Tensor, classifier: DigitClassifier | None = None) -> Tensor:
    """Features [n, 32], fp64 on the CPU, of images [n, 1, 16, 16] in [-1, 1]."""
    _check_images(images)
    classifier = classifier or load_classifier()
    return classifier.features(images.detach().cpu().float().clamp(-1, 1)).double()


def _moments(features: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if features.ndim != 2:
        raise ValueError(f"{name}: expected shape [n, D], got {tuple(features.shape)}")
    n, width = features.shape
    if n <= width:
        raise ValueError(
            f"{name}: expected more than {width} samples for a {width}-D covariance, got {n}"
        )
    if not torch.isfinite(features).all():
        raise ValueError(f"{name}: expected finite features, got NaN or infinity")
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(width, width)


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Exact Frechet distance of the two Gaussians fitted to features [n, D] and [m, D], in fp64."""
    mean_a, cov_a = _moments(features_a, "features_a")
    mean_b, cov_b = _moments(features_b, "features_b")
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"features_b: expected width {len(mean_a)} as in features_a, got {len(mean_b)}"
        )
    # Both square roots are of symmetric positive matrices: eigh is exact and never complex.
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


def reference_labels() -> Tensor:
    """Labels of the held-out half, [898]: what to sample for a fair Frechet distance."""
    from fewstep.assets.digits import digits_data

    return digits_data("held_out")[1]


def frechet_distance_to_real(images: Tensor, classifier: DigitClassifier | None = None) -> float:
    """Frechet distance of images [n, 1, 16, 16] to the real held-out half (module header)."""
    from fewstep.assets.digits import digits_data

    real, _ = digits_data("held_out")
    return frechet_distance(digit_features(images, classifier), digit_features(real, classifier))


def real_frechet_distance(classifier: DigitClassifier | None = None) -> float:
    """The perfect score: the real training half against the real held-out half."""
    from fewstep.assets.digits import digits_data

    return frechet_distance_to_real(digits_data("train")[0], classifier)


@torch.no_grad()
def class_accuracy(
    images: Tensor, labels: Tensor, classifier: DigitClassifier | None = None
) -> float:
    """Share of images [n, 1, 16, 16] that the classifier gives their label [n]."""
    _check_images(images)
    labels = torch.as_tensor(labels)
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected shape ({len(images)},), got {tuple(labels.shape)}")
    classifier = classifier or load_classifier()
    predicted = classifier(images.detach().cpu().float().clamp(-1, 1)).argmax(1)
    return (predicted == labels.cpu()).double().mean().item()


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"b: expected shape {tuple(a.shape)} as a, got {tuple(b.shape)}")
    if not a.numel():
        raise ValueError("a: expected at least one element, got none")


def psnr(a: Tensor, b: Tensor, data_range: float) -> float:
    """Peak signal-to-noise ratio in dB, computed in fp64; infinite where a equals b."""
    _check_pair(a, b)
    if data_range <= 0:
        raise ValueError(f"data_range: expected a positive number, got {data_range}")
    error = (a.double() - b.double()).square().mean()
    return (10 * torch.log10(data_range**2 / error)).item()


def relative_l2(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in fp64; b is the reference and must not be all zero."""
    _check_pair(a, b)
    scale = b.double().norm()
    if scale == 0:
        raise ValueError("b: expected a reference that is not all zero, got only zeros")
    return ((a.double() - b.double()).norm() / scale).item()
