"""Which method fits which Flax class of transformers, and why not: for the tests that go through all."""

import pytest
import zoo

import jdelta

METHODS = {
    "lora": (jdelta.LoraModel, {"lora_r": 2, "lora_alpha": 2}),
    "adapter": (jdelta.AdapterModel, {"bottleneck_dim": 3, "zero_up": True}),
    "parallel_adapter": (jdelta.ParallelAdapterModel, {"bottleneck_dim": 3, "zero_up": True}),
    "low_rank_adapter": (jdelta.LowRankAdapterModel, {"reduction_factor": 4, "zero_up": True}),
    "compacter": (jdelta.CompacterModel, {"reduction_factor": 2, "zero_up": True}),
    "bitfit": (jdelta.BitFitModel, {}),
    "prefix": (jdelta.PrefixModel, {"prefix_token_num": 2, "embed_dim": 3, "mid_dim": 4}),
    "soft_prompt": (jdelta.SoftPromptModel, {"soft_token_num": 4}),
}
WEIGHT_METHODS = {
    "dora": (jdelta.LoraModel, {"lora_r": 2, "use_dora": True}),
    "pissa": (jdelta.LoraModel, {"lora_r": 2, "init_lora_weights": "pissa"}),
    "adalora": (jdelta.AdaLoraModel, {"init_r": 2, "target_r": 1, "total_step": 10}),
    "hira": (jdelta.HiraModel, {"r": 2}),
    "loha": (jdelta.LohaModel, {"r": 2}),
    "lokr": (jdelta.LokrModel, {"r": 2}),
    "delora": (jdelta.DeloraModel, {"r": 2}),
    "miss": (jdelta.MissModel, {"r": 2}),
    "miss_bat": (jdelta.MissModel, {"r": 2, "init_weights": "bat"}),
    "shira": (jdelta.ShiraModel, {"r": 1}),
    "hra": (jdelta.HRAModel, {"r": 2}),
    "oft": (jdelta.OFTModel, {"oft_block_size": 2}),
    "vera": (jdelta.VeraModel, {"r": 2}),
    "road": (jdelta.RoadModel, {"group_size": 2}),
    "ia3": (jdelta.IA3Model, {}),
    "c3a": (jdelta.C3AModel, {"block_size": 2}),
    "fourierft": (jdelta.FourierFTModel, {"n_frequency": 3}),
    "randlora": (jdelta.RandLoraModel, {"r": 2}),
    "gralora": (jdelta.GraLoraModel, {"r": 2}),
    "ln_tuning": (jdelta.LNTuningModel, {}),
    "trainable_tokens": (jdelta.TrainableTokensModel, {"token_indices": [1, 3]}),
}
ALL = METHODS | WEIGHT_METHODS
# Names of leaves that never train.
FROZEN = {
    "pissa": {"a0", "b0"},
    "delora": {"w_norm"},
    "shira": {"indices"},
    "vera": {"a", "b"},
    "randlora": {"a", "b"},
}
# Default positions by common names, as `methods.md` has them: every module that has one of these names.
POSITIONS = {
    "lora": ["attn.q", "attn.v"],
    "adapter": ["attn.proj", "ff.w2"],
    "parallel_adapter": ["attn", "ff.w2"],
    "low_rank_adapter": ["attn.proj", "ff.w2"],
    "compacter": ["attn.proj", "ff.w2"],
    "prefix": ["attn"],
    "bitfit": ["attn", "crossattn", "ff", "layer_norm", "lm_head.proj"],  # and below them
    "soft_prompt": ["embeddings"],  # the first
    "trainable_tokens": ["embeddings"],  # likewise
    "ia3": ["attn.k", "attn.v", "crossattn.k", "crossattn.v", "ff.w2"],
    **{key: ["attn.q", "attn.v"] for key in WEIGHT_METHODS.keys() - {"ia3", "ln_tuning", "trainable_tokens"}},
}
WITHOUT_ATTENTION = {
    **{key: ["conv"] for key in ("lora", *WEIGHT_METHODS)},
    "adapter": ["block"],
    "low_rank_adapter": ["block"],
    "compacter": ["block"],
    "bitfit": ["block"],
}

NO_ATTENTION, NO_TOKENS, DECODER_TOKENS = "no attention", "no tokens", "tokens in the decoder alone"
# what the errors say of it
MESSAGES = {
    NO_ATTENTION: "has none of the common names attn",
    NO_TOKENS: "take no token ids|it is no embedding|has none of the common names embeddings",
    DECODER_TOKENS: "takes the tokens of a decoder whose encoder takes none",
}
# family or class -> method -> why it does not fit
REASONS = {
    **{family: {"soft_prompt": NO_TOKENS} for family in ("vit", "beit", "dinov2", "wav2vec2", "resnet", "regnet")},
    **{family: {"soft_prompt": DECODER_TOKENS} for family in ("vision-encoder-decoder", "speech-encoder-decoder")},
    "FlaxWhisperModel": {"soft_prompt": DECODER_TOKENS},
    "FlaxWhisperForConditionalGeneration": {"soft_prompt": DECODER_TOKENS},
    "FlaxWhisperForAudioClassification": {"soft_prompt": NO_TOKENS},
}
for _family in ("resnet", "regnet"):
    REASONS[_family] |= {"parallel_adapter": NO_ATTENTION, "prefix": NO_ATTENTION, "ia3": NO_ATTENTION}
    REASONS[_family] |= {"hra": NO_ATTENTION, "oft": NO_ATTENTION}  # they change features that a convolution windows
# Leaves that train and cannot matter: the cross-attention of a decoder that is called without an encoder.
UNREACHED = {"FlaxBartForCausalLM": r"encoder_attn"}


def reason(name: str, method: str) -> str | None:
    if method == "trainable_tokens" and (why := reason(name, "soft_prompt")):
        return None if why == DECODER_TOKENS else why
    return REASONS.get(name, REASONS.get(zoo.family_of(name), {})).get(method)


def attach(model, name: str, method: str):
    """The delta at default positions, or `None` where it does not fit and says so."""
    cls, arguments = ALL[method]
    if (why := reason(name, method)) is None:
        return cls(model, **arguments)
    with pytest.raises((TypeError, ValueError), match=MESSAGES[why]):
        cls(model, **arguments)
    return None
