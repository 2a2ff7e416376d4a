"""Initial values of a delta's own leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import chex
import jax

from jdelta.core import weights
from jdelta.core.edits import Attachment
from jdelta.core.method import Method
from jdelta.core.random_keys import as_key
from jdelta.core.rules import starts_from_weight
from jdelta.core.state import DeltaState
from jdelta.trees import states, surgery
from jdelta.trees.surgery import Path, Tree


def init(state: DeltaState, rng: int | chex.PRNGKey, params: Tree | None = None) -> Tree:
    """Fresh values of the delta's own leaves, as a tree to be grafted into the backbone's.

        params = jdelta.graft(params, jax.jit(delta.init)(jax.random.key(0)))

    It can be jitted, with `out_shardings` too; the compiled program holds nothing of the backbone's.

    Args:
      rng: seed or key, as in the constructor.
      params: the backbone's tree, for a method that starts from its values; by default `model.params`.

    Returns:
      A dict; or an `nnx.State`, if `params` is one.

    Raises:
      ValueError: the method starts from the backbone's values, and there are none.
    """
    own = dataclasses.replace(state.attachment, active=True)
    attachments = [own if a.name == own.name else a for a in state.host.attachments]
    params = state.host.params if params is None else params
    leaves = _from_backbone(state, _fresh(state, attachments, own.leaves, params, as_key(rng)), params)
    return surgery.unflatten(surgery.flatten(leaves), like=params) if states.is_state(params) else leaves


def initial_values(state: DeltaState, draft: Sequence[Attachment], paths: Sequence[Path], params: Tree) -> Tree:
    """Values of new leaves; shapes, where the backbone's own are."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        return jax.eval_shape(lambda rng, params: _fresh(state, draft, paths, params, rng), state.rng, params)
    return _from_backbone(state, _fresh(state, draft, paths, params, state.rng, jitted=True), params)


def _fresh(
    state: DeltaState,
    attachments: Sequence[Attachment],
    paths: Sequence[Path],
    params: Tree | None,
    rng: chex.PRNGKey,
    jitted: bool = False,
) -> Tree:
    """Fresh values of some of the delta's own leaves: of rules at their weights, of layers by a run of the model."""
    own = next(a for a in attachments if a.name == state.name)
    held = surgery.parameters_of(state.host.tree() if params is None else params)
    values: dict[Path, Any] = {}
    for edit in own.weight_edits:
        if not edit.is_bias:
            leaf = held.get(edit.leaf) if starts_from_weight(edit.rule) else state.structure.leaves[edit.leaf]
            if leaf is None:
                raise ValueError(f"init: the tree lacks {surgery.name_of(edit.leaf)!r}, from which the delta starts.")
            made = weights.init(edit, rng, leaf)
            values |= {(*edit.own_path, name): value for name, value in made.items()}
    rest = [path for path in paths if path not in values]
    if own.generator is not None and all(path[0] == state.name for path in rest):
        init = jax.jit(own.generator.init) if jitted else own.generator.init
        values |= {(state.name, *path): v for path, v in surgery.flatten(init(rng)["params"]).items()}
    elif rest:
        run: Any = lambda rng: surgery.select(state.host.init(attachments, rng), rest)  # noqa: E731
        values |= surgery.parameters_of((jax.jit(run) if jitted else run)(rng))
    start = surgery.root(state.host.tree())
    return surgery.unflatten({(*start, *path): values[path] for path in paths})


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
