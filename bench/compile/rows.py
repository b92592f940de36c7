"""Rows of `python -m bench.compile`, in a module that its worker processes can import."""

from __future__ import annotations

from typing import Any

import triton

from bench.compile import attention, lowpass
from bench.compile.binary import compile_launch

KERNELS: dict[str, Any] = {"attention": attention, "lowpass": lowpass}


def rows_of(kernels: str, target: str) -> list[dict[str, Any]]:
    """Every kernel, compiled for one target."""
    return [row(case, target) for case in KERNELS[kernels].cases(target)]


def row(case: Any, target: str) -> dict[str, Any]:
    """One binary; a compiler that fails is a result as well."""
    launch = case.launch(target)
    facts: dict[str, Any] = {"triton": triton.__version__, "target": target} | case.facts(launch)
    try:
        binary = compile_launch(launch, target)
    except Exception as error:
        return facts | {"registers": "", "spills": "", "shared": "", "faults": f"does not compile: {str(error).splitlines()[0][:80]}"}
    faults = case.faults(target, launch, binary)
    if launch.then is not None and (after := compile_launch(launch.then, target)).spills:
        faults.append(f"{after.spills} spills in the kernel after it")
    return facts | {"registers": binary.registers, "spills": binary.spills, "shared": binary.shared, "faults": "; ".join(faults)}
