"""Random generators of a run, one or one for each picture: their states, and a fresh one. The global one is never used."""

from __future__ import annotations

import torch
from torch import Tensor

Generators = torch.Generator | list[torch.Generator]


def states_of(generator: Generators) -> list[Tensor]:
    return [one.get_state() for one in (generator if isinstance(generator, list) else [generator])]


def set_states(generator: Generators, states: list[Tensor]) -> None:
    for one, state in zip(generator if isinstance(generator, list) else [generator], states, strict=True):
        one.set_state(state)


def fresh_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator
