"""Gluon's language on torch tensors, for `gluon_emulator`: pure computation, and the translation of jitted functions."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from types import FunctionType, GeneratorType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language
from triton.runtime.jit import JITFunction

DTYPES = {"int1": torch.bool} | {
    name: getattr(torch, name)
    for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32", "float64")
}
ELEMENTWISE = ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "abs", "sin", "cos", "floor", "ceil")
LAYOUTS = ("AutoLayout", "BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMADistributedLayout", "DistributedLinearLayout")
LAYOUTS += ("NVMMASharedLayout", "SwizzledSharedLayout", "PaddedSharedLayout", "SharedLinearLayout", "CoalescedLayout")


class EmulationError(Exception):
    """The kernel does what a GPU forbids, or what gives wrong values on one."""


@dataclass
class Pointer:
    """A pointer into a tensor, or a tensor of pointers; offsets count elements."""

    elements: Tensor
    offset: Any = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.elements, self.offset + offset)

    __radd__ = __add__

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.elements.dtype)

    def offsets(self, mask: Any) -> tuple[Tensor, Tensor]:
        """The offsets, zero where the mask is false, and the mask."""
        offsets, active = torch.broadcast_tensors(torch.as_tensor(self.offset), torch.as_tensor(True if mask is None else mask))
        outside = active & ((offsets < 0) | (offsets >= len(self.elements)))
        if outside.any():
            raise EmulationError(f"a pointer leaves its tensor of {len(self.elements)} elements, got offset {offsets[outside].tolist()[0]}")
        return torch.where(active, offsets, 0).long(), active


def load(pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Any:
    """Elements that the mask leaves out are `other`; without `other` they are NaN."""
    offsets, active = pointer.offsets(mask)
    dtype = pointer.elements.dtype
    default = other if other is not None else float("nan") if dtype.is_floating_point else 0
    loaded = torch.where(active, pointer.elements[offsets], torch.as_tensor(default, dtype=dtype))
    return loaded if loaded.ndim else loaded.item()


def store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    offsets, active = pointer.offsets(mask)
    pointer.elements[offsets[active]] = torch.as_tensor(value).to(pointer.elements.dtype).expand(offsets.shape)[active]


def _check(condition: Any, message: str = "") -> None:
    if not condition:
        raise EmulationError(f"an assertion of the kernel failed: {message}")


def _reduction(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, axis=None, keep_dims=False: reduce(x, tuple(range(x.ndim)) if axis is None else axis, keepdim=keep_dims)


def _either(of_numbers: Callable[..., Any], of_tensors: Callable[..., Tensor]) -> Callable[..., Any]:
    """One function for numbers, which stay such, and for tensors."""

    def call(*args: Any) -> Any:
        if all(isinstance(x, int | float) for x in args):
            return of_numbers(*args)
        return of_tensors(*map(_tensor, args))

    return call


def _tensor(x: Any) -> Any:
    return torch.as_tensor(x) if isinstance(x, int | float) else x


def _elementwise(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Tensor]:
    return lambda x: function(_tensor(x))


def divide(a: Any, b: Any) -> Any:
    """`a // b` as in C, rounded towards zero."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.div(a, b, rounding_mode="trunc")
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a: Any, b: Any) -> Any:
    """`a % b` as in C, with the sign of `a`."""
    return a - divide(a, b) * b


def _same(x: Any, *_: Any, **__: Any) -> Any:
    return x


FUNCTIONS: dict[str, Any] = (
    DTYPES
    | {name: _elementwise(getattr(torch, name)) for name in ELEMENTWISE}
    | dict.fromkeys(LAYOUTS, lambda *_, **__: None)
    | dict.fromkeys(("constexpr", "convert_layout", "to_tensor", "multiple_of", "max_contiguous", "max_constancy"), _same)
    | dict.fromkeys(("assume", "static_assert", "device_assert"), _check)
    | dict.fromkeys(("static_print", "device_print", "barrier", "thread_barrier"), lambda *_, **__: None)
    | {
        "static_range": range,
        "full": lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
        "zeros": lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
        "full_like": lambda x, value: torch.full_like(x, value),
        "zeros_like": torch.zeros_like,
        "arange": lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
        "where": _either(lambda condition, a, b: a if condition else b, torch.where),
        "maximum": _either(max, torch.maximum),
        "minimum": _either(min, torch.minimum),
        "max": _reduction(torch.amax),
        "min": _reduction(torch.amin),
        "sum": _reduction(torch.sum),
        "cdiv": lambda a, b: divide(a + b - 1, b),
        "fma": lambda a, b, c: a * b + c,
        "cast": lambda x, dtype: x.to(dtype) if isinstance(x, Tensor) else x,
        "expand_dims": torch.unsqueeze,
        "reshape": torch.reshape,
        "permute": torch.permute,
        "split": lambda x: x.unbind(-1),
        "join": lambda a, b: torch.stack([a, b], -1),
        "load": load,
        "store": store,
        "num_ctas": lambda: 1,
    }
)


def steps(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Generator[None, None, Any]:
    """Call a function; if it is a generator function, yield where it does."""
    result = function(*args, **kwargs)
    return (yield from result) if isinstance(result, GeneratorType) else result


class _Rewriter(ast.NodeTransformer):
    """Makes generators of functions, since a call may have steps, and rewrites what has another meaning in Python than in Gluon.

    That is `x += y` of tensors, the division of negative integers, and `x.type`, which is `x` itself here. Calls whose results are assigned
    pass the name of the variable on to shared memory.
    """

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        return ast.YieldFrom(ast.Call(ast.Name("_steps", ast.Load()), [node.func, *node.args], node.keywords))

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        function = {ast.FloorDiv: "_divide", ast.Mod: "_remainder"}.get(type(node.op))
        return ast.Call(ast.Name(function, ast.Load()), [node.left, node.right], []) if function else node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        assert isinstance(node.target, ast.Name)
        value = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
        return ast.Assign([node.target], self.visit(value))

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        return node.value if node.attr == "type" else node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        node.value = self._named(node.targets[0], node.value)
        return node

    def _named(self, target: ast.expr, value: ast.expr) -> ast.expr:
        if isinstance(target, ast.Name) and isinstance(value, ast.YieldFrom):
            return ast.Call(ast.Name("_named", ast.Load()), [value, ast.Constant(target.id)], [])
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            value.elts = [self._named(*pair) for pair in zip(target.elts, value.elts, strict=True)]
        return value


def _named(value: Any, variable: str) -> Any:
    """The value; shared memory takes the name of its variable, for messages."""
    if hasattr(type(value), "assigned_to"):
        value.assigned_to(variable)
    return value


HELPERS = {"_steps": steps, "_divide": divide, "_remainder": remainder, "_named": _named}  # of rewritten functions


@functools.cache
def _source(function: FunctionType) -> tuple[str, int]:
    """The text of a function, and its first line in the file."""
    lines, first = inspect.getsourcelines(function)
    return textwrap.dedent("".join(lines)), first


@functools.cache
def _compiled(source: str, file: str, first: int) -> tuple[Any, set[str]]:
    """The definition of a function, rewritten, and the names in it."""
    tree = ast.parse(source)
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    tree = ast.fix_missing_locations(ast.increment_lineno(_Rewriter().visit(tree), first - 1))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return compile(tree, file, "exec", dont_inherit=True), names


class Translator:
    """Turns jitted functions into Python functions.

    Args:
        modules: What takes the place of Gluon's modules, by the last part of their names; `"language"` takes that of all others.
        edits: Replacements of text in the functions. `edited` counts them.
    """

    def __init__(self, modules: Mapping[str, Any], edits: Mapping[str, str]) -> None:
        self.modules, self.edits, self.edited = modules, edits, dict.fromkeys(edits, 0)
        self.functions = dict[FunctionType, Callable[..., Any]]()

    def function(self, function: FunctionType) -> Callable[..., Any]:
        if function not in self.functions:
            source, first = _source(function)
            for old, new in self.edits.items():
                self.edited[old] += source.count(old)
                source = source.replace(old, new)
            code, names = _compiled(source, function.__code__.co_filename, first)
            known = function.__globals__ | inspect.getclosurevars(function).nonlocals
            namespace = HELPERS | {name: self.value(known[name]) for name in names & known.keys()}
            exec(code, namespace, definitions := dict[str, Any]())
            self.functions[function] = definitions[function.__name__]
        return self.functions[function]

    def value(self, value: Any) -> Any:
        """The emulator's counterpart of a value that the kernel's module or its caller has."""
        if isinstance(value, language.constexpr):
            return self.value(value.value)
        if isinstance(value, language.dtype):
            return next(ours for name, ours in DTYPES.items() if getattr(language, name) == value)
        if isinstance(value, ModuleType) and value.__name__.startswith("triton."):
            return self._module(value.__name__)
        if (getattr(value, "__module__", None) or "").startswith("triton.") and hasattr(value, "__name__"):
            return getattr(self._module(value.__module__), value.__name__)
        return self.function(value.fn) if isinstance(value, JITFunction) else value

    def _module(self, name: str) -> Any:
        return self.modules.get(name.rpartition(".")[2], self.modules["language"])
