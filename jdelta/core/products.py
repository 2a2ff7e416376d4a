"""How the layers multiply: the same products, in the forms that cost least where the program runs.

The forms are chosen while a program is traced, from shapes. `benchmarks/lora_forms.py` measures them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

Leaves = Mapping[str, jax.Array]


def on_cpu() -> bool:
    """Whether programs run on the CPU unless they are told otherwise."""
    return jax.default_backend() == "cpu"


def down(x: jax.Array, weights: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """`x @ weights`, for `x`, `(…, d)`, and weights `(d, r)` with few columns; also the `dot_general` of an `nn.Dense`.

    On a CPU the axes of rows are joined for the gradient, since XLA is ten times slower there over several. Elsewhere
    they stay as they are: if a mesh splits the sequence, it cannot be joined with the batch without being gathered.
    """
    return _down(x, weights) if on_cpu() else x @ weights


def up(z: jax.Array, weights: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """`z @ weights`, for weights `(r, d)` with few rows. See `down`."""
    return _up(z, weights) if on_cpu() else z @ weights


# What is long shall be the last axis in every product of a gradient: XLA:CPU takes up to five times as long otherwise,
# and but for the barriers it would undo the transpositions.
_fixed: Any = jax.lax.optimization_barrier


def _thin(of_weights: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`x @ weights`, whose change with the weights is `of_weights(x, dweights)`, for `x` with one axis of rows."""

    # What is kept for the gradient is `x` itself, which in a scan is kept once for all that read it.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def change(x: jax.Array, dweights: jax.Array) -> jax.Array:
        return of_weights(x.reshape(-1, x.shape[-1]), dweights).reshape(*x.shape[:-1], dweights.shape[-1])

    @jax.custom_jvp
    def product(x: jax.Array, weights: jax.Array) -> jax.Array:
        return x @ weights

    @functools.partial(product.defjvp, symbolic_zeros=True)
    def jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        (x, weights), (dx, dweights) = primals, tangents
        parts = (None if _is_zero(dx) else dx @ weights, None if _is_zero(dweights) else change(x, dweights))
        return (y := x @ weights), _total(y, *parts)

    return product


_down = _thin(lambda x, dweights: _fixed(_fixed(_fixed(dweights.T) @ x.T).T))
_up = _thin(lambda z, dweights: jax.lax.dot_general(_fixed(_fixed(z).T), dweights, (((0,), (0,)), ((), ()))))


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _total(like: jax.Array, *parts: jax.Array | None) -> jax.Array:
    return functools.reduce(operator.add, [part for part in parts if part is not None] or [jnp.zeros_like(like)])


def fusing_is_cheaper(tokens: int, d_in: int, d_out: int) -> bool:
    """Whether `fused` is to be preferred to the sum that it stands for: on the CPU alone, where that was measured.

    In a training step the sum takes `3 · tokens · (d_in + d_out)` multiplications for each rank: two thin products
    forward, four backward. Fused, it is `2 · tokens · (d_in + d_out) + 2 · d_in · d_out`. From twice the tokens on at
    which they are even, it saves more than the changed weights cost, which XLA:CPU keeps for the backward pass.
    """
    return on_cpu() and tokens * (d_in + d_out) >= 4 * d_in * d_out


class Pair(Protocol):
    """A linear module and an update of its weights; hashable, for what is traced for one serves its equals."""

    def run(self, x: jax.Array, weights: Leaves) -> jax.Array:
        """What the module computes, linear in `x` and in the weights."""

    def merged(self, weights: Leaves, own: Any) -> Leaves:
        """The weights with the update added."""

    def change(self, x: jax.Array, weights: Leaves, own: Any) -> jax.Array:
        """What the update adds to the module's output."""


@functools.partial(jax.jit, static_argnums=0)  # traced once for all layers that are alike
def fused(pair: Pair, x: jax.Array, weights: Leaves, own: Any) -> jax.Array:
    """`pair.run(x, weights) + pair.change(x, weights, own)` as `pair.run(x, pair.merged(weights, own))`.

    That is one product for three. In a scan, the changed weights are made again for the gradient of `x`, so that they
    need not be kept. The gradients of `own` are those of `change`. One of the forms of RunLoRA (Cherniuk et al. 2023,
    arXiv 2312.03415). It can be differentiated in both modes and as often as one likes.

    Args:
      pair: the module and the update.
      x: the module's input.
      weights: the module's.
      own: the update's.
    """
    return _fused(pair, x, weights, own)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fused(pair: Pair, x: jax.Array, weights: Leaves, own: Any) -> jax.Array:
    return pair.run(x, pair.merged(weights, own))


@functools.partial(_fused.defjvp, symbolic_zeros=True)
def _fused_jvp(pair: Pair, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, weights, own), (dx, dweights, downs) = primals, tangents
    still = {key: value for key, value in weights.items() if _is_zero(dweights[key])}
    moving = {key: value for key, value in weights.items() if key not in still}
    of_x = of_weights = None
    if not _is_zero(dx):
        again = jax.checkpoint(lambda x, dx, *of: jax.jvp(lambda x: pair.run(x, pair.merged(*of)), (x,), (dx,))[1])
        of_x = again(x, dx, weights, own)
    if moving:
        dmoving = {key: dweights[key] for key in moving}
        of_weights = jax.jvp(lambda w: pair.run(x, pair.merged({**still, **w}, own)), (moving,), (dmoving,))[1]
    leaves: list[jax.Array]
    tree: Any
    leaves, tree = jax.tree.flatten(own)
    down = {i: d for i, d in enumerate(tree.flatten_up_to(downs)) if not _is_zero(d)}  # of what is not frozen

    def change(part: dict[int, jax.Array]) -> jax.Array:
        return pair.change(x, weights, jax.tree.unflatten(tree, [part.get(i, leaf) for i, leaf in enumerate(leaves)]))

    of_own = jax.jvp(change, ({i: leaves[i] for i in down},), (down,))[1] if down else None
    y = pair.run(x, pair.merged(weights, own))  # a plain product, for `jax.checkpoint` policies to see
    return y, _total(y, of_x, of_weights, of_own)
