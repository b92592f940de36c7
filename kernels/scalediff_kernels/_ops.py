"""The namespace of the torch operators. `bench.hub` replaces this file, so that its builds can be loaded beside this package."""

import torch

NAMESPACE = "scalediff"
ops = torch.ops.scalediff


def add_op_namespace_prefix(name: str) -> str:
    """The full name of an operator."""
    return f"{NAMESPACE}::{name}"
