"""The model without some of its deltas, by the tree that it is called with."""

from __future__ import annotations

from jdelta.core import disabling
from jdelta.delta import DeltaModel
from jdelta.trees.surgery import Tree


def without(params: Tree, *deltas: DeltaModel) -> Tree:
    """Returns a tree with which the model computes what it computes without these deltas, also under `jax.jit`.

        @jax.jit
        def loss(params, batch):  # compiled once, for policy and reference
            policy = model(**batch, params=params).logits
            reference = model(**batch, params=jdelta.without(params, delta)).logits
            return jnp.mean((policy - jax.lax.stop_gradient(reference)) ** 2)

    The tree lacks the deltas' leaves, has the earlier values of the backbone's leaves that train as part of a delta, as
    biases do in BitFit, and its structure says which deltas are left out: a tree that merely lacks them is refused.
    Everything else is as in `params`, such as a head that trains besides the delta. The tree is for calls of this model
    and its `generate`, not for other functions of jdelta. The model itself does not change, so threads can share it.

    An `nnx.State` keeps the deltas' leaves, and the metadata of their variables say that they are left out:

        reference = nnx.merge(graphdef, jdelta.without(state, delta))

    Args:
      params: a tree with the leaves of the model's deltas.
      *deltas: attached or detached.

    Returns:
      The tree, of the same type.

    Raises:
      RuntimeError: a delta is merged or was removed, or the tree was donated.
      TypeError: one of the deltas is not a `DeltaModel`.
      ValueError: the earlier value of a leaf is unknown, since the backbone held none when the delta was attached; or
        a state has the deltas' leaves in no variables.
    """
    for delta in deltas:
        if not isinstance(delta, DeltaModel):
            raise TypeError(f"without: expected deltas, such as what jdelta.LoraModel(…) gives, got {delta!r}.")
        params = disabling.without(delta._state, params)
    return params
