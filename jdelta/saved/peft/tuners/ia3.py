"""IA3, whose vectors PEFT stores as rows where they scale the input, and as columns where they scale the output."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jdelta.core.config import shown
from jdelta.methods.ia3 import IA3Rule
from jdelta.saved.peft.tuners.tuner import Tuner
from jdelta.trees import regexes

FIELD = "feedforward_modules"


@dataclasses.dataclass(frozen=True)
class IA3Tuner(Tuner):
    """IA3."""

    def arguments(self, fields: Mapping[str, Any], hosts: Mapping[str, str]) -> dict[str, Any]:
        """The modules whose input is scaled.

        PEFT means them by a regex, or by ends of names, before which there need not be a dot.

        Args:
          fields: PEFT's configuration.
          hosts: PyTorch's name of each module with tensors to its pattern here.

        Raises:
          TypeError: the field is neither.
        """
        asked = fields.get(FIELD)
        if isinstance(asked, str):
            regex = regexes.Regex(asked)
            chosen = [pattern for name, pattern in hosts.items() if regex.fullmatch(name)]
        elif isinstance(asked, list) and all(isinstance(end, str) for end in asked):
            chosen = [pattern for name, pattern in hosts.items() if name.endswith(tuple(asked))]
        else:
            raise TypeError(f"{FIELD} is a list of strings, or a string, got {shown(asked)}.")
        return {FIELD: tuple(chosen)}

    def leaves_at(self, rule: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The vector.

        Args:
          rule: of the module.
          tensors: those of the module by the names of leaves.

        Raises:
          ValueError: its shape is that of the other side.
        """
        tensor = tensors["l"]
        if tensor.shape != (shape := _shape(rule, tensor.size)):
            raise ValueError(f"ia3_l has shape {tensor.shape}, and by {FIELD} and the module's widths it has {shape}.")
        return {"l": tensor.reshape(-1)}

    def written_at(self, rule: Any, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The vector in PEFT's shape.

        Args:
          rule: of the module.
          leaves: those of the module, as the rule sees them.
        """
        return {"l": leaves["l"].reshape(_shape(rule, leaves["l"].size))}

    def require_fit(self, leaves: Mapping[str, np.ndarray], d_in: int, d_out: int) -> None:
        """Raises `ValueError` where the vector is as long as neither side; loading compares it with its own."""
        if (size := leaves["l"].size) not in (d_in, d_out):
            raise ValueError(f"ia3_l has {size} entries at a module of widths {d_in} and {d_out}.")

    def fields_at(self, rules: Mapping[str, Any]) -> dict[str, Any]:
        """The modules whose input is scaled, by their names.

        Args:
          rules: those of the modules, by PyTorch's names.

        Raises:
          ValueError: the name of another module ends with one of them.
        """
        chosen = [name for name, rule in rules.items() if rule.side == "in"]
        for name, rule in rules.items():
            if rule.side == "out" and name.endswith(tuple(chosen)):
                raise ValueError(f"{FIELD}: PEFT takes ends of names, and would scale the input of {name!r} too.")
        return {FIELD: chosen}


def _shape(rule: IA3Rule, size: int) -> tuple[int, int]:
    return (1, size) if rule.side == "in" else (size, 1)
