"""How the layers multiply: the same products, in the forms that cost least where the program runs.

The forms are chosen while a program is traced, from shapes. `benchmarks/lora_forms.py` measures them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from jax.custom_derivatives import SymbolicZero

Leaves = Mapping[str, jax.Array]


def on_cpu() -> bool:
    """Whether programs run on the CPU unless they are told otherwise."""
    return jax.default_backend() == "cpu"


def rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape to give the axes before those of a product.

    On a CPU one axis, since XLA is ten times slower there at the gradient of a product over several. Elsewhere they
    stay as they are: if a mesh splits the sequence, it cannot be joined with the batch without being gathered.
    """
    return (-1,) if on_cpu() else shape


def thin(x: jax.Array, weights: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """`x @ weights`, for weights `(d, r)` with few columns. It also stands for the `dot_general` of an `nn.Dense`.

    XLA:CPU takes five times as long for a gradient of `(d, r)` as for one of `(r, d)`, and would make the former of the
    latter but for the barrier.
    """
    if not on_cpu() or x.ndim != 2:
        return x @ weights
    weights = jax.lax.optimization_barrier(weights.T)
    return jax.lax.dot_general(x, weights, (((1,), (1,)), ((), ())))


def folding_is_cheaper(tokens: int, d_in: int, d_out: int) -> bool:
    """Whether `folded` takes fewer operations in a training step than the sum that it stands for, whatever the rank.

    The sum takes `3 · tokens · (d_in + d_out)` for each rank: two thin products forward, four backward. Folded, it is
    `2 · tokens · (d_in + d_out) + 2 · d_in · d_out`. It is so on the CPU alone, where that was measured to hold.
    """
    return on_cpu() and tokens * (d_in + d_out) >= 2 * d_in * d_out


class Pair(Protocol):
    """A linear module and an update of its weights; hashable, for what is traced for one serves its equals."""

    def run(self, x: jax.Array, weights: Leaves) -> jax.Array:
        """What the module computes, linear in `x` and in the weights."""

    def fold(self, weights: Leaves, own: Leaves) -> Leaves:
        """The weights with the update added."""

    def change(self, x: jax.Array, own: Leaves) -> jax.Array:
        """What the update adds to the module's output."""


@functools.partial(jax.jit, static_argnums=0)  # traced once for all layers that are alike
def folded(pair: Pair, x: jax.Array, weights: Leaves, own: Leaves) -> jax.Array:
    """`pair.run(x, weights) + pair.change(x, own)`, as `pair.run(x, pair.fold(weights, own))`: one product for three.

    The folded weights are made again for the gradient of `x`, so that they need not be kept; the gradients of `own` are
    those of `change`. One of the forms of RunLoRA (Cherniuk et al. 2023, arXiv 2312.03415). It can be differentiated in
    both modes and as often as one likes.

    Args:
      pair: the module and the update.
      x: the module's input.
      weights: the module's.
      own: the update's.
    """
    return _folded(pair, x, weights, own)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _folded(pair: Pair, x: jax.Array, weights: Leaves, own: Leaves) -> jax.Array:
    return pair.run(x, pair.fold(weights, own))


@functools.partial(_folded.defjvp, symbolic_zeros=True)
def _folded_jvp(pair: Pair, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, weights, own), (dx, dweights, down) = primals, tangents
    still = {key: value for key, value in weights.items() if isinstance(dweights[key], SymbolicZero)}
    moving = {key: value for key, value in weights.items() if key not in still}
    dy = jax.jvp(lambda own: pair.change(x, own), (own,), (jax.tree.map(_array, down),))[1]
    if moving:
        dmoving = {key: dweights[key] for key in moving}
        dy += jax.jvp(lambda w: pair.run(x, pair.fold({**still, **w}, own)), (moving,), (dmoving,))[1]
    if not isinstance(dx, SymbolicZero):
        again = jax.checkpoint(lambda x, dx, *of: jax.jvp(lambda x: pair.run(x, pair.fold(*of)), (x,), (dx,))[1])
        dy += again(x, dx, weights, own)
    return pair.run(x, pair.fold(weights, own)), dy  # a plain product, for `jax.checkpoint` policies to see


def _array(tangent: Any) -> Any:
    return jax.numpy.zeros(tangent.shape, tangent.dtype) if isinstance(tangent, SymbolicZero) else tangent
