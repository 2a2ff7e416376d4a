"""Initial values from a batch of data: what goes into the modules that a delta is on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from jdelta.core.arguments import main_input
from jdelta.core.edits import Attachment, CallEdit
from jdelta.core.method import Method
from jdelta.core.state import DeltaState
from jdelta.trees import surgery
from jdelta.trees.surgery import Tree

_NAME = "inputs.of"  # no delta has a dot in its name


class _Sink:
    """Where inputs are noted. It is equal to itself alone, so that no trace with it is shared."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[jax.Array]] = {}


class _Note(nn.Module):
    """Notes the input of a module.

    Attributes:
      module: its name.
      sink: where.
    """

    module: str
    sink: Any

    @nn.nowrap
    def __call__(self, host: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        x = main_input(host.module_type, args, kwargs)[1]
        if isinstance(x, jax.core.Tracer):
            raise ValueError(
                f"init_from_batch: the input of {self.module!r} has no value while the model runs, since the module is "
                "inside a transformation such as nn.scan or jax.jit. Run the model without it."
            )
        self.sink.inputs.setdefault(self.module, []).append(x)
        return host(*args, **kwargs)


def init_from_batch(state: DeltaState, *args: Any, **kwargs: Any) -> Tree:
    """Initialises the delta's own leaves from a batch, for a method that starts from its modules' inputs.

        delta.init_from_batch(**batch)  # as the model is called

    Args:
      *args, **kwargs: of one call of the model. Parameters are those of the call, `params=…`, or the model's.

    Returns:
      The tree with the new values. Without `params`, it is also put into `model.params`.

    Raises:
      RuntimeError: the delta is detached.
      ValueError: the method does not start from data, or the modules are inside a transformation.
    """
    own, host = state.active("initialised"), state.host
    if type(state.method).init_from_inputs is Method.init_from_inputs:
        raise ValueError(f"{state.label} does not start from data: its method has no init_from_inputs.")
    paths = {edit.host for edit in own.edits if isinstance(edit, CallEdit) or edit.in_call}
    sink, edits = _Sink(), []
    for info in state.structure:
        if info.path in paths:
            edits.append(CallEdit(info.path, "around", _Note(info.name, sink)))
    restore = host.snapshot()
    try:
        host.install([*host.attachments, Attachment(_NAME, tuple(edits))])
        state.backbone_model(*args, **kwargs)
    finally:
        restore()
    given = kwargs.get("params")
    tree = state.values(given)
    leaves = {path: meta.unbox(leaf) for path, leaf in surgery.parameters_of(tree).items()}
    mine = {path: leaves[path] for path in own.leaves}
    inputs = {name: jnp.concatenate(found) for name, found in sink.inputs.items()}
    started = state.method.init_from_inputs(mine, leaves, inputs)
    start = surgery.root(tree)
    new = surgery.replaced(tree, {(*start, *path): value for path, value in started.items()})
    if given is None:
        host.params = new
    return new
