"""How PEFT, which calls a method a tuner, names and stores one that changes weights of modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdelta.core.edits import WeightEdit
from jdelta.core.linear_maps import EinsumMap, LinearMap, MatrixMap
from jdelta.core.method import Method

# Of the patterns that both have, the field whose value they replace.
REPLACED_BY = {"rank_pattern": "r", "alpha_pattern": "alpha", "lambda_pattern": "delora_lambda"}


@dataclasses.dataclass(frozen=True)
class Tuner:
    """A method of PEFT's. Most differ in their names alone; the others override the functions.

    Attributes:
      kind: PEFT's name of it, `peft_type`.
      method: its configuration here.
      tensors: leaf to the end of its key in PEFT's file: `{"a": "hira_A"}`, where that of module `m` is `m.hira_A`.
      shared: likewise, leaves at the root, which all modules share: with `{"a": "vera_A"}` the key is
        `base_model.vera_A`.
      fields: those of the configuration that both have, with the same name, values and meaning.
      patterns: likewise, those with patterns of modules, of `REPLACED_BY`.
      read_fields: PEFT's that `arguments` reads, and `written_fields` writes.
      other_fields: PEFT's that change nothing once the values are there.
      linear: the ways in which a module may be linear; others are an error, both ways.
      conv1d: whether it goes at transformers' Conv1D too: it has a field `fan_in_fan_out`.
      biases: its value of `bias` for those of its modules alone, `"hra_only"`; empty if it has no such field.
    """

    kind: str
    method: type[Method]
    tensors: Mapping[str, str]
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    read_fields: tuple[str, ...] = ()
    other_fields: tuple[str, ...] = ()
    linear: tuple[type[LinearMap], ...] = (MatrixMap, EinsumMap)
    conv1d: bool = False
    biases: str = ""

    # --- from PEFT

    def arguments(self, fields: Mapping[str, Any], hosts: Mapping[str, str]) -> dict[str, Any]:
        """Arguments of the method besides those that both have.

        Args:
          fields: PEFT's configuration.
          hosts: PyTorch's name of each module with tensors to its pattern here.
        """
        return {}

    def leaves(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The leaves at a module, from its tensors by the names of leaves. Matrices are transposed in PyTorch."""
        return {leaf: tensor.T if tensor.ndim == 2 else tensor for leaf, tensor in tensors.items()}

    def leaves_at(self, edit: WeightEdit, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As `leaves`, of a method whose layout depends on the module, and its rule. Override either."""
        return self.leaves(tensors)

    def require_fit(self, leaves: Mapping[str, np.ndarray], d_in: int, d_out: int) -> None:
        """Raises `ValueError` where leaves cannot be exchanged, either way, at a module of these widths."""

    def shared_leaves(
        self, tensors: Mapping[str, np.ndarray], config: Any, shapes: Sequence[tuple[int, int]]
    ) -> dict[str, np.ndarray]:
        """The leaves at the root, from the tensors there by the names of leaves.

        Args:
          tensors: those of `shared` that the file holds.
          config: of the method.
          shapes: `(d_in, d_out)` of the modules.

        Raises:
          ValueError: some are missing, or do not fit the modules.
        """
        return {}

    # --- to PEFT

    def written_fields(self, config: Any, hosts: Mapping[str, str]) -> dict[str, Any]:
        """Fields of PEFT's besides those that both have.

        Args:
          config: of the method.
          hosts: PyTorch's name of each module to the one here.

        Raises:
          ValueError: PEFT has no such option.
        """
        return {}

    def written(self, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors of a module by the names of leaves, from the leaves as the rule sees them."""
        return {leaf: value.T if value.ndim == 2 else value for leaf, value in leaves.items()}

    def written_at(self, edit: WeightEdit, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As `written`, of a method whose layout depends on the module, and its rule. Override either."""
        return self.written(leaves)

    def fields_at(self, rules: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of PEFT's that follow from the rules of the modules.

        Args:
          rules: those, by PyTorch's names of the modules.

        Raises:
          ValueError: PEFT has no such option.
        """
        return {}

    def written_shared(self, leaves: Mapping[str, np.ndarray], hosts: Sequence[str]) -> dict[str, np.ndarray]:
        """The tensors that all modules share, by the ends of their keys after `base_model.`.

        Args:
          leaves: those at the root that are saved.
          hosts: PyTorch's names of the modules.
        """
        return {}
