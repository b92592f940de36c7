"""The methods of a patched denoiser that open a pass: `__call__`, and `forward` for code that calls it directly.

A pass opens at the outermost of these methods; the inner ones do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from scalediff.patching.interception import current
from scalediff.patching.stack import in_forward
from scalediff.patching.subclass import ATTRIBUTE
from scalediff.patching.target import Target
from scalediff_kernels.distributed.losses import check_losses


def _not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile out of a function, but not out of the functions that it calls."""
    wrapped: Callable[..., Any] = torch.compiler.disable(function, recursive=False)
    return wrapped


@functools.cache  # made when a model is first patched: torch.compiler.disable imports the compiler
def _runners() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Two functions of a denoiser, one of its bound methods, and the arguments, which call the method in a pass of the denoiser's patch.

    Plain Python, which torch.export runs as it is; and the same function kept away from torch.compile.
    """
    begin, end = torch.compiler.disable(Target.begin), torch.compiler.disable(Target.end)

    def run(module: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target: Target | None = module.__dict__.get(ATTRIBUTE)
        if target is None:  # a copy, or a model that is not patched any more
            return method(*args, **kwargs)
        opened, finished = None, False
        try:
            opened = begin(target, module, args, kwargs)
            split = None if opened is None else opened.split
            result = method(*args, **kwargs) if split is None else split.run(module, method, args, kwargs)
            finished = True
        except RuntimeError as error:
            for group in target.groups:  # also in a collective of diffusers
                check_losses(group, "running the model", error)
            raise
        finally:
            if opened is not None:
                end(target, module, opened, finished)
        return result

    _StoredForward.__call__ = _not_compiled(_StoredForward.__call__)  # type: ignore[method-assign]
    return run, _not_compiled(run)


class _Uncompiled:
    """A method that is never compiled itself, while the functions that it calls are. torch.export runs it as plain Python.

    Args:
        make: Function from a runner to the method.
    """

    def __init__(self, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        plain, disabled = _runners()
        self.plain, self.disabled = make(plain), _not_compiled(make(disabled))

    def __get__(self, owner: Any, cls: type) -> Callable[..., Any]:
        function = self.plain if torch.compiler.is_exporting() else self.disabled
        return function if owner is None else MethodType(function, owner)


def _in_pass(method: Callable[..., Any]) -> _Uncompiled:
    """A method of a class that runs in a pass."""

    def make(run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return run(self, MethodType(method, self), args, kwargs)

        return call

    return _Uncompiled(make)


class _StoredForward:
    """A forward that other code has stored in the denoiser, such as an offloading hook; a call runs in a pass."""

    def __init__(self, module: Any, forward: Callable[..., Any]) -> None:
        self._module, self._forward = module, forward
        functools.update_wrapper(self, forward, updated=())
        if hasattr(forward, "__code__"):
            self.__code__ = forward.__code__  # torch.export reads the names of the arguments there

    def __get__(self, module: Any, cls: type | None = None) -> _StoredForward:
        return self  # as a bound method does: cache-dit binds the forward that it gives back

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any]]:
        """Copies and pickles hold the forward itself: a hook may give this object back after the patch is undone."""
        return _same, (self._forward,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # kept away from torch.compile when a model is first patched
        return _runners()[1](self._module, self._forward, args, kwargs)


def _same(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward


def _forward_attribute(method: Callable[..., Any]) -> Any:
    """The attribute `forward` of a patched denoiser's class.

    Hooks store a forward in the denoiser itself, which would hide a method of the class. A descriptor with `__set__` comes before it.
    """
    in_pass = _in_pass(method)

    def get(descriptor: Any, module: Any, cls: type) -> Callable[..., Any]:
        own = None if module is None else module.__dict__.get("forward")
        if own is None:
            return in_pass.__get__(module, cls)
        if getattr(own, "__func__", None) in (in_pass.plain, in_pass.disabled):
            return own  # type: ignore[no-any-return]  # stored by a hook that has been removed again
        if torch.compiler.is_exporting():
            return lambda *args, **kwargs: _runners()[0](module, own, args, kwargs)
        return _StoredForward(module, own)  # `own` is read now: a hook that stores another forward keeps this one and calls it

    def put(descriptor: Any, module: Any, forward: Callable[..., Any]) -> None:
        # A hook that is removed gives back what it has read; what stays is the forward that was there, also after the patch is undone.
        module.__dict__["forward"] = forward._forward if isinstance(forward, _StoredForward) else forward

    def delete(descriptor: Any, module: Any) -> None:
        if "forward" not in module.__dict__:
            raise AttributeError("forward")
        del module.__dict__["forward"]

    # `get` is a frame of its own, which torch.compile would try to compile.
    return type("Forward", (), {"__get__": torch.compiler.disable(get), "__set__": put, "__delete__": delete})()


def denoiser_methods(cls: type) -> dict[str, Any]:
    """The methods of a patched denoiser's class.

    torch.compile may have captured `__call__` or `_call_impl` before the model was patched. Both look up `forward`, so a pass still opens.
    """
    return {"__call__": _in_pass(cls.__call__), "forward": _forward_attribute(cls.forward)}  # type: ignore[attr-defined]


def is_running(net: nn.Module) -> bool:
    """Whether this thread is inside a forward of the network that has no pass."""
    inner = current()
    if inner is not None and inner.owner is net.__dict__.get(ATTRIBUTE):
        return False
    return in_forward(net)
