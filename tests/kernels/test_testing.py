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


# Every statement is run by a process of its own, forked before torch has had a device context or compiled anything.
PROGRAM = """
import os, torch
from scalediff_kernels.testing import poisoned_memory
for inside in {statements}:
    child = os.fork()
    if child == 0:
        with poisoned_memory(), torch.device("meta"):
            exec(inside)
        with torch.device("meta"):
            assert torch.empty(1).device.type == "meta", f"allocated for real after {{inside}}"
        assert not torch.empty(1000).isnan().all()
        break
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
def test_torch_is_as_before() -> None:
    """A process whose first device context, or first compiled function, is within: afterwards, devices are kept."""
    statements = ["torch.zeros(1)", "torch.compile(lambda x: x + 1, backend='eager')(torch.zeros(1))"]
    program = PROGRAM.format(statements=statements)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
