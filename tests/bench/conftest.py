"""Fixtures of the tests of `bench.cascade`: models that are made once, and a look at what a test has left changed.

They import when they are used, for diffusers may be missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def benches() -> Any:
    """A `bench.cascade.rows.Bench` by the name of each small model."""
    from tests.bench.whole_pictures import small_benches

    return small_benches()


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    """What benchmarks replace for a while is in its place again."""
    from tests.bench.whole_pictures import REPLACED

    before = {(owner, name): getattr(owner, name) for owner, name in REPLACED}
    default = torch.get_default_dtype()
    yield
    assert {(owner, name): getattr(owner, name) for owner, name in REPLACED} == before
    assert torch.get_default_dtype() == default
