"""The common names of decoders outside transformers: the qualified class of a block to the paths of what is inside it.

Their classes are called `Block` and `DecoderLayer`, as anybody's may be, so that the name of the class alone would not
tell. Of the paths of an entry, those that a model has are meant: Gemma's attention has one module for query, key and
value, or two.
"""

from __future__ import annotations

from jdelta.names.table import LLAMA_LAYER, Names

_GEMMA_BLOCK: Names = {
    "attn": "attn",
    "attn.q": ("attn.q_einsum", "attn.qkv_einsum"),
    "attn.k": ("attn.kv_einsum", "attn.qkv_einsum", "attn.k_einsum"),
    "attn.v": ("attn.kv_einsum", "attn.qkv_einsum", "attn.k_einsum"),  # the last where values are the keys
    "attn.proj": "attn.attn_vec_einsum",
    "attn.layer_norm": ("pre_attention_norm", "post_attention_norm", "post_attn_norm"),
    "ff": "mlp",
    "ff.layer_norm": ("pre_ffw_norm", "post_ffw_norm"),
}
# Google's gemma computes both products of its feed-forward layer in the scope of the layer.
_GOOGLE_BLOCK: Names = {**_GEMMA_BLOCK, "ff.w1": "mlp", "ff.w2": "mlp"}
_LINEARS: Names = {"ff.w1": ("mlp.gate_proj", "mlp.up_proj"), "ff.w2": "mlp.down_proj"}
_TUNIX_LLAMA_LAYER: Names = {
    **LLAMA_LAYER,
    "attn": "attn",
    "attn.q": "attn.q_proj",
    "attn.k": "attn.k_proj",
    "attn.v": "attn.v_proj",
    "attn.proj": "attn.o_proj",
}
_MAXTEXT_LAYER: Names = {
    "attn": "self_attention",
    "attn.q": ("self_attention.query", "self_attention.qkv_proj"),
    "attn.k": ("self_attention.key", "self_attention.qkv_proj"),
    "attn.v": ("self_attention.value", "self_attention.qkv_proj"),
    "attn.proj": "self_attention.out",
    "ff": "mlp",
    "ff.w1": ("mlp.wi", "mlp.wi_0", "mlp.wi_1"),
    "ff.w2": "mlp.wo",
}
_MODEL: Names = {"embeddings": "embedder", "layer_norm": "final_norm"}

DECODERS: dict[str, Names] = {
    # tunix: Llama 3, Qwen 2, Qwen 3; Gemma 1 and 2, Gemma 3, Gemma 4
    **{f"tunix.models.{family}.model.DecoderLayer": _TUNIX_LLAMA_LAYER for family in ("llama3", "qwen2", "qwen3")},
    **{
        f"tunix.models.{family}.model.{family.title()}": {**_MODEL, "lm_head.proj": "lm_head"}
        for family in ("llama3", "qwen2", "qwen3")
    },
    **{
        f"tunix.models.{family}.model.DecoderLayer": {**_GEMMA_BLOCK, **_LINEARS}
        for family in ("gemma", "gemma3", "gemma4")
    },
    **{f"tunix.models.{family}.model.{family.title()}": _MODEL for family in ("gemma", "gemma3", "gemma4")},
    # EasyDeL: Llama, Qwen 2, Qwen 3
    **{
        f"easydel.modules.{file}{end}": entry
        for file in ("llama.modeling_llama.Llama", "qwen2.modeling_qwen.Qwen2", "qwen3.modeling_qwen3.Qwen3")
        for end, entry in (
            ("DecoderLayer", LLAMA_LAYER),
            ("Model", {"embeddings": "embed_tokens", "layer_norm": "norm"}),
            ("ForCausalLM", {"lm_head.proj": "lm_head"}),
        )
    },
    # MaxText: Llama, Mistral, Qwen 2, Qwen 3; Gemma 1, Gemma 3, with norms before and after
    **{
        f"maxtext.models.{file}DecoderLayer": {
            **_MAXTEXT_LAYER,
            "attn.layer_norm": "pre_self_attention_layer_norm",
            "ff.layer_norm": "post_self_attention_layer_norm",
        }
        for file in ("llama2.Llama", "mistral.Mistral", "qwen2.Qwen2", "qwen3.Qwen3")
    },
    **{
        f"maxtext.models.{file}DecoderLayer": {
            **_MAXTEXT_LAYER,
            "attn.layer_norm": ("pre_self_attention_norm", "post_self_attention_norm"),
            "ff.layer_norm": ("pre_ffw_norm", "post_ffw_norm"),
        }
        for file in ("gemma.Gemma", "gemma3.Gemma3")
    },
    "maxtext.layers.nnx_decoders.NNXDecoder": {"layer_norm": "decoder_norm", "lm_head.proj": "logits_dense"},
    "maxtext.models.models.Transformer": {"embeddings": "token_embedder"},
    # Google's gemma, in linen: Gemma 1 to 3, Gemma 3n, Gemma 4
    **{f"gemma.gm.nn.{folder}_modules.Block": _GOOGLE_BLOCK for folder in ("", "gemma3n.", "gemma4.")},
    **{f"gemma.gm.nn.{folder}_transformer.Transformer": _MODEL for folder in ("", "gemma4.")},
}
