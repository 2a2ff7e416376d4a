"""What trains and what is frozen, as masks over parameter trees and as optax wrappers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.core import meta

from jdelta.trees import addressing, dtypes, surgery
from jdelta.trees.surgery import Path, Tree

DELTAS = "deltas"  # in a list of patterns: all leaves of all attached deltas


def trained_paths(
    leaves: Mapping[Path, Any],
    exclude: Sequence[str],
    deltas: Collection[Path] = (),
    frozen: Collection[Path] = (),
    untrainable: Collection[Path] = (),
) -> set[Path]:
    """Returns the paths of what trains.

    Args:
      leaves: path to leaf of all parameters; shapes suffice.
      exclude: what is excluded from freezing: patterns of modules or leaves (everything below a match trains, so
        `["bias"]` is BitFit), and the word `"deltas"`.
      deltas: paths of the leaves that the word means.
      frozen: paths of leaves that never train.
      untrainable: paths of leaves whose dtype cannot be trained, besides those whose dtype in `leaves` says so.

    Raises:
      TypeError: `exclude` is a bare string.
      ValueError: an invalid regex, or a pattern that matches nothing, or nothing that can train.
    """
    names = {path: surgery.name_of(path) for path in leaves}
    untrainable = {path for path in names if path in untrainable or dtypes.is_fixed(leaves[path])}
    chosen: set[Path] = set()
    patterns = addressing.checked(exclude)
    if DELTAS in patterns:
        chosen.update(path for path in names if path in deltas)
    for pattern in patterns:
        if pattern == DELTAS:
            continue
        hits = [path for path, name in names.items() if addressing.matches_at_or_above(name, pattern)]
        if not hits:
            above = [name.rpartition(".")[0] for name in names.values()]
            raise ValueError(addressing.nothing_matches(pattern, [*filter(None, above), *names.values()]))
        if untrainable.issuperset(hits):
            raise ValueError(
                f"{pattern!r} means {names[hits[0]]!r}, which holds {_dtype(leaves[hits[0]])}. Only floats of 16 bits "
                "and more train."
            )
        chosen.update(hits)
    return chosen - untrainable - {*frozen}


def mask_of(params: Tree, trained: Collection[Path]) -> Tree:
    """A tree of bools like `params`, `True` at these paths, which are without the collection's name.

    Of an `nnx.State` it is one too, of bools without variables, so that optax takes it for a state with variables or
    without, as `nnx.Optimizer` makes them.
    """
    start, empty = surgery.root(params), surgery.empty_node
    marked = {(*start, *path) for path in trained}
    flags = {path: leaf if leaf is empty else path in marked for path, leaf in surgery.flatten(params).items()}
    return surgery.unflatten(flags, like=params, variables=False)


def passed_over(params: Tree, exclude: Sequence[str]) -> list[str]:
    """The names of leaves that patterns mean, and that do not train since their dtype cannot be trained."""
    start = surgery.root(params)
    names = [
        surgery.name_of(path[len(start) :])
        for path, leaf in surgery.flatten(params).items()
        if path[: len(start)] == start and leaf is not surgery.empty_node and dtypes.is_fixed(leaf)
    ]
    return [name for name in names if any(addressing.matches_at_or_above(name, pattern) for pattern in exclude)]


def freeze_except(
    tx: optax.GradientTransformation | optax.MultiSteps, mask: Tree | Callable[[Tree], Tree]
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for the whole tree that moves only what the mask marks, and keeps state only for that.

    Frozen leaves do not change by one bit, whatever `tx` does (weight decay, say): their update is -0.0, the number
    that leaves every float as it is under addition. optax's own `set_to_zero` gives +0.0, which turns -0.0 into 0.0.
    A state that was made for other leaves is a `RuntimeError`.

    Args:
      tx: the optimizer of the trainable leaves, or anything that has its `init` and `update`.
      mask: a tree of bools, as `mask_of` gives it, or a function from a tree to such a tree.
    """

    def labels(tree: Tree) -> Tree:
        return jax.tree.map(lambda trains: "train" if trains else "freeze", mask(tree) if callable(mask) else mask)

    own: Any = tx  # `MultiSteps` too
    inner = optax.multi_transform({"train": own, "freeze": optax.stateless(_no_update)}, labels)

    def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, Any]:
        try:
            return inner.update(updates, state, params, **extra)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            fitting = jax.eval_shape(inner.init, updates if params is None else params)
            if jax.tree.structure(fitting) == jax.tree.structure(state):  # type: ignore[operator]
                raise
            raise RuntimeError(
                "this optimizer's state was made for other leaves than those that train now. Make it anew: "
                "state = tx.init(params)."
            ) from error

    return optax.GradientTransformationExtraArgs(inner.init, update)


def multiplied(
    tx: optax.GradientTransformationExtraArgs, factors: Mapping[Path, float]
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose updates of some leaves, by path, are multiplied."""

    def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, Any]:
        new, state = tx.update(updates, state, params, **extra)
        for factor in {*factors.values()}:
            mask = mask_of(new, [path for path, own in factors.items() if own == factor])
            new = jax.tree.map(lambda is_own, u, by=factor: _times(u, by) if is_own else u, mask, new)
        return new, state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _times(update: Any, factor: float) -> Any:
    """An update, an array or a variable of nnx, multiplied."""
    return jax.tree.map(lambda u: u * factor, update)


def _no_update(updates: Any, params: Any = None) -> Any:
    del params
    # Of leaves that are no floats, `jax.grad(…, allow_int=True)` gives gradients of a dtype that nothing adds to.
    return jax.tree.map(
        lambda u: jnp.zeros(u.shape, bool) if u.dtype == jax.dtypes.float0 else jnp.full_like(u, -0.0), updates
    )


def _dtype(leaf: Any) -> str:
    return str(getattr(meta.unbox(leaf), "dtype", "no floats"))
