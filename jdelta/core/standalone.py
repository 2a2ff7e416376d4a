"""A module by itself, whatever module system it is of: how it is tried outside its model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

FLAGS = ("deterministic", "train", "training", "is_training")  # what says whether this is training


class Shapes(NamedTuple):
    """What a module needs, and what it returns.

    Attributes:
      own: its own parameters, by name.
      rest: parameters of modules inside it, and all else that it holds: a tree of arrays.
      output: what its call returns.
    """

    own: Mapping[str, Any]
    rest: Any
    output: Any


class Mode(NamedTuple):
    """A module in training, or not.

    Attributes:
      module: in this mode.
      fields: which of its fields, or of modules inside it, say so.
      arguments: which arguments of its call have to say so.
    """

    module: Standalone
    fields: Mapping[str, bool]
    arguments: Mapping[str, bool]


class Standalone(Protocol):
    """A module as a pure function. It holds no arrays."""

    @property
    def key(self) -> Hashable:
        """What tells it from others of its class with the same fields, and parameters of the same shapes."""
        ...

    def shapes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Shapes:
        """What it needs and returns in a call with these arguments, of which arrays may be shapes."""
        ...

    def run(
        self, own: Mapping[str, Any], rest: Any, args: Sequence[Any], kwargs: Mapping[str, Any], key: jax.Array
    ) -> Any:
        """What its call returns.

        Args:
          own, rest: arrays, as in `Shapes`.
          args, kwargs: of the call.
          key: for whatever is random in it.
        """
        ...

    def is_complete(self, own: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether it runs on its own parameters alone, and a run changes and adds nothing that it holds."""
        ...

    def modes(self, arguments: Collection[str]) -> list[Mode]:
        """It in training and not, if something says which of them it is.

        Args:
          arguments: the names of what its call takes.
        """
        ...

    def in_float32(self) -> Standalone:
        """The same, which computes in float32 where its fields say in which floats it computes."""
        ...

    def resized(self, resize: Callable[[Any], Any]) -> Standalone:
        """The same with other sizes, wherever it says how large it is.

        Args:
          resize: gives a field, or a shape, with other sizes.
        """
        ...
