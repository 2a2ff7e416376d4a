"""Lets prefixes take part in attention that an nnx module writes out itself, through the cache that it takes.

tunix's Llama, Qwen and Gemma compute `attn(x, positions, cache, attn_mask)`: the module writes its keys and values into
the cache, at `end_index`, and attends to all of it. So a cache that is longer by the prefix, with the prefix in its
last places, makes the module attend to the prefix too. Its own keys stay in their places, so that whatever the module
masks by place, such as a sliding window, masks what it masked; where it applies its mask, the prefix is let through.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdelta.core.arguments import argument_names, arguments, main_input
from jdelta.hosts import patches
from jdelta.hosts.attention_parts import alone, innermost_prefix, preceded, take
from jdelta.hosts.call_edits import ModuleCall


class _Added(NamedTuple):
    """What was added to the cache of a module in progress."""

    module: Any
    tokens: int
    length: int  # of the cache, with them
    is_new: bool  # whether the module was given no cache


_added: contextvars.ContextVar[_Added | None] = contextvars.ContextVar("added", default=None)


def takes_cache(module_type: type) -> bool:
    """Whether a module of this class attends to all of a cache that it is given and writes into."""
    names = argument_names(module_type.__call__)
    sizes = all(hasattr(module_type, name) for name in ("num_kv_heads", "head_dim"))
    return sizes and {"cache", "attn_mask"} <= set(names) and "kv_shared_cache" not in names


def run(this: ModuleCall, call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The call of such a module, in which active prefixes take part."""
    if innermost_prefix() is None:
        return call(*args, **kwargs)
    module, bound = this.module, arguments(this.module_type, args, kwargs)
    given: dict[str, Any] = bound.arguments
    x, cache, mask = main_input(this.module_type, args, kwargs)[1], given.get("cache"), given.get("attn_mask")
    if getattr(getattr(module, "config", None), "use_flash_attention", False) and x.shape[1] > 1:
        raise NotImplementedError(
            f"prefix at {this.describe()}: its flash attention takes no keys but its own. Make the model with "
            "use_flash_attention=False."
        )
    own = _empty(x, module.num_kv_heads, module.head_dim) if cache is None else cache
    length, heads, width = own["k"].shape[1:]
    keys, values = take(heads, width, own["k"].dtype)
    given["cache"] = {
        "k": _followed(own["k"], keys),
        "v": _followed(own["v"], values),
        "end_index": jnp.minimum(own["end_index"] % length, length - x.shape[1]),
    }
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:-1], length))
        given["attn_mask"] = jnp.concatenate([mask, jnp.zeros((*mask.shape[:-1], len(keys)), mask.dtype)], axis=-1)
    before = _added.get()
    earlier = before.tokens if before is not None and before.module is module else 0
    token = _added.set(_Added(module, earlier + len(keys), length + len(keys), cache is None))
    try:
        with alone(), _masks_heard(this.module_type):
            new, *output = call(*bound.args[1:], **bound.kwargs)
    finally:
        _added.reset(token)
    if cache is not None:
        new = {"k": new["k"][:, :length], "v": new["v"][:, :length], "end_index": cache["end_index"] + x.shape[1]}
    return (None if cache is None else new), *output


def _empty(x: jax.Array, heads: int, width: int) -> dict[str, jax.Array]:
    shape = (*x.shape[:2], heads, width)
    return {"k": jnp.zeros(shape, x.dtype), "v": jnp.zeros(shape, x.dtype), "end_index": jnp.zeros(len(x), jnp.int32)}


def _followed(states: jax.Array, others: jax.Array) -> jax.Array:
    """Keys or values, `(batch, length, heads, width)`, before others, `(tokens, heads, width)`."""
    n = states.shape[1]
    both = preceded(states, others)
    return jnp.concatenate([both[:, -n:], both[:, :-n]], axis=1)


@contextmanager
def _masks_heard(module_type: type) -> Iterator[None]:
    """While this lasts, `jnp.where` and `jax.lax.dynamic_update_slice` in the file of a class know of the prefix."""
    files = {id(file): file for file in patches.globals_of(module_type)}
    with ExitStack() as stack:
        for file in files.values():
            for name, value in list(file.items()):
                original = patches.original_of(value)
                if original is jnp:
                    stack.enter_context(patches.patched(file, name, patches.in_namespace("where", _where)))
                elif original is jax:
                    stack.enter_context(patches.patched(file, name, _with_lax))
        yield


def _with_lax(module: Any) -> Any:
    lax = patches.in_namespace("dynamic_update_slice", _dynamic_update_slice)
    return patches.Namespace(module, lax=lax)


def _where(where: Callable, condition: Any, *values: Any, **kwargs: Any) -> Any:
    added = _added.get()
    is_mask = len(values) == 2 and jnp.ndim(values[1]) == 0 and jnp.shape(condition)[-1:] != ()
    if added is not None and is_mask and jnp.shape(condition)[-1] == added.length:
        condition = jnp.asarray(condition).at[..., -added.tokens :].set(True)
    return where(condition, *values, **kwargs)


def _dynamic_update_slice(update_slice: Callable, operand: Any, update: Any, *args: Any, **kwargs: Any) -> Any:
    added = _added.get()
    if added is not None and added.is_new and operand.shape[1:2] == (added.length,):
        operand = operand.astype(update.dtype)  # made before that was known
    return update_slice(operand, update, *args, **kwargs)
