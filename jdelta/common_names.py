"""Common names: where attention, feed-forward and heads are in each family of models.

`TABLE` maps the class of a block (and all its subclasses) to the common names of what is inside it. A block is found
wherever it is in a model, so a family is covered also inside a wrapper. Each value is the path from the block, or
several paths; what a variant of the family lacks is passed over. A new family is a new entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jdelta.structure import ModuleInfo, Structure

Names = Mapping[str, str | tuple[str, ...]]

_BERT_LAYER: Names = {
    "attn": "attention",
    "attn.q": "attention.self.query",
    "attn.k": "attention.self.key",
    "attn.v": "attention.self.value",
    "attn.proj": "attention.output.dense",
    "attn.layer_norm": "attention.output.LayerNorm",
    "crossattn": "crossattention",
    "crossattn.q": "crossattention.self.query",
    "crossattn.k": "crossattention.self.key",
    "crossattn.v": "crossattention.self.value",
    "crossattn.proj": "crossattention.output.dense",
    "crossattn.layer_norm": "crossattention.output.LayerNorm",
    "ff.w1": "intermediate.dense",
    "ff.w2": "output.dense",
    "ff.layer_norm": "output.LayerNorm",
}

_BART_LAYER: Names = {
    "attn": "self_attn",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.proj": "self_attn.out_proj",
    "attn.layer_norm": "self_attn_layer_norm",
    "crossattn": "encoder_attn",
    "crossattn.q": "encoder_attn.q_proj",
    "crossattn.k": "encoder_attn.k_proj",
    "crossattn.v": "encoder_attn.v_proj",
    "crossattn.proj": "encoder_attn.out_proj",
    "crossattn.layer_norm": "encoder_attn_layer_norm",
    "ff.w1": "fc1",
    "ff.w2": "fc2",
    "ff.layer_norm": "final_layer_norm",
}

TABLE: dict[str, Names] = {
    # BERT
    "FlaxBertLayer": _BERT_LAYER,
    "FlaxBertEmbeddings": {"embeddings": "word_embeddings"},
    "FlaxBertLMPredictionHead": {"lm_head.proj": "decoder"},
    "FlaxBertForSequenceClassificationModule": {"classifier": "classifier"},
    "FlaxBertForTokenClassificationModule": {"classifier": "classifier"},
    # RoBERTa
    "FlaxRobertaLayer": _BERT_LAYER,
    "FlaxRobertaEmbeddings": {"embeddings": "word_embeddings"},
    "FlaxRobertaLMHead": {"lm_head.proj": "decoder"},
    "FlaxRobertaForSequenceClassificationModule": {"classifier": "classifier"},
    "FlaxRobertaForTokenClassificationModule": {"classifier": "classifier"},
    # DistilBERT, whose block is called FlaxTransformerBlock
    "FlaxTransformerBlock": {
        "attn": "attention",
        "attn.q": "attention.q_lin",
        "attn.k": "attention.k_lin",
        "attn.v": "attention.v_lin",
        "attn.proj": "attention.out_lin",
        "attn.layer_norm": "sa_layer_norm",
        "ff": "ffn",
        "ff.w1": "ffn.lin1",
        "ff.w2": "ffn.lin2",
        "ff.layer_norm": "output_layer_norm",
    },
    "FlaxDistilBertModule": {"embeddings": "embeddings.word_embeddings"},
    "FlaxDistilBertForMaskedLMModule": {"lm_head.proj": "vocab_projector"},
    "FlaxDistilBertForSequenceClassificationModule": {"classifier": "classifier"},
    "FlaxDistilBertForTokenClassificationModule": {"classifier": "classifier"},
    # GPT-2, whose query, key and value are one fused module
    "FlaxGPT2Block": {
        "attn": "attn",
        "attn.q": "attn.c_attn",
        "attn.k": "attn.c_attn",
        "attn.v": "attn.c_attn",
        "attn.proj": "attn.c_proj",
        "attn.layer_norm": "ln_1",
        "crossattn": "crossattention",
        "crossattn.q": "crossattention.q_attn",
        "crossattn.k": "crossattention.c_attn",
        "crossattn.v": "crossattention.c_attn",
        "crossattn.proj": "crossattention.c_proj",
        "crossattn.layer_norm": "ln_cross_attn",
        "ff": "mlp",
        "ff.w1": "mlp.c_fc",
        "ff.w2": "mlp.c_proj",
        "ff.layer_norm": "ln_2",
    },
    "FlaxGPT2Module": {"embeddings": "wte", "layer_norm": "ln_f"},
    "FlaxGPT2LMHeadModule": {"lm_head.proj": "lm_head"},
    # OPT
    "FlaxOPTDecoderLayer": {name: path for name, path in _BART_LAYER.items() if not name.startswith("crossattn")},
    "FlaxOPTDecoder": {"embeddings": "embed_tokens", "layer_norm": "final_layer_norm"},
    "FlaxOPTForCausalLMModule": {"lm_head.proj": "lm_head"},
    # T5
    "FlaxT5LayerSelfAttention": {
        "attn": "SelfAttention",
        "attn.q": "SelfAttention.q",
        "attn.k": "SelfAttention.k",
        "attn.v": "SelfAttention.v",
        "attn.proj": "SelfAttention.o",
        "attn.layer_norm": "layer_norm",
    },
    "FlaxT5LayerCrossAttention": {
        "crossattn": "EncDecAttention",
        "crossattn.q": "EncDecAttention.q",
        "crossattn.k": "EncDecAttention.k",
        "crossattn.v": "EncDecAttention.v",
        "crossattn.proj": "EncDecAttention.o",
        "crossattn.layer_norm": "layer_norm",
    },
    "FlaxT5LayerFF": {
        "ff": "DenseReluDense",
        "ff.w1": ("DenseReluDense.wi", "DenseReluDense.wi_0", "DenseReluDense.wi_1"),
        "ff.w2": "DenseReluDense.wo",
        "ff.layer_norm": "layer_norm",
    },
    "FlaxT5Stack": {"layer_norm": "final_layer_norm"},
    "FlaxT5Module": {"embeddings": "shared"},
    "FlaxT5EncoderModule": {"embeddings": "shared"},
    "FlaxT5ForConditionalGenerationModule": {"embeddings": "shared", "lm_head.proj": "lm_head"},
    # BART
    "FlaxBartEncoderLayer": {name: path for name, path in _BART_LAYER.items() if not name.startswith("crossattn")},
    "FlaxBartDecoderLayer": _BART_LAYER,
    "FlaxBartModule": {"embeddings": "shared"},
    "FlaxBartForConditionalGenerationModule": {"lm_head.proj": "lm_head"},
    "FlaxBartForCausalLMModule": {"lm_head.proj": "lm_head"},
    "FlaxBartForSequenceClassificationModule": {"classifier": "classification_head"},
    # Llama
    "FlaxLlamaDecoderLayer": {
        "attn": "self_attn",
        "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj",
        "attn.proj": "self_attn.o_proj",
        "attn.layer_norm": "input_layernorm",
        "ff": "mlp",
        "ff.w1": ("mlp.gate_proj", "mlp.up_proj"),
        "ff.w2": "mlp.down_proj",
        "ff.layer_norm": "post_attention_layernorm",
    },
    "FlaxLlamaModule": {"embeddings": "embed_tokens", "layer_norm": "norm"},
    "FlaxLlamaForCausalLMModule": {"lm_head.proj": "lm_head"},
}


def resolve(structure: Structure, names: Sequence[str]) -> list[ModuleInfo]:
    """The modules that common names mean, in order of execution.

    A name means itself and what is named below it where it has no module of its own: `"ff"` in BERT, whose two
    feed-forward layers have no common parent, means `ff.w1`, `ff.w2` and `ff.layer_norm`; `"layer_norm"` means every
    name that ends with it.

    Raises:
      ValueError: no block of a known family is in the model, or a name that no family has.
    """
    known = {name for entry in TABLE.values() for name in entry} | {"ff", "layer_norm"}
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is no common name. There are: {', '.join(sorted(known))}.")
    found: set[str] = set()
    blocks = 0
    for info in structure:
        for entry in (TABLE[cls.__name__] for cls in info.type.__mro__ if cls.__name__ in TABLE):
            blocks += 1
            for wanted in names:
                for path in _paths(entry, wanted):
                    found.add(".".join((*info.path, path)))
            break
    if not blocks:
        raise ValueError(
            "the common names know no part of this model, so there are no default positions. "
            f"Name the modules: modified_modules=[…]. It has, for example: {', '.join(_examples(structure))}."
        )
    return [info for info in structure if info.name in found]


def _paths(entry: Names, wanted: str) -> list[str]:
    if wanted in entry:
        values = [entry[wanted]]
    else:
        values = [v for k, v in entry.items() if k.startswith(wanted + ".") or k.endswith("." + wanted)]
    return [path for value in values for path in ((value,) if isinstance(value, str) else value)]


def _examples(structure: Structure) -> list[str]:
    return [info.name for info in structure if info.name and info.params][:5]
