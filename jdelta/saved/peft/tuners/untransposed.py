"""Methods whose tensors PEFT stores as the rules have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from jdelta.saved.peft.tuners.tuner import Tuner


@dataclasses.dataclass(frozen=True)
class Untransposed(Tuner):
    """A method whose matrices PEFT does not transpose."""

    def leaves(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The leaves at a module, from its tensors: the same."""
        return dict(tensors)

    def written(self, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors of a module, from its leaves: the same."""
        return dict(leaves)
