"""Initial values of the leaves of layers, which a run of the model shows.

A layer's leaves are known once the layer has run: their shapes can depend on what it is given. But a run may be inside
a scan, where values cannot leave. So the run is abstract; what it keeps of each layer is the program that makes its
leaves from a key, from which everything else was removed.
"""

from __future__ import annotations

import contextlib
import contextvars
import zlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax.core import meta
from jax.interpreters import partial_eval

from jdelta.trees import surgery
from jdelta.trees.surgery import Path, Tree

Initialiser = Callable[[jax.Array], Tree]  # from a key

Place = tuple[Path, Path]  # a module, and where the leaves of a layer are below it
_creation: contextvars.ContextVar[dict[Place, Initialiser] | None] = contextvars.ContextVar("creation", default=None)


@contextlib.contextmanager
def creating() -> Iterator[dict[Place, Initialiser]]:
    """While this lasts, layers that have no leaves yet get zeros, and their initialisers are noted."""
    found: dict[Place, Initialiser] = {}
    token = _creation.set(found)
    try:
        yield found
    finally:
        _creation.reset(token)


def is_creating() -> bool:
    """Whether leaves are being made."""
    return _creation.get() is not None


def noted(place: Place, initialise: Initialiser) -> Tree:
    """Notes how the leaves at a place are made, and gives zeros for them.

    Raises:
      ValueError: their values depend on what the model computes.
    """
    found = _creation.get()
    assert found is not None
    if place not in found:
        found[place] = _alone(place, initialise)
    shapes = jax.eval_shape(found[place], jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _alone(place: Place, initialise: Initialiser) -> Initialiser:
    """The function without all that its result does not depend on."""
    plain: Initialiser = lambda key: meta.unbox(initialise(key))  # noqa: E731
    closed, shapes = jax.make_jaxpr(plain, return_shape=True)(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(shapes)
    # jax has no public name for what removes from a program what no output needs.
    jaxpr, used_consts, used = partial_eval.dce_jaxpr_consts(closed.jaxpr, [True] * len(leaves))
    consts = [const for const, is_used in zip(closed.consts, used_consts, strict=True) if is_used]
    if any(isinstance(const, jax.core.Tracer) for const in consts):
        raise ValueError(
            f"the initial values of the layer at {surgery.name_of(place[0])!r} depend on what the model computes; they "
            "may depend on shapes alone."
        )

    def run(key: jax.Array) -> Tree:
        given = [key for is_used in used if is_used]
        return jax.tree.unflatten(treedef, jax.core.eval_jaxpr(jaxpr, consts, *given))

    return run


def key_at(rng: jax.Array, path: Path) -> jax.Array:
    """A key for what is at a path."""
    return jax.random.fold_in(rng, zlib.crc32(surgery.name_of(path).encode()) % 2**31)


def over_layers(initialise: Initialiser, axes: Sequence[int], sizes: Sequence[int]) -> Initialiser:
    """The initialiser of leaves that have axes of layers besides."""

    def over(one: Initialiser, axis: int, size: int) -> Initialiser:
        return lambda key: jax.vmap(one, out_axes=axis)(jax.random.split(key, size))

    for axis, size in zip(axes, sizes, strict=True):
        initialise = over(initialise, axis, size)
    return initialise
