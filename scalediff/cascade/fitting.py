"""Pictures that are too large for a device: refuse what cannot fit, and find the largest size that does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from scalediff.cascade.borrowing import is_tiled
from scalediff.cascade.memory import (
    MARGIN,
    Estimate,
    available_bytes,
    estimate,
    estimate_model,
    format_gib,
    images_per_call,
    needs_tiling,
    total_bytes,
)
from scalediff.cascade.pipeline import native_size, size_multiple
from scalediff.cascade.placement import is_offloaded, weights_of
from scalediff.cascade.rank_memory import estimate_rank, ranks_of_autoencoder
from scalediff.cascade.ranks import on_all_ranks, ranks_of
from scalediff.cost.flops import native_rules
from scalediff.patching.circular import wrapped
from scalediff.patching.networks import handle_of, padding_parts
from scalediff.patching.splits import WHOLE, Shares
from scalediff.settings import Attention

_PICTURES = 4  # any way of decoding holds a picture about this many times, so the search begins where these fit
_TRIES = 8
_BF16_PIXEL = 6  # bytes
_PLENTY = 2**16  # bytes for a pixel, several times what any estimate needs: with so much memory there is nothing to estimate


@dataclass(frozen=True)
class Fit:
    """The memory that a run needs, by estimate, beside the memory that there is.

    Attributes:
        peak: Bytes that the run needs.
        available: Bytes that are available; None if not known.
        advice: What would reduce the need; empty if the run fits.
        size: (height, width) in pixels of about the same aspect ratio that would fit; None if the run fits or no size is known.
        ranks: Number of ranks that draw the picture together, of which these are the numbers of one.
    """

    peak: int
    available: int | None
    advice: str = ""
    size: tuple[int, int] | None = None
    ranks: int = 1

    def describe(self, where: str = "") -> str:
        """The need beside what is available, as a clause for messages; `where` says on which of several ranks."""
        needs = f"this run needs about {format_gib(self.peak)}"
        if self.ranks > 1:
            needs = f"each of {self.ranks} ranks needs at most about {format_gib(self.peak)}"
        return needs if self.available is None else f"{needs}; {format_gib(self.available)} are available{where}"


@dataclass(frozen=True)
class Switches:
    """The arguments of `generate` that change the memory of a run. Rows that wrap keep the autoencoder from running in bands."""

    vae_tiling: bool | None = None
    split_guidance: bool = False
    wrap: tuple[bool, bool] = (False, False)


def fit_of(
    pipe: Any, arguments: Mapping[str, Any], size: tuple[int, int], switches: Switches = Switches(), *, shares: Shares = WHOLE
) -> Fit:
    """Estimate whether a run fits into memory.

    Args:
        pipe: The pipeline.
        arguments: Arguments of the pipeline's call.
        size: (height, width) of the largest stage in pixels.
        switches: Those of the run.
        shares: How ranks share the picture out; the estimate is then an upper bound, as in `estimate_rank`.

    Raises:
        ValueError: The pictures alone are larger than the device's memory.
        NotImplementedError: The memory cannot be estimated.
    """
    handle = handle_of(pipe)
    if any(switches.wrap) or (handle is not None and any(handle.wrap)):
        with wrapped(padding_parts(pipe), switches.wrap):
            return _fit_of(pipe, arguments, size, switches, shares)
    return _fit_of(pipe, arguments, size, switches, shares)


def _fit_of(pipe: Any, arguments: Mapping[str, Any], size: tuple[int, int], switches: Switches, shares: Shares) -> Fit:
    """`fit_of`, with the axes that wrap at present."""
    check_possible(pipe, arguments, size)
    needs = _estimate(pipe, arguments, size, shares)

    def used_at(size: tuple[int, int]) -> dict[str, bool]:
        ranks = ranks_of_autoencoder(pipe, size, shares)
        needed = is_tiled(pipe.vae) or needs_tiling(pipe, size, images_per_call(arguments), ranks=ranks)
        tiled = needed if switches.vae_tiling is None else switches.vae_tiling
        return {"tiled": tiled, "split": switches.split_guidance, "offloaded": is_offloaded(pipe)}

    used = used_at(size)
    peak, available = needs.peak(**used), available_bytes(pipe._execution_device)
    if available is None or peak <= available:
        return Fit(peak, available, ranks=shares.ranks)
    fits = fitting_size(pipe, arguments, size, available, used_at, shares)
    return Fit(peak, available, needs.advice(available, **used), fits, shares.ranks)


def _estimate(pipe: Any, arguments: Mapping[str, Any], size: tuple[int, int], shares: Shares) -> Estimate:
    return estimate(pipe, arguments, size) if shares.ranks == 1 else estimate_rank(pipe, arguments, size, shares)


def check_fit(
    pipe: Any,
    arguments: Mapping[str, Any],
    size: tuple[int, int],
    switches: Switches = Switches(),
    *,
    mesh: Any = None,
    attention: Attention = "npa",
    vae_attention: Attention = "full",
    force: bool = False,
) -> None:
    """Check that a run fits into the memory that is available, by estimate. A run whose memory cannot be estimated is not refused.

    Ranks that draw together must all call it: if the run does not fit on one of them, all raise the same error.

    Args:
        pipe, arguments, size, switches: As in `fit_of`.
        mesh, attention, vae_attention: As in `ranks_of`.
        force: Whether this rank runs it all the same.

    Raises:
        ValueError: It does not fit. The message says what it needs, what there is, and what would fit.
    """
    groups, shares = ranks_of(pipe, mesh, attention=attention, vae_attention=vae_attention)

    def fit() -> Fit | None:
        available = None if force else available_bytes(pipe._execution_device)
        pixels = size[0] * size[1] * images_per_call(arguments)
        if available is None or _PLENTY * pixels + sum(weights_of(pipe).values()) + MARGIN <= available:
            return None
        try:
            return fit_of(pipe, arguments, size, switches, shares=shares)
        except NotImplementedError:
            return None

    for rank, found in on_all_ranks(fit, groups, "comparing their memory").items():
        if found is not None and found.advice:
            where = f" on rank {rank}" if groups else ""
            raise ValueError(
                f"the run must fit into the memory of {pipe._execution_device}, got {size[0]} x {size[1]}: {found.describe(where)}; "
                f"{found.advice}; {describe_fit(found.size)}; force=True runs it all the same"
            )


def check_possible(pipe: Any, arguments: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Check that the device could hold the finished pictures at all. Far smaller runs can still be too large: see `estimate`.

    Args:
        pipe: The pipeline.
        arguments: Arguments of the pipeline's call.
        size: (height, width) of the largest stage in pixels.

    Raises:
        ValueError: The pictures alone are larger than the device's memory.
    """
    device = pipe._execution_device
    needs, total = _picture_bytes(pipe, arguments, size), total_bytes(device)
    if total is not None and needs > total:
        fits = fitting_size(pipe, arguments, size, total, lambda _: {"tiled": True})
        raise ValueError(
            f"the picture must fit into the memory of {device}, {format_gib(total)}, got {size[0]} x {size[1]}, which takes "
            f"{format_gib(needs)} for its pixels alone; {describe_fit(fits)}"
        )


def fitting_size(
    pipe: Any,
    arguments: Mapping[str, Any],
    size: tuple[int, int],
    available: int,
    options: Callable[[tuple[int, int]], Mapping[str, bool]],
    shares: Shares = WHOLE,
) -> tuple[int, int] | None:
    """The largest size of about the same aspect ratio whose run fits into memory, by estimate.

    Args:
        pipe: The pipeline.
        arguments: Arguments of the pipeline's call.
        size: (height, width) in pixels that does not fit.
        available: Bytes that are available.
        options: Function from a size to the options in use, as in `Estimate.peak`.
        shares: How ranks share the picture out, which they can at the size that is returned.

    Returns:
        (height, width) in pixels, or None if no size of at least the native area fits, or if it is not known.
    """

    def needs(size: tuple[int, int]) -> tuple[Estimate, Mapping[str, bool]]:
        return _estimate(pipe, arguments, size, shares), options(size)

    pixels, multiple = _picture_bytes(pipe, arguments, (1, 1)), size_multiple(pipe) * shares.multiple
    return _largest(size, available, needs, native=native_size(pipe), multiple=multiple, pixel_bytes=pixels)


def fitting_model_size(name: str, size: tuple[int, int], available: int, options: Mapping[str, bool]) -> tuple[int, int] | None:
    """The largest size of about the same aspect ratio at which a model of `scalediff.cost.models.MODELS` fits into memory, by estimate.

    Args:
        name: Name of the model.
        size: (height, width) in pixels that does not fit.
        available: Bytes that are available.
        options: The options in use, as in `Estimate.peak`.

    Returns:
        As `fitting_size`.
    """
    native, multiple = native_rules(name)
    return _largest(
        size,
        available,
        lambda size: (estimate_model(name, size, available), options),
        native=native,
        multiple=multiple,
        pixel_bytes=_BF16_PIXEL,
    )


def _largest(
    size: tuple[int, int],
    available: int,
    needs: Callable[[tuple[int, int]], tuple[Estimate, Mapping[str, bool]]],
    *,
    native: tuple[int, int],
    multiple: int,
    pixel_bytes: int,
) -> tuple[int, int] | None:
    """The largest size that fits; `needs` is a function from a size to its estimate and the options in use."""
    scale = min(1.0, math.sqrt(available / (_PICTURES * pixel_bytes * math.prod(size))))
    for _ in range(_TRIES):
        height, width = (math.floor(side * scale / multiple) * multiple for side in size)
        if height * width < math.prod(native) or not height * width:
            return None
        try:
            estimated, used = needs((height, width))
        except NotImplementedError:
            return None
        peak, fixed = estimated.peak(**used), _without_activations(estimated).peak(**used)
        if peak <= available:
            return height, width
        if fixed >= available:
            return None
        scale *= min(0.98, math.sqrt((available - fixed) / (peak - fixed)))
    return None


def describe_fit(fits: tuple[int, int] | None) -> str:
    """A clause for messages that names the size that fits."""
    return f"{fits[0]} x {fits[1]} would fit" if fits is not None else "no size is known to fit"


def _without_activations(needs: Estimate) -> Estimate:
    return replace(needs, denoiser=0, vae=0, vae_tiled=0)


def _picture_bytes(pipe: Any, arguments: Mapping[str, Any], size: tuple[int, int]) -> int:
    return int(3 * size[0] * size[1] * pipe.vae.dtype.itemsize * images_per_call(arguments))
