"""What the ranks of a mesh must agree on before and while they draw a picture together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch

from scalediff.cascade.describing import package_version
from scalediff.cascade.pipeline import Sizes, cascade_of, family_with_cascade, pixels_per_latent
from scalediff.cascade.workdir import digest, fingerprint_weights
from scalediff.patching.handle import Handle
from scalediff.patching.networks import denoiser_of, handle_of
from scalediff.patching.splits import WHOLE, Shares, shares_of
from scalediff.settings import Attention, Settings
from scalediff_kernels.distributed.groups import check_agreement, gather_by_rank, groups_of

T = TypeVar("T")
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


def check_stages(pipe: Any, handle: Handle, sizes: Sizes, settings: Settings, *, restarts: int) -> None:
    """Check that ranks that draw a picture together can share it out in every stage, before anything is drawn.

    Args:
        pipe: The pipeline.
        handle: Its handle; nothing is checked if it does not split the denoiser.
        sizes: (height, width) of every stage in pixels.
        settings: Settings of the run.
        restarts: Number of the last stages, which restart from noise.

    Raises:
        ValueError: They cannot have equal parts. The message names the stage.
    """
    pixels = cascade_of(pipe).patch * pixels_per_latent(pipe)
    for index, (height, width) in enumerate(sizes, start=1):
        in_windows = index > len(sizes) - restarts and settings.attention == "npa"
        try:
            handle.check_grid((height // pixels, width // pixels), in_windows=in_windows)
        except ValueError as why:
            raise ValueError(f"stage {index}/{len(sizes)}, {height} x {width}, has tokens of {pixels} x {pixels} pixels: {why}") from why


def largest_of_ranks(value: int, groups: tuple[Any, ...]) -> int:
    """The largest of the numbers that the ranks of a mesh have, on all of them; the number itself if there are no groups.

    Raises LostRankError if a rank has ended.
    """
    return max(gather_by_rank(value, groups, "comparing numbers").values()) if groups else value


def on_all_ranks(check: Callable[[], T], groups: tuple[Any, ...], doing: str) -> dict[int, T]:
    """What a check returns on every rank of a mesh, by its number. All ranks must call it; without groups there is one, 0.

    Args:
        check: Function without arguments.
        groups: The process groups of the mesh.
        doing: What the ranks do, for the message if one has ended.

    Raises:
        ValueError, NotImplementedError: The check raised it on some rank, which the message names; on all the same.
        LostRankError: A rank has ended.
    """
    if not groups:
        return {0: check()}
    try:
        outcome: Any = check()
    except (ValueError, NotImplementedError) as error:
        outcome = _Failed(ValueError if isinstance(error, ValueError) else NotImplementedError, str(error))
    found = gather_by_rank(outcome, groups, doing)
    for rank, other in found.items():
        if isinstance(other, _Failed):
            raise other.kind(f"rank {rank}: {other.message}")
    return found


class _Failed(NamedTuple):
    """The error of a check."""

    kind: type[Exception]
    message: str


def ranks_of(pipe: Any, mesh: Any, *, attention: Attention, vae_attention: Attention) -> tuple[tuple[Any, ...], Shares]:
    """The process groups over which a pipeline's pictures are split in a run, and into which parts.

    Args:
        pipe: The pipeline.
        mesh: The mesh of the run; None if there is none, or that of the patched pipeline.
        attention: That of the stages above the native size: with full attention all ranks compute the whole.
        vae_attention: That of the autoencoder, which is not split if it is computed in windows.

    Raises:
        ValueError, TypeError, RuntimeError, NotImplementedError: The denoiser cannot be split over the mesh, as in `patch_model`.
    """
    groups: tuple[Any, ...] = ()
    shares, handle = WHOLE, handle_of(pipe)
    if mesh is not None:
        denoiser = denoiser_of(pipe)
        groups, shares = groups_of(mesh), shares_of(mesh, denoiser, family_with_cascade(denoiser)[0])
    elif handle is not None:
        groups, shares = handle.groups, handle.shares
    if attention == "full":
        shares = replace(WHOLE, multiple=shares.multiple)
    return groups, shares if vae_attention == "full" else replace(shares, pictures=1)
