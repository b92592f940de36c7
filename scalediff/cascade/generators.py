"""The random generators of a run, one in all or one per picture. This library never uses the global generator."""

from __future__ import annotations

import torch
from torch import Tensor

Generators = torch.Generator | list[torch.Generator]


def states_of(generator: Generators) -> list[Tensor]:
    """The state of every generator."""
    return [one.get_state() for one in (generator if isinstance(generator, list) else [generator])]


def set_states(generator: Generators, states: list[Tensor]) -> None:
    """Set the state of every generator."""
    for one, state in zip(generator if isinstance(generator, list) else [generator], states, strict=True):
        one.set_state(state)


def fresh_generator() -> torch.Generator:
    """A CPU generator with a random seed."""
    generator = torch.Generator()
    generator.seed()
    return generator
