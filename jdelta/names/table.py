"""The table of common names: the class of a block to the paths, from that block, of what is inside it.

`attn` and `crossattn` are modules that compute attention weights and call the output projection; a fused projection
stands under every name that it holds. What a variant of a family lacks, or ties to another weight, is passed over. The
families are those that transformers 4.57 has in Flax; FlaxEncoderDecoder and its like are made of them.
"""

from __future__ import annotations

from collections.abc import Mapping

Names = Mapping[str, str | tuple[str, ...]]


def as_tuple(paths: str | tuple[str, ...]) -> tuple[str, ...]:
    """The paths of an entry, of which there may be one."""
    return (paths,) if isinstance(paths, str) else paths


NAMES = (
    *("attn", "attn.q", "attn.k", "attn.v", "attn.proj", "attn.layer_norm"),
    *("crossattn", "crossattn.q", "crossattn.k", "crossattn.v", "crossattn.proj", "crossattn.layer_norm"),
    *("ff", "ff.w1", "ff.w2", "ff.layer_norm"),
    *("layer_norm", "embeddings", "lm_head.proj", "classifier"),
    *("block", "conv"),  # of models without attention
)

_BERT_LAYER: Names = {
    "attn": "attention",
    "attn.q": "attention.self.query",
    "attn.k": "attention.self.key",
    "attn.v": "attention.self.value",
    "attn.proj": "attention.output.dense",
    "attn.layer_norm": "attention.output.LayerNorm",
    "ff.w1": "intermediate.dense",
    "ff.w2": "output.dense",
    "ff.layer_norm": "output.LayerNorm",
}
_BERT_CROSS: Names = {
    "crossattn": "crossattention",
    "crossattn.q": "crossattention.self.query",
    "crossattn.k": "crossattention.self.key",
    "crossattn.v": "crossattention.self.value",
    "crossattn.proj": "crossattention.output.dense",
    "crossattn.layer_norm": "crossattention.output.LayerNorm",
}
_BART_LAYER: Names = {
    "attn": "self_attn",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.proj": "self_attn.out_proj",
    "attn.layer_norm": "self_attn_layer_norm",
    "ff.w1": "fc1",
    "ff.w2": "fc2",
    "ff.layer_norm": "final_layer_norm",
}
_BART_CROSS: Names = {
    "crossattn": "encoder_attn",
    "crossattn.q": "encoder_attn.q_proj",
    "crossattn.k": "encoder_attn.k_proj",
    "crossattn.v": "encoder_attn.v_proj",
    "crossattn.proj": "encoder_attn.out_proj",
    "crossattn.layer_norm": "encoder_attn_layer_norm",
}
_GPT2_BLOCK: Names = {
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
}
LLAMA_LAYER: Names = {
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
}
_VIT_LAYER: Names = {
    "attn": "attention",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "attn.layer_norm": "layernorm_before",
    "ff.w1": "intermediate.dense",
    "ff.w2": "output.dense",
    "ff.layer_norm": "layernorm_after",
}
_T5_FF: Names = {
    "ff": "DenseReluDense",
    "ff.w1": ("DenseReluDense.wi", "DenseReluDense.wi_0", "DenseReluDense.wi_1"),
    "ff.w2": "DenseReluDense.wo",
    "ff.layer_norm": "layer_norm",
}


def _t5_attention(module: str, name: str = "attn") -> Names:
    return {
        name: module,
        f"{name}.q": f"{module}.q",
        f"{name}.k": f"{module}.k",
        f"{name}.v": f"{module}.v",
        f"{name}.proj": f"{module}.o",
        f"{name}.layer_norm": "layer_norm",
    }


_WORD_EMBEDDINGS: Names = {"embeddings": "word_embeddings"}
_SHARED: Names = {"embeddings": "shared"}
_PATCHES: Names = {"embeddings": "projection"}
_LAYER_NORM: Names = {"layer_norm": "layer_norm"}
_LM_HEAD: Names = {"lm_head.proj": "lm_head"}
_DECODER: Names = {"lm_head.proj": "decoder"}
_CLASSIFIER: Names = {"classifier": "classifier"}
_OUT_PROJ: Names = {"classifier": "out_proj"}
_QA_OUTPUTS: Names = {"classifier": "qa_outputs"}
_NEXT_SENTENCE: Names = {"classifier": "seq_relationship"}

_BERT_KIN = ("Bert", "BigBird", "Electra", "Roberta", "XLMRoberta")
_ROBERTA_KIN = ("Roberta", "RobertaPreLayerNorm", "XLMRoberta")
_ENCODERS = (*_BERT_KIN, "RobertaPreLayerNorm", "RoFormer", "Albert")  # with DistilBERT, all that have such heads
_BART_KIN = ("Bart", "Blenderbot", "BlenderbotSmall", "Marian", "MBart", "Pegasus")
_PRE_NORM_KIN = ("Blenderbot", "MBart", "Pegasus", "Whisper")

TABLE: dict[str, Names] = {
    # BERT, BigBird, ELECTRA, RoBERTa, XLM-RoBERTa; their relatives RoFormer, RoBERTa-PreLayerNorm, ALBERT
    **{f"Flax{family}Layer": {**_BERT_LAYER, **_BERT_CROSS} for family in _BERT_KIN},
    "FlaxRoFormerLayer": _BERT_LAYER,
    "FlaxRobertaPreLayerNormLayer": {
        **_BERT_LAYER,
        **_BERT_CROSS,
        "attn.layer_norm": "attention.LayerNorm",
        "crossattn.layer_norm": "crossattention.LayerNorm",
        "ff.layer_norm": "intermediate.LayerNorm",
    },
    "FlaxRobertaPreLayerNormModule": {"layer_norm": "LayerNorm"},
    "FlaxAlbertLayer": {
        "attn": "attention",
        "attn.q": "attention.query",
        "attn.k": "attention.key",
        "attn.v": "attention.value",
        "attn.proj": "attention.dense",
        "attn.layer_norm": "attention.LayerNorm",
        "ff.w1": "ffn",
        "ff.w2": "ffn_output",
        "ff.layer_norm": "full_layer_layer_norm",
    },
    **{f"Flax{family}Embeddings": _WORD_EMBEDDINGS for family in _ENCODERS},
    **{f"Flax{family}LMPredictionHead": _DECODER for family in ("Bert", "BigBird", "RoFormer")},
    **{f"Flax{family}LMHead": _DECODER for family in _ROBERTA_KIN},
    "FlaxAlbertOnlyMLMHead": _DECODER,
    "FlaxElectraForMaskedLMModule": {"lm_head.proj": "generator_lm_head"},
    "FlaxElectraForCausalLMModule": {"lm_head.proj": "generator_lm_head"},
    **{f"Flax{family}ForTokenClassificationModule": _CLASSIFIER for family in _ENCODERS},
    **{f"Flax{family}ForMultipleChoiceModule": _CLASSIFIER for family in _ENCODERS},
    **{f"Flax{family}ForQuestionAnsweringModule": _QA_OUTPUTS for family in _ENCODERS if family != "BigBird"},
    "FlaxBigBirdForQuestionAnsweringHead": _QA_OUTPUTS,
    **{f"Flax{family}ForSequenceClassificationModule": _CLASSIFIER for family in ("Bert", "Albert")},
    **{f"Flax{family}ClassificationHead": _OUT_PROJ for family in (*_ROBERTA_KIN, "BigBird", "Electra", "RoFormer")},
    "FlaxBertOnlyNSPHead": _NEXT_SENTENCE,
    "FlaxBertPreTrainingHeads": _NEXT_SENTENCE,
    "FlaxBigBirdPreTrainingHeads": _NEXT_SENTENCE,
    "FlaxAlbertSOPHead": _CLASSIFIER,
    "FlaxElectraDiscriminatorPredictions": {"classifier": "dense_prediction"},
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
    "FlaxDistilBertForSequenceClassificationModule": _CLASSIFIER,
    "FlaxDistilBertForTokenClassificationModule": _CLASSIFIER,
    "FlaxDistilBertForMultipleChoiceModule": _CLASSIFIER,
    "FlaxDistilBertForQuestionAnsweringModule": _QA_OUTPUTS,
    # GPT-2 and GPT-SW3, whose query, key and value are one fused module; GPT Neo; GPT-J, whose one norm feeds both
    "FlaxGPT2Block": _GPT2_BLOCK,
    "FlaxGPTNeoBlock": {
        "attn": "attn.attention",
        "attn.q": "attn.attention.q_proj",
        "attn.k": "attn.attention.k_proj",
        "attn.v": "attn.attention.v_proj",
        "attn.proj": "attn.attention.out_proj",
        "attn.layer_norm": "ln_1",
        "ff": "mlp",
        "ff.w1": "mlp.c_fc",
        "ff.w2": "mlp.c_proj",
        "ff.layer_norm": "ln_2",
    },
    "FlaxGPTJBlock": {
        "attn": "attn",
        "attn.q": "attn.q_proj",
        "attn.k": "attn.k_proj",
        "attn.v": "attn.v_proj",
        "attn.proj": "attn.out_proj",
        "attn.layer_norm": "ln_1",
        "ff": "mlp",
        "ff.w1": "mlp.fc_in",
        "ff.w2": "mlp.fc_out",
        "ff.layer_norm": "ln_1",
    },
    **{f"Flax{family}Module": {"embeddings": "wte", "layer_norm": "ln_f"} for family in ("GPT2", "GPTNeo", "GPTJ")},
    "FlaxGPT2LMHeadModule": _LM_HEAD,
    "FlaxGPTNeoForCausalLMModule": _LM_HEAD,
    "FlaxGPTJForCausalLMModule": _LM_HEAD,
    # BLOOM, fused too
    "FlaxBloomBlock": {
        "attn": "self_attention",
        "attn.q": "self_attention.query_key_value",
        "attn.k": "self_attention.query_key_value",
        "attn.v": "self_attention.query_key_value",
        "attn.proj": "self_attention.dense",
        "attn.layer_norm": "input_layernorm",
        "ff": "mlp",
        "ff.w1": "mlp.dense_h_to_4h",
        "ff.w2": "mlp.dense_4h_to_h",
        "ff.layer_norm": "post_attention_layernorm",
    },
    "FlaxBloomModule": {"embeddings": "word_embeddings", "layer_norm": "ln_f"},
    "FlaxBloomForCausalLMModule": _LM_HEAD,
    # Llama, Mistral, Gemma
    **{f"Flax{family}DecoderLayer": LLAMA_LAYER for family in ("Llama", "Mistral", "Gemma")},
    **{
        f"Flax{family}Module": {"embeddings": "embed_tokens", "layer_norm": "norm"}
        for family in ("Llama", "Mistral", "Gemma")
    },
    **{f"Flax{family}ForCausalLMModule": _LM_HEAD for family in ("Llama", "Mistral", "Gemma")},
    # OPT, XGLM
    "FlaxOPTDecoderLayer": _BART_LAYER,
    "FlaxOPTDecoder": {"embeddings": "embed_tokens", "layer_norm": "final_layer_norm"},
    "FlaxOPTForCausalLMModule": _LM_HEAD,
    "FlaxXGLMDecoderLayer": _BART_LAYER,
    "FlaxXGLMModule": {"embeddings": "embed_tokens", "layer_norm": "layer_norm"},
    "FlaxXGLMForCausalLMModule": _LM_HEAD,
    # BART, Blenderbot, Marian, mBART, Pegasus, Whisper
    **{f"Flax{family}EncoderLayer": _BART_LAYER for family in (*_BART_KIN, "Whisper")},
    **{f"Flax{family}DecoderLayer": {**_BART_LAYER, **_BART_CROSS} for family in (*_BART_KIN, "Whisper")},
    **{f"Flax{family}Encoder": _LAYER_NORM for family in _PRE_NORM_KIN},
    **{f"Flax{family}Decoder": _LAYER_NORM for family in _PRE_NORM_KIN},
    "FlaxWhisperDecoder": {"embeddings": "embed_tokens", "layer_norm": "layer_norm"},
    **{f"Flax{family}Module": _SHARED for family in _BART_KIN},
    "FlaxBartDecoderWrapper": {"embeddings": "decoder.embed_tokens"},
    **{
        f"Flax{family}ForConditionalGenerationModule": _LM_HEAD
        for family in (*_BART_KIN, "Whisper")
        if family != "Marian"
    },
    "FlaxMarianMTModule": _LM_HEAD,
    "FlaxBartForCausalLMModule": _LM_HEAD,
    "FlaxBartClassificationHead": _OUT_PROJ,
    "FlaxMBartClassificationHead": _OUT_PROJ,
    "FlaxBartForQuestionAnsweringModule": _QA_OUTPUTS,
    "FlaxMBartForQuestionAnsweringModule": _QA_OUTPUTS,
    "FlaxWhisperForAudioClassificationModule": _CLASSIFIER,
    # T5 and mT5, LongT5
    "FlaxT5LayerSelfAttention": _t5_attention("SelfAttention"),
    "FlaxT5LayerCrossAttention": _t5_attention("EncDecAttention", "crossattn"),
    "FlaxT5LayerFF": _T5_FF,
    "FlaxT5Stack": {"layer_norm": "final_layer_norm"},
    "FlaxT5Module": _SHARED,
    "FlaxT5EncoderModule": _SHARED,
    "FlaxT5ForConditionalGenerationModule": {**_SHARED, **_LM_HEAD},
    "FlaxLongT5LayerSelfAttention": _t5_attention("SelfAttention"),
    "FlaxLongT5LayerLocalSelfAttention": _t5_attention("LocalSelfAttention"),
    "FlaxLongT5LayerTransientGlobalSelfAttention": _t5_attention("TransientGlobalSelfAttention"),
    "FlaxLongT5LayerCrossAttention": _t5_attention("EncDecAttention", "crossattn"),
    "FlaxLongT5LayerFF": _T5_FF,
    "FlaxLongT5Stack": {"layer_norm": "final_layer_norm"},
    "FlaxLongT5Module": _SHARED,
    "FlaxLongT5ForConditionalGenerationModule": {**_SHARED, **_LM_HEAD},
    # ViT, BEiT, DINOv2, whose embeddings are patches
    "FlaxViTLayer": _VIT_LAYER,
    "FlaxViTPatchEmbeddings": _PATCHES,
    "FlaxViTModule": {"layer_norm": "layernorm"},
    "FlaxViTForImageClassificationModule": _CLASSIFIER,
    "FlaxBeitLayer": _VIT_LAYER,
    "FlaxBeitPatchEmbeddings": _PATCHES,
    "FlaxBeitModule": {"layer_norm": "layernorm"},
    "FlaxBeitPooler": {"layer_norm": "layernorm"},
    "FlaxBeitForImageClassificationModule": _CLASSIFIER,
    "FlaxBeitForMaskedImageModelingModule": {"lm_head.proj": "lm_head", "layer_norm": "layernorm"},
    "FlaxDinov2Layer": {
        **_VIT_LAYER,
        "attn.layer_norm": "norm1",
        "ff": "mlp",
        "ff.w1": ("mlp.fc1", "mlp.weights_in"),
        "ff.w2": ("mlp.fc2", "mlp.weights_out"),
        "ff.layer_norm": "norm2",
    },
    "FlaxDinov2PatchEmbeddings": _PATCHES,
    "FlaxDinov2Module": {"layer_norm": "layernorm"},
    "FlaxDinov2ForImageClassificationModule": _CLASSIFIER,
    # CLIP
    "FlaxCLIPEncoderLayer": {
        **_BART_LAYER,
        "attn.layer_norm": "layer_norm1",
        "ff": "mlp",
        "ff.w1": "mlp.fc1",
        "ff.w2": "mlp.fc2",
        "ff.layer_norm": "layer_norm2",
    },
    "FlaxCLIPTextEmbeddings": {"embeddings": "token_embedding"},
    "FlaxCLIPTextTransformer": {"layer_norm": "final_layer_norm"},
    "FlaxCLIPVisionEmbeddings": {"embeddings": "patch_embedding"},
    "FlaxCLIPVisionTransformer": {"layer_norm": "post_layernorm"},
    # wav2vec 2.0
    "FlaxWav2Vec2EncoderLayerStableLayerNorm": {
        "attn": "attention",
        "attn.q": "attention.q_proj",
        "attn.k": "attention.k_proj",
        "attn.v": "attention.v_proj",
        "attn.proj": "attention.out_proj",
        "attn.layer_norm": "layer_norm",
        "ff": "feed_forward",
        "ff.w1": "feed_forward.intermediate_dense",
        "ff.w2": "feed_forward.output_dense",
        "ff.layer_norm": "final_layer_norm",
    },
    "FlaxWav2Vec2StableLayerNormEncoder": _LAYER_NORM,
    "FlaxWav2Vec2ForCTCModule": _LM_HEAD,
    # ResNet and RegNet, which have no attention: a block is the residual layer itself. (RegNet's X layers, like the
    # cross-attention of XGLM, fail in transformers itself.)
    "FlaxResNetBasicLayer": {
        "block": "",
        "conv": ("layer.layer_0.convolution", "layer.layer_1.convolution", "shortcut.convolution"),
    },
    "FlaxResNetBottleNeckLayer": {
        "block": "",
        "conv": (*(f"layer.{i}.convolution" for i in range(3)), "shortcut.convolution"),
    },
    "FlaxResNetClassifierCollection": {"classifier": "1"},
    "FlaxRegNetYLayer": {
        "block": "",
        "conv": (
            *(f"layer.{i}.convolution" for i in (0, 1, 3)),
            *("layer.2.attention.0", "layer.2.attention.2"),  # squeeze and excitation
            "shortcut.convolution",
        ),
    },
    "FlaxRegNetClassifierCollection": {"classifier": "1"},
}
