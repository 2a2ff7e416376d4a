"""A module of flax.nnx as a function of its parameters, like a model of linen."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdelta.trees import surgery
from jdelta.trees.surgery import Tree

KEYS = "random keys"  # the argument for the module's own; no argument has a space in its name


def is_of_module(call: Any) -> bool:
    """Whether it is an nnx module, or a method of one."""
    return isinstance(_owner(call), nnx.Module)


def pure(call: Any, rows: int) -> tuple[Callable[..., Any], dict[str, jax.Array]]:
    """The call as a function that takes `params=` and the module's random keys, and such keys for each row of a batch.

    The function runs a copy of the module: what a run changes in it, such as statistics and counts of keys, is dropped.

    Args:
      call: an nnx module, or a method of one.
      rows: how many there are.

    Returns:
      The function, which raises `ValueError` unless `params` are all parameters of the module; and name to keys,
      `(rows, …)`, which are split from those that the module has now.
    """
    model, method = _owner(call), call.__name__ if inspect.ismethod(call) else "__call__"
    graphdef, state = nnx.split(model)
    leaves, parameters = surgery.flatten(state), surgery.parameters_of(state).keys()
    keys = {surgery.name_of(path): _split(leaf, rows) for path, leaf in leaves.items() if _is_key(leaf)}

    def run(*args: Any, params: Tree, **kwargs: Any) -> Any:
        given, own_keys = surgery.flatten(params), kwargs.pop(KEYS)
        for odd, problem in (
            (parameters - given.keys(), "lack"),
            (given.keys() - leaves.keys(), "hold, and it lacks,"),
        ):
            if odd:
                raise ValueError(f"the parameters for {type(model).__name__} {problem} {surgery.name_of(min(odd))!r}.")
        mine = {path: own_keys.get(surgery.name_of(path), leaf) for path, leaf in (leaves | given).items()}
        copy = nnx.merge(graphdef, surgery.unflatten(mine, like=state), copy=True)
        return getattr(copy, method)(*args, **kwargs)

    return run, keys


def _owner(call: Any) -> Any:
    return call.__self__ if inspect.ismethod(call) else call


def _split(keys: jax.Array, rows: int) -> jax.Array:
    """Each of some keys, such as those of layers in a scan, split for all rows."""
    split = jax.vmap(lambda key: jax.random.split(key, rows), out_axes=1)
    return split(keys.reshape(-1)).reshape(rows, *keys.shape)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
