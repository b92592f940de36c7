"""Rows of `python -m bench.compile`, in a module that its worker processes can import."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import triton

from bench.compile import attention, lowpass
from bench.compile.binary import compile_launch
from bench.harness.device import first_line

KERNELS = {"attention": attention, "lowpass": lowpass}


def rows_of(kernels: str, target: str) -> list[dict[str, Any]]:
    """A row for every case of some kernels, compiled for one target."""
    module = KERNELS[kernels]
    return [_row(case, module, target) for case in module.cases(target)]


def _row(case: Any, module: ModuleType, target: str) -> dict[str, Any]:
    """A compiler that fails is a result as well."""
    launch = case.launch(target)
    facts = {"triton": triton.__version__, "target": target} | {name: _cell(getattr(case, name)) for name in module.CASE}
    facts |= {name: _cell(getattr(launch.config, attribute)) for name, attribute in module.CONFIG.items()}
    try:
        binary = compile_launch(launch, target)
    except Exception as error:
        return facts | {"registers": "", "spills": "", "shared": "", "faults": f"does not compile: {first_line(error)[:80]}"}
    faults = case.faults(target, launch, binary)
    if launch.then is not None and (after := compile_launch(launch.then, target)).spills:
        faults.append(f"{after.spills} spills in the kernel after it")
    return facts | {"registers": binary.registers, "spills": binary.spills, "shared": binary.shared, "faults": "; ".join(faults)}


def _cell(value: Any) -> str:
    """Of a pair of numbers, a dtype, or anything else."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")
