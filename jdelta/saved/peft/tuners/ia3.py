"""IA3, whose vectors PEFT stores as rows where they scale the input, and as columns where they scale the output.

Those of convolutions are as wide as the channels, with an axis of size 1 for each of the window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jdelta.core.config import shown
from jdelta.core.edits import WeightEdit
from jdelta.core.linear_maps import ConvMap
from jdelta.methods.ia3 import IA3ChannelRule, IA3Rule
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

    def leaves_at(self, edit: WeightEdit, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The vector.

        Args:
          edit: of the module.
          tensors: those of the module by the names of leaves.

        Raises:
          ValueError: its shape is another one, as that of the other side.
        """
        tensor = tensors["l"]
        if tensor.shape != (shape := _shape(edit)):
            raise ValueError(f"ia3_l has shape {tensor.shape}, and by {FIELD} and the module's widths it has {shape}.")
        return {"l": tensor.reshape(-1)}

    def written_at(self, edit: WeightEdit, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The vector in PEFT's shape.

        Args:
          edit: of the module.
          leaves: those of the module, as the rule sees them.
        """
        return {"l": leaves["l"].reshape(_shape(edit))}

    def fields_at(self, rules: Mapping[str, Any]) -> dict[str, Any]:
        """The modules whose input is scaled, by their names.

        Args:
          rules: those of the modules, by PyTorch's names.

        Raises:
          ValueError: the name of another module ends with one of them.
        """
        chosen = [name for name, rule in rules.items() if _scales_input(rule)]
        for name, rule in rules.items():
            if not _scales_input(rule) and name.endswith(tuple(chosen)):
                raise ValueError(f"{FIELD}: PEFT takes ends of names, and would scale the input of {name!r} too.")
        return {FIELD: chosen}


def _scales_input(rule: IA3Rule | IA3ChannelRule) -> bool:
    return isinstance(rule, IA3ChannelRule) or rule.side == "in"


def _shape(edit: WeightEdit) -> tuple[int, ...]:
    """The shape that the vector has in PEFT. Raises `ValueError` for a convolution that PEFT has no IA3 of."""
    d_in, d_out = edit.linear.layout(edit.shape).matrix_shape(edit.shape)
    if not isinstance(edit.linear, ConvMap):
        return (1, d_in) if _scales_input(edit.rule) else (d_out, 1)
    window = (1,) * (len(edit.shape) - 2)
    if len(window) not in (2, 3):
        raise ValueError(f"PEFT's IA3 goes at convolutions over two or three axes; this one is over {len(window)}.")
    return (1, edit.rule.channels if _scales_input(edit.rule) else d_out, *window)
