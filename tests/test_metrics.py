"""Metrics against closed forms, and the packaged classifier on real digits."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.assets.digits import digits_data
from fewstep.metrics import (
    class_accuracy,
    digit_features,
    frechet_distance,
    frechet_distance_to_real,
    psnr,
    real_frechet_distance,
    reference_labels,
    relative_l2,
)


def exactly(mean: torch.Tensor, cov: torch.Tensor, n: int = 256) -> torch.Tensor:
    """n samples whose sample mean and covariance are exactly these."""
    x = torch.randn(n, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(cov).T + mean


def test_frechet_of_commuting_gaussians_is_analytic():
    a_var, b_var = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 9.0])
    a = exactly(torch.zeros(3).double(), torch.diag(a_var).double())
    b = exactly(torch.tensor([1.0, 2.0, 0.0]).double(), torch.diag(b_var).double())
    want = 5.0 + ((a_var.sqrt() - b_var.sqrt()) ** 2).sum().item()
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-9)


def test_frechet_of_rotated_gaussians_matches_scipy():
    import scipy.linalg

    torch.manual_seed(0)
    a, b = torch.randn(300, 5).double(), torch.randn(200, 5).double() @ torch.randn(5, 5).double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = scipy.linalg.sqrtm((cov_a @ cov_b).numpy()).real
    want = (a.mean(0) - b.mean(0)).square().sum() + (cov_a + cov_b).trace() - 2 * root.trace()
    assert frechet_distance(a, b) == pytest.approx(want.item(), rel=1e-8)


def test_frechet_of_itself_is_zero_and_symmetric():
    torch.manual_seed(0)
    a, b = torch.randn(100, 8).double(), 2 * torch.randn(100, 8).double()
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_errors():
    good = torch.randn(50, 8)
    with pytest.raises(ValueError, match="features_a: expected more than 8 samples"):
        frechet_distance(good[:8], good)
    with pytest.raises(ValueError, match="features_b: expected width 8"):
        frechet_distance(good, good[:, :4])
    with pytest.raises(ValueError, match=r"features_a: expected shape \[n, D\]"):
        frechet_distance(good[0], good)
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(good.where(good < 2, torch.nan), torch.full((50, 8), torch.nan))


def test_the_classifier_knows_held_out_digits():
    images, labels = digits_data("held_out")
    assert class_accuracy(images, labels) > 0.98
    assert class_accuracy(images, (labels + 1) % 10) < 0.02


def test_the_perfect_score_is_small_and_damage_raises_it():
    torch.manual_seed(0)
    images, _ = digits_data("train")
    perfect = real_frechet_distance()
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    assert frechet_distance_to_real(digits_data("held_out")[0]) == pytest.approx(0, abs=1e-6)
    assert 0 < perfect < frechet_distance_to_real(images + 0.3 * torch.randn_like(images))
    assert frechet_distance_to_real(blurred) > 2 * perfect
    assert len(reference_labels()) == len(digits_data("held_out")[0])


def test_psnr_and_relative_l2():
    a = torch.zeros(10)
    b = torch.full((10,), 0.5)
    assert psnr(a, b, data_range=2.0) == pytest.approx(10 * math.log10(4 / 0.25))
    assert psnr(a, a, data_range=1.0) == math.inf
    assert relative_l2(a, b) == pytest.approx(1.0)
    assert relative_l2(b, b) == 0


def test_metric_errors():
    images = torch.zeros(3, 1, 16, 16)
    with pytest.raises(ValueError, match=r"images: expected shape \[n, 1, 16, 16\]"):
        digit_features(images[:, 0])
    with pytest.raises(TypeError, match="images: expected a floating tensor"):
        digit_features(images.long())
    with pytest.raises(ValueError, match=r"labels: expected shape \(3,\)"):
        class_accuracy(images, torch.zeros(2))
    with pytest.raises(ValueError, match="b: expected shape"):
        psnr(images, images[:1], data_range=1.0)
    with pytest.raises(ValueError, match="data_range"):
        psnr(images, images, data_range=0.0)
    with pytest.raises(ValueError, match="not all zero"):
        relative_l2(images + 1, images)
