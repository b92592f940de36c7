"""A U-Net whose pictures are split by rows over the ranks of a process group, during its passes above the native area.

A pass cuts the latents to this rank's band of rows, and replaces `F.conv2d` and `F.group_norm` while it runs: convolutions receive the rows
next to the band from its neighbours, group norms the statistics of all bands. Residuals of ControlNets and adapters, which every rank
computes whole, are cut likewise. Attention goes the way of all patched models. All other layers see one pixel or token at a time. In the
end the output is gathered.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from scalediff.families.grid import Grid
from scalediff.patching.halves import GUIDANCE, Halves, with_output
from scalediff.patching.rows import check_rows
from scalediff.patching.stack import has_compiled_parts
from scalediff_kernels.distributed.bands import convolve_band, gather_bands, normalise_band
from scalediff_kernels.distributed.groups import group_of

_RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals")


class Bands:
    """The split of a U-Net.

    Args:
        mesh: A process group, or a `DeviceMesh` of one dimension; or one of two, `("guidance", "rows")`, of which the first has two ranks.
            Each of them computes half of a batch of even size, such as that of classifier-free guidance.
        parameters: Names of the arguments of its `forward`.
        levels: Number of its levels, of which each has half the rows of the one before.

    Attributes:
        group: The group over which rows are split.
        groups: All groups of the mesh.

    Raises:
        TypeError, RuntimeError: As `group_of`.
        ValueError: As `group_of`; also if a mesh of two dimensions is another one.
    """

    def __init__(self, mesh: Any, parameters: Sequence[str], levels: int) -> None:
        self._parameters, self._levels, self._halves = tuple(parameters), levels, None
        self._warned = False
        if isinstance(mesh, DeviceMesh) and mesh.ndim == 2:
            if mesh.mesh_dim_names != (GUIDANCE, "rows") or mesh.size(0) != 2:
                raise ValueError(f"a mesh of two dimensions must be of 2 ranks for {GUIDANCE!r} and others for 'rows', got {mesh}")
            self._halves, mesh = Halves(mesh[GUIDANCE], parameters), mesh["rows"]
        self.group = group_of(mesh)
        self.groups = (self.group,) if self._halves is None else (self.group, *self._halves.groups)

    def undo(self, module: nn.Module) -> None:
        """Nothing remains after a pass."""

    def check_grid(self, grid: Grid) -> None:
        """Check that pictures of this token grid can be split; errors as in `check_rows`."""
        check_rows(grid[0], distributed.get_world_size(self.group), levels=self._levels)

    def run(self, module: nn.Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a method with this rank's band of the latents, which are its first argument; the result is that of the whole picture.

        Raises:
            NotImplementedError: The pass has masks of an IP-Adapter; FreeU is on; or as `Halves.run`.
        """
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        _check_parts(module, given)
        if self._halves is not None:
            return self._halves.run(module, functools.partial(self._run_band, module, method), (), given)
        return self._run_band(module, method, **given)

    def _run_band(self, module: nn.Module, method: Callable[..., Any], /, **given: Any) -> Any:
        given |= {name: self._band(given.get(name)) for name in (self._parameters[0], *_RESIDUALS) if name in given}
        alone = distributed.get_world_size(self.group) == 1  # its band is the picture, of any number of rows
        with over_ranks(None if alone else self.group), self._uncompiled(module):
            result = method(**given)
        return with_output(result, lambda out: gather_bands(out, self.group))

    def _uncompiled(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Run what is compiled as it was before: a message between any two layers leaves nothing to a graph; with a warning, once."""
        if not has_compiled_parts(module):
            return nullcontext()
        if not self._warned:
            self._warned = True
            name = type(module).__name__
            warnings.warn(
                f"scalediff: the compiled parts of {name} run uncompiled where mesh= splits its rows: its layers exchange rows",
                stacklevel=2,
            )
        eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return eager

    def _band(self, value: Any) -> Any:
        """This rank's rows of latents, or of residuals, which have the rows of any level."""
        if isinstance(value, Tensor):
            return value.chunk(distributed.get_world_size(self.group), dim=2)[distributed.get_rank(self.group)]
        return type(value)(map(self._band, value)) if isinstance(value, list | tuple) else value


def _check_parts(module: nn.Module, given: Mapping[str, Any]) -> None:
    """Check that nothing in a pass looks at the whole picture; raises as `Bands.run`."""
    if "ip_adapter_masks" in (given.get("cross_attention_kwargs") or {}):
        raise NotImplementedError("mesh= does not split the masks of an IP-Adapter, got ip_adapter_masks")
    if any(getattr(block, "s1", None) is not None for block in getattr(module, "up_blocks", ())):
        raise NotImplementedError("mesh= does not split FreeU's Fourier transforms: call disable_freeu()")


class _Thread(threading.local):
    group: Any = None


_thread = _Thread()


def group_of_bands() -> Any:
    """The process group whose ranks have the bands that this thread computes at present; None if it computes whole pictures."""
    return _thread.group


@contextmanager
def over_ranks(group: Any) -> Iterator[None]:
    """Let this thread's convolutions and group norms compute this rank's band of a picture; what they are given if `group` is None."""
    before, _thread.group = _thread.group, group
    if group is not None:
        _swap.acquire()
    try:
        yield
    finally:
        if group is not None:
            _swap.release()
        _thread.group = before


def _conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor:
    """Replacement for `F.conv2d`."""
    group = group_of_bands()
    if group is None:
        out: Tensor = _swap.originals["conv2d"](input, weight, bias, stride, padding, dilation, groups)
        return out
    return convolve_band(input, weight, bias, stride, padding, dilation, groups, group=group)


def _group_norm(input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Replacement for `F.group_norm`."""
    group = group_of_bands()
    if group is None:
        out: Tensor = _swap.originals["group_norm"](input, num_groups, weight, bias, eps)
        return out
    return normalise_band(input, num_groups, weight, bias, eps, group=group)


class _Swap:
    """The replaced functions, with a count of passes: the first of any thread replaces them, the last one restores them."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self.originals: dict[str, Callable[..., Any]] = {"conv2d": torch.conv2d, "group_norm": F.group_norm}

    def acquire(self) -> None:
        with self._lock:
            if self._users == 0:
                self.originals = {name: getattr(F, name) for name in self.originals}
                F.conv2d, F.group_norm = _conv2d, _group_norm  # type: ignore[assignment]
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for name, function in self.originals.items():
                    setattr(F, name, function)


_swap = _Swap()
