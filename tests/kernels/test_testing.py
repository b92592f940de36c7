"""What tests share leaves torch as it was."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from scalediff_kernels.testing import poisoned_memory


def test_poisoned_memory_is_not_a_number() -> None:
    before = torch.empty, torch.empty_like
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(3)).isnan().all()
        assert torch.empty(3, dtype=torch.long).dtype == torch.long
    assert (torch.empty, torch.empty_like) == before


@pytest.mark.parametrize("inside", ["torch.zeros(1)", "torch.compile(lambda x: x + 1, backend='eager')(torch.zeros(1))"])
def test_torch_is_as_before(inside: str) -> None:
    """A process whose first device context, or first compiled function, is within: afterwards, devices are kept."""
    program = f"""
import torch
from scalediff_kernels.testing import poisoned_memory
with poisoned_memory(), torch.device("meta"):
    {inside}
with torch.device("meta"):
    assert torch.empty(1).device.type == "meta", "allocated for real"
assert not torch.empty(1000).isnan().all()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
