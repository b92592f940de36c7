"""FID, KID and Inception score from features, and bootstrap intervals over pictures. All in fp64.

Features are `[N, C, D]`: C crops of each of N pictures, C = 1 for whole pictures. A bootstrap draws pictures, with all their crops.

Legend: N pictures of one set, M of the reference, C crops, D features, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bench.quality.metrics import Statistic

_ROWS = 256  # of a kernel matrix at a time


class Moments(NamedTuple):
    """Mean `[D]` and root `[R, D]` of a covariance: `root.T @ root`."""

    mean: Tensor
    root: Tensor


def moments(features: Tensor) -> Moments:
    """Mean and root of the unbiased covariance of `[..., D]`; ValueError for fewer than two rows."""
    rows = features.reshape(-1, features.shape[-1]).double()
    if len(rows) < 2:
        raise ValueError(f"a covariance needs at least 2 rows of features, got {len(rows)}")
    mean = rows.mean(0)
    root = (rows - mean) / (len(rows) - 1) ** 0.5
    if len(root) > root.shape[1]:
        root = torch.linalg.qr(root, mode="r").R  # the same product, in no more rows than features
    return Moments(mean, root)


def frechet_distance(a: Moments, b: Moments) -> float:
    """`|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`, the FID of Inception's features.

    With S = R^T R, the trace of the square root is the sum of the singular values of `R_a R_b^T`: no square root of a matrix that may be
    singular. Below D + 1 pictures the value exists all the same, and is far too large.

    Heusel et al., arXiv:1706.08500, equation 6.
    """
    overlap = torch.linalg.svdvals(a.root @ b.root.T).sum()
    spread = a.root.square().sum() + b.root.square().sum() - 2 * overlap
    return float((a.mean - b.mean).square().sum() + spread)


def frechet_statistic(a: Tensor, b: Tensor) -> Statistic:
    """`frechet_distance` of the features of two sets, as a function of numbers of pictures of the first."""
    target = moments(b)
    return lambda chosen: frechet_distance(moments(a[chosen]), target)


def kernel_distance(a: Tensor, b: Tensor) -> Statistic:
    """Unbiased squared maximum mean discrepancy with the kernel `(x.y / D + 1)^3`, the KID of Inception's features.

    Of the features `[N, C, D]` of a set and `[M, B, D]` of its reference, as a function of numbers of pictures of the set. Two copies of
    one crop are no pair. ValueError where a side has fewer than two rows.

    Binkowski et al., arXiv:1801.01401, section 4.
    """
    n, crops = a.shape[:2]
    rows_a, rows_b = a.flatten(0, 1).double(), b.flatten(0, 1).double()
    if min(len(rows_a), len(rows_b)) < 2:
        raise ValueError(f"KID needs at least 2 rows of features on each side, got {len(rows_a)} and {len(rows_b)}")
    by_row = torch.cat([_kernel(part, rows_a).unflatten(1, (n, crops)).sum(2) for part in rows_a.split(_ROWS)])
    between = by_row.unflatten(0, (n, crops)).sum(1)  # [N, N] over the crops of two pictures
    between -= _self_kernel(rows_a).view(n, crops).sum(1).diag()  # on the diagonal over pairs of different crops
    pairs = torch.full_like(between, crops**2) - crops * torch.eye(n).to(between)
    cross = torch.cat([_kernel(part, rows_b).mean(1) for part in rows_a.split(_ROWS)]).view(n, crops).mean(1)
    total = sum(float(_kernel(part, rows_b).sum()) for part in rows_b.split(_ROWS)) - float(_self_kernel(rows_b).sum())
    of_reference = total / (len(rows_b) * (len(rows_b) - 1))

    def distance(chosen: Tensor) -> float:
        times = chosen.bincount(minlength=n).to(between)
        weights = times[:, None] * times - (times.square() - times).diag()  # of a picture with itself: how often it was drawn
        return float((weights * between).sum() / (weights * pairs).sum() + of_reference - 2 * (times @ cross) / times.sum())

    return distance


def inception_score(logits: Tensor, *, splits: int) -> float:
    """`exp(mean KL(p(y | x), p(y)))` of `[N, K]` or `[N, C, K]` logits: the mean over `splits` consecutive parts, at most as many as rows.

    Salimans et al., arXiv:1606.03498, section 4.
    """
    scores = []
    for part in logits.reshape(-1, logits.shape[-1]).double().log_softmax(1).tensor_split(splits):
        marginal = part.exp().mean(0).log()
        divergence = torch.where(part.exp() > 0, part.exp() * (part - marginal), 0.0)  # 0 log 0 is 0
        scores.append(divergence.sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def inception_statistic(logits: Tensor, *, splits: int) -> Statistic:
    """`inception_score` as a function of numbers of pictures."""
    return lambda chosen: inception_score(logits[chosen], splits=splits)


class Interval(NamedTuple):
    """A value, and a 95 % bootstrap interval of it; NaN without a bootstrap."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


def interval(value: float, replicates: Tensor) -> Interval:
    """The 95 % interval: the value plus the deviations of the replicates from their own mean.

    A set drawn with replacement has fewer different pictures, which raises FID and the sliced Wasserstein distance; the replicates' mean
    is taken out, so that the interval stands around the value.
    """
    if len(replicates) < 2:
        return Interval(value)
    low, high = (replicates - replicates.mean()).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, value + low, value + high)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _self_kernel(rows: Tensor) -> Tensor:
    return (rows.square().sum(1) / rows.shape[1] + 1) ** 3
