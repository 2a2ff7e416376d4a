"""How PEFT stores SHiRA: values, and their places in the transposed weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from jdelta.saved.peft.tuners.tuner import Tuner


@dataclasses.dataclass(frozen=True)
class ShiraTuner(Tuner):
    """SHiRA, whose places are `(2, count)`: columns here, then rows."""

    def leaves(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The leaves at a module, from its tensors. On Windows, PEFT saves the places as floats."""
        return {
            leaf: np.flip(tensor, 0).astype(np.int32) if leaf == "indices" else tensor
            for leaf, tensor in tensors.items()
        }

    def require_fit(self, leaves: Mapping[str, np.ndarray], d_in: int, d_out: int) -> None:
        """Raises `ValueError` if places are missing, or outside the weight, where JAX would change nothing."""
        if "indices" not in leaves:
            raise ValueError("the file has shira_weight without shira_indices, the places that it belongs to.")
        places = leaves["indices"]
        if len(places) != 2 or not all(
            ((of >= 0) & (of < d)).all() for of, d in zip(places, (d_in, d_out), strict=True)
        ):
            raise ValueError(f"shira_indices has places outside a weight of {d_in} inputs and {d_out} outputs.")

    def written(self, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors of a module, from its leaves."""
        return {leaf: value[::-1] if leaf == "indices" else value for leaf, value in leaves.items()}
