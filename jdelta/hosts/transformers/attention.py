"""Lets others take part in attention that was written without them: keys and values of a prefix, a faster kernel.

Flax models compute `weights = dot_product_attention_weights(query, key, bias=…)` and contract the weights with the
values themselves. No interception reaches that place, so while a module runs with a prefix or a kernel, that name means
another function in the module's file, which in other threads does as the original.

With a prefix, the softmax runs over the prefix and the keys together, the weights of the keys are returned, and what
the prefix adds to the result waits to be added to the input of the next module, the attention's output projection.
With a kernel, the weights are deferred until the file's `jnp.einsum` contracts them with the values, prefix included;
whatever else the file does with them materialises them. Masks, caches, rotary and relative positions stay as they are.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import attention as flax_attention

from jdelta.hosts import patches
from jdelta.hosts.attention_parts import Kernel, active_kernel, innermost_prefix, taking_part
from jdelta.hosts.transformers.attention_call import AttentionCall, LazyWeights, materialised
from jdelta.hosts.transformers.own_softmax import (
    big_bird_attention,
    big_bird_jax,
    distilbert_matmul,
    distilbert_softmax,
)

_WEIGHTS = "dot_product_attention_weights"
_BLOCK_SPARSE = "bigbird_block_sparse_attention"


@contextlib.contextmanager
def active(kernel: Kernel, module_type: type) -> Iterator[None]:
    """While this lasts, a kernel computes all attention that a module of this class computes, where it can."""
    with taking_part(kernel), heard_in(module_type):
        yield


def computes_attention(module_type: type) -> bool:
    """Whether attention is computed in the file of a module's class in a way that others can take part in."""
    return any(_WEIGHTS in file or _is_distilbert(file) for file in patches.globals_of(module_type))


@contextlib.contextmanager
def heard_in(module_type: type) -> Iterator[None]:
    """While this lasts, active prefixes and kernels are heard in the file of a module's class, and in flax's own."""
    files = {id(file): file for file in (*patches.globals_of(module_type), vars(flax_attention))}
    with contextlib.ExitStack() as stack:
        for file in files.values():
            for name, make in _replacements(file).items():
                stack.enter_context(patches.patched(file, name, make))
        for cls in module_type.__mro__:
            if _BLOCK_SPARSE in vars(cls):
                stack.enter_context(patches.patched(cls, _BLOCK_SPARSE, big_bird_attention))
        yield


def _replacements(file: dict[str, Any]) -> dict[str, Callable]:
    """Name to what makes its replacement, of what means something else in a file."""
    if _is_distilbert(file):
        return {
            "nn": patches.in_namespace("softmax", distilbert_softmax),
            "jnp": patches.in_namespace("matmul", distilbert_matmul),
        }
    if _WEIGHTS not in file:
        return {}
    found: dict[str, Callable] = {_WEIGHTS: _heard}
    for name, value in list(file.items()):
        if patches.original_of(value) is jnp:
            found[name] = patches.in_namespace("einsum", _einsum)
    if _is_file(file, "big_bird"):
        found["jax"] = big_bird_jax
    return found


def _is_file(file: dict[str, Any], family: str) -> bool:
    return file["__name__"].endswith(f"modeling_flax_{family}")


def _is_distilbert(file: dict[str, Any]) -> bool:
    return _is_file(file, "distilbert")


def _heard(weights_of: Callable) -> Callable:
    @functools.wraps(weights_of)
    def dot_product_attention_weights(*args: Any, **kwargs: Any) -> Any:
        kernel = active_kernel()
        if kernel is None and innermost_prefix() is None:
            return weights_of(*args, **kwargs)
        call = AttentionCall(weights_of, inspect.signature(weights_of).bind(*args, **kwargs).arguments)
        if kernel is None or not kernel.accepts(call):
            return call.weights()
        dtype = call.given.get("dtype")
        return LazyWeights(
            call, kernel, jnp.result_type(call.given["query"], call.given["key"]) if dtype is None else dtype
        )

    return dot_product_attention_weights


def _einsum(einsum: Callable, subscripts: Any, *operands: Any, **kwargs: Any) -> Any:
    if any(isinstance(operand, LazyWeights) for operand in operands):
        plain = all(value is None or value is jax.lax.dot_general for value in kwargs.values())
        if plain and len(operands) == 2 and isinstance(operands[0], LazyWeights) and isinstance(subscripts, str):
            result = operands[0].einsum(einsum, subscripts, operands[1])
            if result is not None:
                return result
        operands = materialised(operands)
    return einsum(subscripts, *operands, **kwargs)
