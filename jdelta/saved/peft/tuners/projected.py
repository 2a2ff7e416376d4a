"""Methods with random matrices that all modules share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdelta.saved.peft.tuners.tuner import Tuner


@dataclasses.dataclass(frozen=True)
class Projected(Tuner):
    """A method whose matrices, of the largest module's sizes, are in the file, or are drawn again from a seed."""

    def arguments(self, fields: Mapping[str, Any], hosts: Mapping[str, str]) -> dict[str, Any]:
        """Whether the matrices are saved, which is the default of PEFT's alone."""
        return {"save_projection": fields.get("save_projection", True)}

    def written_fields(self, config: Any, hosts: Mapping[str, str]) -> dict[str, Any]:
        """Whether the matrices are saved."""
        return {"save_projection": config.save_projection}

    def shared_leaves(
        self, tensors: Mapping[str, np.ndarray], config: Any, shapes: Sequence[tuple[int, int]]
    ) -> dict[str, np.ndarray]:
        """The matrices, or none where they are drawn again. PEFT's of a second adapter may be larger than needed."""
        if not config.save_projection:
            return {}
        if missing := sorted(self.shared[leaf] for leaf in self.shared.keys() - tensors.keys()):
            raise ValueError(f"save_projection is true, and the file lacks {' and '.join(missing)}.")
        d_in, d_out = (max(sizes) for sizes in zip(*shapes, strict=True))
        found = {}
        for leaf, size in self.sizes(config, d_in, d_out).items():
            value = tensors[leaf]
            whole = value.shape if value.ndim == len(size) else ()
            if not whole or any(have < need for have, need in zip(whole, size, strict=True)):
                raise ValueError(f"{self.shared[leaf]} has shape {value.shape}, and the modules need {size}.")
            found[leaf] = value[tuple(map(slice, size))]
        return {leaf: self.from_torch(leaf, value) for leaf, value in found.items()}

    def sizes(self, config: Any, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the matrices in the file, for modules of at most so many input and output features."""
        return {"a": (config.r, d_in), "b": (d_out, config.r)}

    def from_torch(self, leaf: str, tensor: np.ndarray) -> np.ndarray:
        """A matrix as it is here, from what the file has. They are transposed in PyTorch."""
        return tensor.T

    def written_shared(self, leaves: Mapping[str, np.ndarray], hosts: Sequence[str]) -> dict[str, np.ndarray]:
        """The matrices at the root."""
        return {self.shared[leaf]: value.T for leaf, value in leaves.items()}


@dataclasses.dataclass(frozen=True)
class RandLora(Projected):
    """RandLoRA, of which PEFT transposes nothing, and writes the matrices at the root and at each module."""

    def leaves(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The leaves at a module, from its tensors: the same."""
        return dict(tensors)

    def written(self, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors of a module, from its leaves: the same."""
        return dict(leaves)

    def sizes(self, config: Any, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the matrices in the file."""
        small, large = sorted((d_in, d_out))
        return {"a": (config.r, 1, small), "b": (large, -(-small // config.r), config.r)}

    def from_torch(self, leaf: str, tensor: np.ndarray) -> np.ndarray:
        """A matrix as it is here: `a` without the axis that all bases share."""
        return tensor[:, 0] if leaf == "a" else tensor

    def written_shared(self, leaves: Mapping[str, np.ndarray], hosts: Sequence[str]) -> dict[str, np.ndarray]:
        """The matrices at the root and at each module."""
        whole = {
            self.shared[leaf]: value[:, None] if leaf == "a" else value  # PEFT warns of each that is missing
            for leaf, value in leaves.items()
        }
        return whole | {f"model.{host}.{end}": value for host in hosts for end, value in whole.items()}
