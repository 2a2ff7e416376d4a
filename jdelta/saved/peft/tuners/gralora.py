"""How PEFT stores GraLoRA: blocks come first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from jdelta.saved.peft.tuners.tuner import Tuner


@dataclasses.dataclass(frozen=True)
class GraLoraTuner(Tuner):
    """GraLoRA, whose tensors are `(k, d_in / k, r)`, `(k, r, d_out / k)`, and those of a LoRA."""

    def leaves(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The leaves at a module, from its tensors."""
        found = super().leaves(tensors)
        if "a" in found and found["a"].ndim == 3:
            k, _, r = found["a"].shape
            found["a"] = found["a"].reshape(-1, k, r // k)
        if "b" in found and found["b"].ndim == 3:
            k, r, _ = found["b"].shape
            found["b"] = found["b"].transpose(1, 0, 2).reshape(k, r // k, -1)
        return found

    def written(self, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors of a module, from its leaves."""
        a, b = leaves["a"], leaves["b"]
        k, width = b.shape[:2]
        a = a.reshape(k, -1, k * width)
        b = b.reshape(k * width, k, -1).transpose(1, 0, 2)
        return {**super().written(leaves), "a": a, "b": b}
