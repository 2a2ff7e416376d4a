"""The leaves of models that call their parts otherwise than PyTorch does, and the names of the same in PyTorch.

For a model of Flax that has its modules' names from PyTorch, as those of transformers do, `names.torch_name` is enough.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

Parts = tuple[str, ...]

# A leaf to what it is in PyTorch: several tensors if it is their outputs one after the other. `*` is a layer's number.
_ATTENTION = {f"attn.{name}.w": (f"self_attn.{name}.weight",) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
_FEED_FORWARD = {f"mlp.{name}.kernel": (f"mlp.{name}.weight",) for name in ("gate_proj", "up_proj", "down_proj")}
_BIASES = {f"attn.{letter}_bias": (f"self_attn.{letter}_proj.bias",) for letter in "qkv"}


def _decoder(layer: Mapping[str, Parts], norm: str) -> dict[str, Parts]:
    """The leaves of a decoder whose layers have these."""
    layers = {f"layers.*.{leaf}": tuple(f"model.layers.*.{part}" for part in parts) for leaf, parts in layer.items()}
    ends = {"embedder.input_embedding": ("model.embed_tokens.weight",), f"final_norm.{norm}": ("model.norm.weight",)}
    return {**ends, **layers, "lm_head.w": ("lm_head.weight",)}


_LLAMA = _decoder(
    {
        **_ATTENTION,
        **_BIASES,
        **{f"attn.{name}.w": (f"self_attn.{name}.weight",) for name in ("q_norm", "k_norm")},
        **_FEED_FORWARD,
        **{f"{name}.w": (f"{name}.weight",) for name in ("input_layernorm", "post_attention_layernorm")},
    },
    "w",
)
_GEMMA = _decoder(
    {
        "attn.q_einsum.w": ("self_attn.q_proj.weight",),
        "attn.kv_einsum.w": ("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "attn.qkv_einsum.w": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "attn.attn_vec_einsum.w": ("self_attn.o_proj.weight",),
        "attn._query_norm.scale": ("self_attn.q_norm.weight",),
        "attn._key_norm.scale": ("self_attn.k_norm.weight",),
        **_FEED_FORWARD,
        "pre_attention_norm.scale": ("input_layernorm.weight",),
        **{f"{name}.scale": ("post_attention_layernorm.weight",) for name in ("post_attn_norm", "post_attention_norm")},
        "pre_ffw_norm.scale": ("pre_feedforward_layernorm.weight",),
        "post_ffw_norm.scale": ("post_feedforward_layernorm.weight",),
    },
    "scale",
)
_GEMMA_4 = _GEMMA | {
    "layers.*.attn.k_einsum.w": ("model.layers.*.self_attn.k_proj.weight",),
    **{
        f"layers.*.{name}.w": (f"model.layers.*.{name}.weight",)
        for name in ("per_layer_input_gate", "per_layer_projection")
    },
    "layers.*.post_per_layer_input_norm.scale": ("model.layers.*.post_per_layer_input_norm.weight",),
    "embedder.per_layer_model_projection.w": ("model.per_layer_model_projection.weight",),
    "embedder.per_layer_projection_norm.scale": ("model.per_layer_projection_norm.weight",),
}
# Gemma 1 has no norms after its layers, and PyTorch calls the one before the feed-forward layer by what is before it.
_GEMMA_1 = {**_GEMMA, "layers.*.pre_ffw_norm.scale": ("model.layers.*.post_attention_layernorm.weight",)}

_CLASSES = {
    **{f"tunix.models.{family}.model.{family.title()}": _LLAMA for family in ("llama3", "qwen2", "qwen3")},
    **{f"tunix.models.{family}.model.{family.title()}": _GEMMA for family in ("gemma", "gemma3")},
    "tunix.models.gemma4.model.Gemma4": _GEMMA_4,
}
# What the decoder is called in models of text, in others, and in others of older releases of transformers.
BASES = ("model", "model.language_model", "language_model.model")


def base_model(leaves: Iterable[str]) -> str:
    """What PyTorch calls the decoder of a model with these leaves: Gemma 4 and Gemma 3 with a vision encoder see."""
    return BASES[any(leaf.startswith("vision_encoder.") or leaf.endswith(".skip_scale") for leaf in leaves)]


def torch_leaves(model: type, leaves: Iterable[str]) -> dict[str, Parts] | None:
    """The names in PyTorch of a model's leaves, of those that are known; `None` if the class of the model is not.

    Args:
      model: the class of the model.
      leaves: their names.
    """
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in model.__mro__)
    table = next((_CLASSES[name] for name in names if name in _CLASSES), None)
    if table is None:
        return None
    leaves = list(leaves)
    if table is _GEMMA and not any(leaf.endswith("post_ffw_norm.scale") for leaf in leaves):
        table = _GEMMA_1
    found, base = {}, base_model(leaves)
    for leaf in leaves:
        number = re.search(r"(?<=\.)\d+(?=\.)", leaf)
        key = f"{leaf[: number.start()]}*{leaf[number.end() :]}" if number else leaf
        if key in table:
            parts = (part.replace("*", number[0]) if number else part for part in table[key])
            found[leaf] = tuple(re.sub(r"^model(?=\.)", base, part) for part in parts)
    return found
