"""Checks of the arguments that users pass. Every error names the argument, what it must be, and the value that it has."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Check = Callable[[str, Any], None]

_LONGEST = 120  # characters of a value in a message


def shown(name: str, value: Any) -> str:
    """`name=value` for a message, cut to a readable length."""
    text = repr(value)
    return f"{name}={text if len(text) <= _LONGEST else text[:_LONGEST] + '...'}"


def wrong_type(name: str, contract: str, value: Any) -> TypeError:
    """The error for a value of a wrong type."""
    return TypeError(f"{name} must be {contract}, got {shown(name, value)}")


def check_integer(name: str, value: Any) -> None:
    """Check for an integer; True and False are none."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise wrong_type(name, "an integer", value)


def check_positive(name: str, value: Any) -> None:
    """Check for an integer of at least 1."""
    check_integer(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {shown(name, value)}")


def check_number(name: str, value: Any) -> None:
    """Check for a finite real number; True and False are none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise wrong_type(name, "a number", value)
    if not abs(value) <= sys.float_info.max:  # type: ignore[operator]  # false for NaN as well
        raise ValueError(f"{name} must be finite, got {shown(name, value)}")


def check_boolean(name: str, value: Any) -> None:
    """Check for True or False."""
    if not isinstance(value, bool):
        raise wrong_type(name, "True or False", value)


def check_text(name: str, value: Any) -> None:
    """Check for a string."""
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)


def check_callable(name: str, value: Any) -> None:
    """Check for a function or another callable."""
    if not callable(value):
        raise wrong_type(name, "a function", value)


def check_mapping(name: str, value: Any) -> None:
    """Check for a mapping whose keys are strings."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise wrong_type(name, "a mapping from names to values", value)


def check_grid(name: str, value: Any) -> None:
    """Check for a tuple or list of integers; that they are two positive ones is checked where their meaning is known."""
    if not isinstance(value, tuple | list) or not all(isinstance(n, Integral) and not isinstance(n, bool) for n in value):
        raise wrong_type(name, "two positive integers (Y, X) in tokens", value)


def check_wrap(name: str, value: Any) -> None:
    """Check for a pair of booleans, one for each axis."""
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(isinstance(one, bool) for one in value):
        raise wrong_type(name, "a pair of booleans (Y, X)", value)


def choice(allowed: Sequence[str]) -> Check:
    """A check for one of these strings."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {shown(name, value)}")

    return check


def instance(kinds: type | tuple[type, ...], contract: str) -> Check:
    """A check for an instance of these classes, which `contract` describes."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, kinds):
            raise wrong_type(name, contract, value)

    return check


def optional(check: Check) -> Check:
    """The same check, which also accepts None."""

    def check_unless_none(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return check_unless_none


def check_arguments(checks: Mapping[str, Check], arguments: Mapping[str, Any]) -> None:
    """Check every argument that the table has a check for."""
    for name, value in arguments.items():
        if name in checks:
            checks[name](name, value)


def checked(checks: Mapping[str, Check]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that checks the arguments of every call of a function by a table from their names."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                arguments: Mapping[str, Any] = signature.bind(*args, **kwargs).arguments
            except TypeError:  # missing or unknown arguments: Python's own error names the function
                arguments = {}
            check_arguments(checks, arguments)
            return function(*args, **kwargs)

        return call

    return decorate
