"""What the ranks of a mesh must agree on before they draw a picture together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from scalediff.cascade.describing import package_version
from scalediff.cascade.workdir import digest, fingerprint_weights
from scalediff_kernels.distributed.groups import check_agreement, groups_of

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
    for group in groups_of(mesh):
        check_agreement(group, facts)
