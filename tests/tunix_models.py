"""A tiny model of each of tunix's six families, and inputs for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

VOCAB, LENGTH = 60, 6

_SIZES = {"num_layers": 2, "embed_dim": 16, "hidden_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
_LLAMA = {**_SIZES, "vocab_size": VOCAB, "rope_theta": 1_000_000, "norm_eps": 1e-6}
_GEMMA = {**_SIZES, "num_embed": VOCAB}

# family, which is the module of tunix.models -> class and sizes
FAMILIES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "gemma": (
        "Gemma",
        {**_GEMMA, "final_logit_softcap": 30.0, "attn_logits_soft_cap": 50.0, "sliding_window_size": 4}
        | {"use_post_attn_norm": True, "use_post_ffw_norm": True},
    ),
    "gemma3": ("Gemma3", {**_GEMMA, "sliding_window_size": 4, "param_dtype": jnp.float32}),
    "gemma4": (
        "Gemma4",
        {**_GEMMA, "sliding_window_size": 4, "global_key_size": 8, "per_layer_input_dim": 4}
        | {"use_sliding_window_kv_cache": False},
    ),
    "llama3": ("Llama3", _LLAMA),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen3": ("Qwen3", _LLAMA),
}


def library(family: str) -> Any:
    """The module of tunix that defines a family."""
    return importlib.import_module(f"tunix.models.{family}.model")


def config(family: str, **changes: Any) -> Any:
    """A tiny configuration; Gemma's and Gemma 4's layers are one with a sliding window and one without."""
    tunix = library(family)
    sizes = dict(FAMILIES[family][1])
    if family in ("gemma", "gemma4"):
        kinds = (tunix.AttentionType.LOCAL_SLIDING, tunix.AttentionType.GLOBAL)
        sizes["attention_types" if family == "gemma" else "attention_pattern"] = kinds
    return tunix.ModelConfig(**sizes | changes)


def factory(family: str, **changes: Any) -> Callable[[], nnx.Module]:
    """What makes a model as tunix initialises it: with feed-forward layers of zeros."""
    cls, settings = getattr(library(family), FAMILIES[family][0]), config(family, **changes)
    return lambda: cls(settings, rngs=nnx.Rngs(0))


def build(family: str, **changes: Any) -> nnx.Module:
    """A model with random weights in every parameter."""
    model = factory(family, **changes)()
    state = nnx.state(model, nnx.Param)
    leaves, treedef = jax.tree.flatten(state)
    random = np.random.default_rng(0)
    noise = [jnp.asarray(random.normal(scale=0.3, size=leaf.shape), leaf.dtype) for leaf in leaves]
    nnx.update(model, jax.tree.unflatten(treedef, [a + b for a, b in zip(leaves, noise, strict=True)]))
    return model


def abstract(family: str, **changes: Any) -> nnx.Module:
    """A model of shapes."""
    return nnx.eval_shape(factory(family, **changes))


def inputs(batch: int = 2, length: int = LENGTH) -> tuple[Any, ...]:
    """`(tokens, positions, cache, attention_mask)`, by position, as all six take them: `(batch, length)` and causal."""
    tokens = jnp.asarray(np.random.default_rng(1).integers(1, VOCAB, (batch, length)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    return tokens, positions, None, mask
