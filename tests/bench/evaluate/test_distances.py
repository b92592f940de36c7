"""FID, KID and IS against NumPy in fp64, their edge cases, and the intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.evaluate import distances
from bench.evaluate.distances import frechet_distance, inception_score, interval, kernel_distance, moments
from bench.quality.metrics import Statistic, replicated, resamples

FEATURES = 6


def features(n: int, crops: int = 1, *, seed: int = 0, shift: float = 0.0) -> Tensor:
    drawn = torch.randn(n, crops, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn @ torch.linspace(0.5, 2, FEATURES, dtype=torch.float64).diag() + shift


def fid_by_numpy(a: np.ndarray, b: np.ndarray) -> float:
    """By eigenvalues of the product of the covariances, which is another way than the code's."""
    gap = ((a.mean(0) - b.mean(0)) ** 2).sum()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    return float(gap + np.trace(cov_a) + np.trace(cov_b) - 2 * roots)


def kid_by_numpy(a: np.ndarray, b: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def own(x: np.ndarray) -> float:
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return float(own(a) + own(b) - 2 * kernel(a, b).mean())


def of_draws(statistic: Statistic, draws: list[Tensor], n: int) -> distances.Interval:
    return interval(statistic(torch.arange(n)), replicated(statistic, draws))


def kid(a: Tensor, b: Tensor) -> float:
    return kernel_distance(a, b)(torch.arange(len(a)))


def flat(x: Tensor) -> np.ndarray:
    return x.flatten(0, 1).numpy()


@pytest.mark.parametrize(("n", "m", "crops"), [(50, 50, 1), (7, 40, 1), (20, 30, 3), (300, 9, 2)])
def test_fid_is_that_of_numpy(n: int, m: int, crops: int) -> None:
    a, b = features(n, crops), features(m, seed=1, shift=0.3)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(fid_by_numpy(flat(a), flat(b)), rel=1e-9)


def test_fid_of_fewer_pictures_than_features_is_exact_too_and_too_large() -> None:
    a, b, many = features(4), features(4, seed=1), features(4000, seed=2)
    root = {name: moments(x).root for name, x in (("a", a), ("b", b))}
    product = (root["a"].T @ root["a"]) @ (root["b"].T @ root["b"])
    overlap = np.sqrt(np.linalg.eigvals(product.numpy()).astype(complex)).real.sum()
    by_traces = np.cov(flat(a), rowvar=False).trace() + np.cov(flat(b), rowvar=False).trace() - 2 * overlap
    gap = float(((flat(a).mean(0) - flat(b).mean(0)) ** 2).sum())
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(gap + by_traces, rel=1e-6)
    assert frechet_distance(moments(a), moments(many)) > 10 * frechet_distance(moments(features(4000, seed=3)), moments(many))


def test_fid_of_one_set_with_itself_is_zero() -> None:
    for n in (5, 200):
        a = features(n)
        assert frechet_distance(moments(a), moments(a)) == pytest.approx(0, abs=1e-10)


def test_a_covariance_of_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 rows of features, got 1"):
        moments(features(1))


@pytest.mark.parametrize(("n", "m", "crops", "others"), [(30, 30, 1, 1), (2, 40, 1, 1), (20, 10, 3, 1), (9, 12, 2, 4), (300, 280, 1, 1)])
def test_kid_is_that_of_numpy(n: int, m: int, crops: int, others: int) -> None:
    a, b = features(n, crops), features(m, others, seed=1, shift=0.1)
    assert kid(a, b) == pytest.approx(kid_by_numpy(flat(a), flat(b)), rel=1e-9, abs=1e-12)


def test_weighted_kid_leaves_out_pairs_of_copies() -> None:
    """A picture drawn twice is two rows whose pair is not counted: the sums over all other pairs, in NumPy."""
    a, b = features(5), features(8, seed=1)
    drawn = [0, 0, 2, 3, 4]
    rows = flat(a)
    pairs = [(i, j) for p, i in enumerate(drawn) for q, j in enumerate(drawn) if p != q and i != j]
    kernel = (rows @ rows.T / FEATURES + 1) ** 3
    other = flat(b)
    own_b = ((other @ other.T / FEATURES + 1) ** 3 * (1 - np.eye(8))).sum() / (8 * 7)
    cross = ((rows[drawn] @ other.T / FEATURES + 1) ** 3).mean()
    expected = np.mean([kernel[i, j] for i, j in pairs]) + own_b - 2 * cross
    assert kernel_distance(a, b)(torch.tensor(drawn)) == pytest.approx(float(expected), rel=1e-9)


def test_kid_of_one_distribution_has_zero_in_its_interval_and_of_two_has_not() -> None:
    draws = resamples(200, 200)

    def of(shift: float) -> distances.Interval:
        return of_draws(kernel_distance(features(200), features(200, seed=1, shift=shift)), draws, 200)

    same, other = of(0.0), of(1.0)
    assert same.low < 0 < same.high
    assert other.low > 0
    assert other.low < other.value < other.high


def test_kid_of_one_set_with_itself_is_near_zero() -> None:
    """Below zero by the diagonal, which the cross term has and the others have not."""
    a = features(400)
    kernel = (flat(a) @ flat(a).T / FEATURES + 1) ** 3
    off = (kernel.sum() - np.trace(kernel)) / (400 * 399)
    assert kid(a, a) == pytest.approx(2 * (off - kernel.mean()), rel=1e-9)
    assert abs(kid(a, a)) < 0.1 * kid(a, features(400, seed=1, shift=1.0))


def test_kid_of_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 rows of features on each side, got 1 and 5"):
        kernel_distance(features(1), features(5))


@pytest.mark.parametrize(("n", "crops", "splits"), [(40, 1, 1), (43, 1, 10), (12, 4, 5)])
def test_is_is_that_of_numpy(n: int, crops: int, splits: int) -> None:
    logits = 3 * features(n, crops)
    p = np.exp(flat(logits)) / np.exp(flat(logits)).sum(1, keepdims=True)
    scores = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in np.array_split(p, splits)]
    assert inception_score(logits, splits=splits) == pytest.approx(float(np.mean(scores)), rel=1e-9)


def test_is_of_one_class_is_one_and_of_even_certain_classes_their_number() -> None:
    certain = 1e4 * torch.eye(FEATURES, dtype=torch.float64).repeat(3, 1)
    assert inception_score(certain, splits=1) == pytest.approx(FEATURES)
    assert inception_score(certain[:1].repeat(9, 1), splits=3) == pytest.approx(1)


def test_an_interval_stands_around_its_value_and_shrinks() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def mean_of(n: int) -> distances.Interval:
        return of_draws(lambda chosen: float(values[:n][chosen].mean()), resamples(n, 400), n)

    few, many = mean_of(25), mean_of(400)
    assert few.low < few.value < few.high
    assert many.high - many.low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.15)
    assert few.high - few.low > 2.5 * (many.high - many.low)


def test_without_a_bootstrap_there_is_no_interval() -> None:
    found = of_draws(lambda chosen: float(chosen.double().mean()), resamples(5, 0), 5)
    assert found.value == 2
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_all_three_are_those_of_torch_fidelity() -> None:
    fid, kid_of, isc = (pytest.importorskip(f"torch_fidelity.metric_{name}") for name in ("fid", "kid", "isc"))
    a, b = features(90), features(70, seed=1, shift=0.4)
    theirs = fid.fid_statistics_to_metric(*(fid.fid_features_to_statistics(x.flatten(0, 1)) for x in (a, b)), verbose=False)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
    whole = {"kid_subsets": 1, "kid_subset_size": 70, "verbose": False}
    theirs = kid_of.kid_features_to_metric(a[:70, 0], b[:, 0], **whole)
    assert kid(a[:70], b) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    theirs = isc.isc_features_to_metric(a[:, 0], splits=10, shuffle=False)
    assert inception_score(a, splits=10) == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
