"""What trains, as a filter of flax.nnx."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jdelta.trees.surgery import Path


@dataclasses.dataclass(frozen=True)
class Trained:
    """A filter of `nnx.state`, `nnx.DiffState` and `nnx.Optimizer` that is true at some paths.

    Equal filters are equal and have one hash, so nothing compiles twice.

        filter = Trained(frozenset({("layers", "0", "q_proj", "lora", "a")}))
        state = nnx.state(model, filter)

    Attributes:
      paths: as jdelta writes them, with the numbers of an `nnx.List` as strings.
    """

    paths: frozenset[Path]

    def __call__(self, path: Sequence[Any], value: Any) -> bool:
        """Whether the variable at this path of flax's is one of them."""
        return tuple(map(str, path)) in self.paths

    def __repr__(self) -> str:
        return f"Trained(<{len(self.paths)} paths>)"
