"""Initial values of a delta's own leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import chex
import jax

from jdelta.core.edits import Attachment
from jdelta.core.method import Method
from jdelta.core.random_keys import as_key
from jdelta.core.state import DeltaState
from jdelta.trees import surgery
from jdelta.trees.surgery import Path, Tree


def init(state: DeltaState, rng: int | chex.PRNGKey, params: Tree | None = None) -> Tree:
    """Fresh values of the delta's own leaves, as a tree to be grafted into the backbone's.

        params = jdelta.graft(params, jax.jit(delta.init)(jax.random.key(0)))

    It can be jitted, with `out_shardings` too; the compiled program holds nothing of the backbone's.

    Args:
      rng: seed or key, as in the constructor.
      params: the backbone's tree, for a method that starts from its values; by default `model.params`.

    Raises:
      ValueError: the method starts from the backbone's values, and there are none.
    """
    own = dataclasses.replace(state.attachment, active=True)
    attachments = [own if a.name == own.name else a for a in state.host.attachments]
    leaves = surgery.select(state.host.init(attachments, as_key(rng)), own.leaves)
    return _from_backbone(state, leaves, state.host.params if params is None else params)


def initial_values(state: DeltaState, draft: Sequence[Attachment], paths: Sequence[Path], params: Tree) -> Tree:
    """Values of new leaves; shapes, where the backbone's own are."""

    def new(rng: chex.PRNGKey) -> Tree:
        return surgery.select(state.host.init(draft, rng), paths)

    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        return jax.eval_shape(new, state.rng)
    return _from_backbone(state, jax.jit(new)(state.rng), params)


def _from_backbone(state: DeltaState, own: Tree, params: Tree | None) -> Tree:
    """The delta's own leaves after `Method.init_from_backbone`."""
    if type(state.method).init_from_backbone is Method.init_from_backbone:
        return own
    surgery.require_alive(params)
    leaves = surgery.flatten(surgery.parameters(own))
    values = surgery.flatten(surgery.parameters(params)) if params is not None else {}
    if not values or any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in values.values()):
        raise ValueError(
            f"{state.label} starts from the backbone's values, and the model holds shapes only. Pass them: "
            "delta.init(rng, params)."
        )
    begin = surgery.root(own)
    started = state.method.init_from_backbone(leaves, values)
    return surgery.unflatten({(*begin, *path): leaf for path, leaf in started.items()}, like=own)
