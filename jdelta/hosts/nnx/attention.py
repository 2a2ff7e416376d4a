"""Lets prefixes take part in attention that nnx modules compute by flax.nnx's or jax.nn's `dot_product_attention`.

Those functions have the keys and the values at once, so that a prefix goes before them, and masks, biases, windows and
lengths are told of it. While a module runs with a prefix, the functions' names mean others where the module looks them
up: in jax.nn and flax.nnx, in the globals of its functions, and in attributes such as `attention_fn`. In other threads
these do as the originals.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import attention as nnx_attention

from jdelta.hosts import patches
from jdelta.hosts.attention_parts import alone, innermost_prefix, preceded, take, widened

_SOURCES: tuple[dict[str, Any], ...] = (vars(jax.nn), vars(nnx), vars(nnx_attention))


@contextlib.contextmanager
def heard_in(module: nnx.Module, module_type: type) -> Iterator[None]:
    """While this lasts, active prefixes are heard where a module computes attention.

    Args:
      module: the module.
      module_type: its class, as the user wrote it.
    """
    held = vars(module)
    functions = [inspect.unwrap(_function_of(value)) for value in held.values() if callable(value)]
    files = [*_SOURCES, *patches.globals_of(module_type), *(f.__globals__ for f in functions if inspect.isfunction(f))]
    with contextlib.ExitStack() as stack:
        for namespace in {id(file): file for file in (*files, held)}.values():
            for name, value in list(namespace.items()):
                if _attends(_function_of(value)):
                    stack.enter_context(patches.patched(namespace, name, _heard))
        yield


def _function_of(value: Any) -> Any:
    """The function that a value stands for: of a `functools.partial`, the function in it."""
    value = patches.original_of(value)
    return patches.original_of(value.func) if isinstance(value, functools.partial) else value


def _attends(value: Any) -> bool:
    return any(value is function for function in _MAKERS)


def _heard(value: Any) -> Any:
    if isinstance(value, functools.partial):
        return functools.partial(_heard(_function_of(value)), *value.args, **value.keywords)
    return next(make for function, make in _MAKERS.items() if function is value)(value)


def _in_whole(attend: Callable) -> Callable:
    @functools.wraps(attend)
    def dot_product_attention(*args: Any, **kwargs: Any) -> Any:
        if innermost_prefix() is None:
            return attend(*args, **kwargs)
        given = dict(inspect.signature(attend).bind(*args, **kwargs).arguments)
        value = given["value"]
        if value.shape[-2:] != given["key"].shape[-2:]:
            raise TypeError(
                f"a prefix has keys and values of one shape, and here keys have (heads, width) "
                f"{given['key'].shape[-2:]} and values {value.shape[-2:]}."
            )
        given["value"] = preceded(value, _precede_keys(given))
        with alone():  # the function calls others in which prefixes are heard
            return attend(**given)

    return dot_product_attention


def _in_weights(weights_of: Callable) -> Callable:
    @functools.wraps(weights_of)
    def dot_product_attention_weights(*args: Any, **kwargs: Any) -> Any:
        prefix = innermost_prefix()
        if prefix is None:
            return weights_of(*args, **kwargs)
        given = dict(inspect.signature(weights_of).bind(*args, **kwargs).arguments)
        values = _precede_keys(given)
        weights = weights_of(**given)
        values = jnp.repeat(values, weights.shape[-3] // values.shape[-2], axis=-2).astype(weights.dtype)
        own = weights[..., : len(values)]
        prefix.leave(jnp.einsum("...hqn,nhd->...qhd", own, values, precision=given.get("precision")))
        return weights[..., len(values) :]

    return dot_product_attention_weights


_MAKERS: dict[Callable, Callable[[Callable], Callable]] = {
    jax.nn.dot_product_attention: _in_whole,
    nnx_attention.dot_product_attention: _in_whole,
    nnx_attention.dot_product_attention_weights: _in_weights,
}


def _precede_keys(given: dict[str, Any]) -> jax.Array:
    """Puts the keys of the active prefixes before those of a call, tells its masks of them, and returns the values."""
    query, key = given["query"], given["key"]
    heads, width = key.shape[-2:]
    keys, values = take(heads, width, key.dtype)
    n, length = len(keys), key.shape[-3] + len(keys)
    own = _own_mask(given, query.shape[-3], key.shape[-3])
    given["key"] = preceded(key, keys)
    given["bias"] = widened(given.get("bias"), n, length, 0)
    given["mask"] = widened(given.get("mask"), n, length, True)
    if own is not None:
        own = widened(own.reshape((1,) * (query.ndim - 2) + own.shape), n, length, True)
        given["mask"] = own if given["mask"] is None else given["mask"].astype(bool) & own
    if given.get("key_value_seq_lengths") is not None:
        given["key_value_seq_lengths"] = given["key_value_seq_lengths"] + n
    return values


def _own_mask(given: dict[str, Any], queries: int, keys: int) -> jax.Array | None:
    """Which of its own keys a query sees by its place, `(queries, keys)`; the call is no longer told to find that out
    by itself, since it would count the prefix in."""
    causal, window = given.pop("is_causal", False), given.pop("local_window_size", None)
    if not causal and window is None:
        return None
    distance = jnp.arange(keys) - jnp.arange(queries)[:, None]
    seen = distance <= 0 if causal else jnp.full(distance.shape, True)
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        seen &= (distance >= -left) & (distance <= right)
    return seen
