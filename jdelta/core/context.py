"""What layers and rules are told of the call that they run in."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

_step: contextvars.ContextVar[Any] = contextvars.ContextVar("step", default=None)


@dataclasses.dataclass(frozen=True)
class Context:
    """What is known of a call, for a layer whose `__call__` has an argument `context`, or a rule that `uses_context`.

        class Gated(nn.Module):
            @nn.compact
            def __call__(self, y, context):
                return y if context.mask is None else y * context.mask[..., None]

    Attributes:
      deterministic: whether dropout is off, as the nearest enclosing call said it.
      mask: the attention mask, `(batch, seq)`, of the nearest enclosing call that has one, in the same body of a lifted
        transformation; `None` where none is known.
      positions: the position ids, `(batch, seq)`, likewise.
      step: the step of training, as `jdelta.training_step` says it.
    """

    deterministic: bool = True
    mask: jax.Array | None = None
    positions: jax.Array | None = None
    step: Any = None


jax.tree_util.register_dataclass(Context, ["mask", "positions", "step"], ["deterministic"])


@contextlib.contextmanager
def training_step(step: int | jax.Array) -> Iterator[None]:
    """While this lasts, layers and rules that ask for a `Context` are told the step of training.

        @jax.jit
        def loss(params, step):
            with jdelta.training_step(step):
                return model(ids, params=params).logits.sum()

    Args:
      step: a number, or an array of one that a jitted function takes.
    """
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def current_step() -> Any:
    """The step of training, if it was said."""
    return _step.get()
