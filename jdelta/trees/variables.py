"""The variables that hold the leaves of deltas in flax.nnx."""

from __future__ import annotations

from typing import Any

from flax import nnx


class DeltaParam(nnx.LoRAParam[Any]):
    """A leaf of a delta."""
