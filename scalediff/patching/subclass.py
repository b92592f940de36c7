"""Patch an object by giving it a subclass of its class with other methods.

A patched object has such a class and the patch itself in its `__dict__`. Without the patch in its `__dict__`, an object of the subclass
behaves like one of the original class.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any, cast

ATTRIBUTE = "_scalediff"
_ORIGINAL_CLASS = "_scalediff_stands_for"
_METHODS = "_scalediff_methods"


class Patched:
    """Base of the subclasses made here. Copies and pickles of a patched object have the original class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, arguments, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        arguments = tuple(original_class(type(self)) if argument is type(self) else argument for argument in arguments)
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            function = object.__new__  # copyreg.__newobj__ needs the class of the patched object
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != ATTRIBUTE}
        return function, arguments, *rest


def original_class(cls: type) -> type:
    """The class that was patched, also when other code has subclassed the patched class since."""
    for base in cls.__mro__:
        if _ORIGINAL_CLASS in base.__dict__:
            return original_class(base.__dict__[_ORIGINAL_CLASS])
    return cls


def patch_class(owner: Any, patch: object, methods: Callable[[type], dict[str, Callable[..., Any]]]) -> None:
    """Give an object a subclass of its class with these methods, and store the patch in its `__dict__`.

    The subclass keeps the name and module of the class, so saving and printing do not change.
    """
    original = type(owner).__dict__.get(_ORIGINAL_CLASS, type(owner))  # an object created from a patched object's class is not patched
    owner.__class__ = _patched_subclass(original, methods)
    owner.__dict__[ATTRIBUTE] = patch
    for name, method in type(owner).__dict__[_METHODS].items():
        if is_replaced(owner, name):  # all objects of the original class share this subclass
            setattr(type(owner), name, method)


@functools.cache  # torch.compile can then reuse a graph after the model is patched again
def _patched_subclass(cls: type, methods: Callable[[type], dict[str, Callable[..., Any]]]) -> type:
    own = methods(cls)
    names = {_ORIGINAL_CLASS: cls, _METHODS: own, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,) if issubclass(cls, Patched) else (Patched, cls), {**own, **names})


def is_replaced(owner: Any, name: str) -> bool:
    """Whether other code, such as cache-dit, has replaced this method in the class of a patched object."""
    members = type(owner).__dict__
    return name in members.get(_METHODS, {}) and members.get(name) is not members[_METHODS][name]


def restore_class(owner: Any, patch: object) -> None:
    """Remove this patch and restore the object's class, if this patch is the current one."""
    if owner is not None and owner.__dict__.get(ATTRIBUTE) is patch:
        del owner.__dict__[ATTRIBUTE]
        if _ORIGINAL_CLASS in type(owner).__dict__:  # a subclass made by other code stays: without a patch it calls the original methods
            owner.__class__ = type(owner).__dict__[_ORIGINAL_CLASS]


def is_patched(net: Any) -> bool:
    """Whether a network is patched, directly or through its pipeline."""
    return ATTRIBUTE in net.__dict__
