"""How a delta starts from data: what is summed over the batches, and what its leaves are by the sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax

from jdelta.core.edits import Edit
from jdelta.core.structure import Structure

Sums = Mapping[str, jax.Array]


class DataStart:
    """What `Method.data_start` gives: a frozen dataclass, whose equals share a trace.

        @dataclasses.dataclass(frozen=True)
        class MeanStart(jdelta.DataStart):
            sums = "inputs"

            def of_inputs(self, x):
                return {"total": jnp.sum(x, axis=0, keepdims=True)}

            def init(self, edit, key, weight, own, sums):
                return {"s": sums["total"][0] / sums["count"]}

    Attributes:
      sums: of what: `"inputs"`, what `of_inputs` makes of what goes into the modules; `"gradients"`, of the loss by the
        weights.
    """

    sums: ClassVar[Literal["inputs", "gradients"]]

    def check(self, edit: Edit) -> None:
        """Raises `TypeError` or `ValueError` if the leaves of an edit cannot start so. No batch has been read yet.

        Args:
          edit: the edit.
        """

    def of_inputs(self, x: jax.Array) -> Sums:
        """What is summed over all calls of a module.

        Args:
          x: `(n, d_in)`, float32: the inputs in one call, zeros in place of those that are masked.

        Returns:
          Name to array of two axes or more.
        """
        return {}

    def adapted(self, method: Any, structure: Structure, found: Mapping[Edit, Sums]) -> Any:
        """The method with arguments that follow from the sums, such as ranks.

        Args:
          method: the delta's.
          structure: the modules of the backbone.
          found: each edit to its sums, as they are stored.
        """
        return method

    def init(self, edit: Edit, key: jax.Array, weight: Any, own: Sums, sums: Sums) -> Sums:
        """The initial values of an edit's own leaves.

        Args:
          edit: the edit. Of a weight's, its `rule` counts, and not its place.
          key: of random numbers.
          weight: `(d_in, d_out)`, float32; `None` for an edit of a call.
          own: name of each leaf to the value that it has.
          sums: what was summed, and the number of inputs, `count`; or the mean `gradient`, `(d_in, d_out)`.
        """
        raise NotImplementedError
