"""What the ranks of a mesh must agree on before and while they draw a picture together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import distributed

from scalediff.cascade.describing import package_version
from scalediff.cascade.workdir import digest, fingerprint_weights
from scalediff_kernels.distributed.groups import check_agreement, groups_of
from scalediff_kernels.distributed.losses import naming_losses

_OPTIONS = ("window", "text_queries", "text_rope", "jitter", "seed", "impl")


def check_ranks(denoiser: Any, mesh: Any, options: Mapping[str, Any]) -> None:
    """Check that all ranks have the same versions, weights and options of `patch_model`; errors as in `check_agreement`."""
    facts = {
        "torch": torch.__version__,
        "diffusers": package_version("diffusers"),
        "scalediff": package_version("scalediff"),
        "the model": f"{type(denoiser).__name__} {digest(dict(getattr(denoiser, 'config', {})))}",
        "the digest of the weights": fingerprint_weights([denoiser]),
        **{name: repr(options[name]) for name in _OPTIONS if name in options},
    }
    check_agreement(groups_of(mesh), facts)


def largest_of_ranks(value: int, groups: Iterable[Any]) -> int:
    """The largest of the numbers that the ranks of a mesh have, on all of them; the number itself if there are no groups.

    Raises LostRankError if a rank has ended.
    """
    for group in groups:
        found = [0] * distributed.get_world_size(group)
        with naming_losses(group, "comparing numbers"):
            distributed.all_gather_object(found, value, group=group)
        value = max(found)
    return value
