"""A tiny model of each Flax class that transformers has, and inputs for it."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from transformers.models.auto import modeling_flax_auto

import jdelta  # noqa: F401  (repairs the T5 family)

transformers.logging.set_verbosity_error()

_WORDS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TOKENS = {**_WORDS, "max_position_embeddings": 32}
_LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_STACKS = {
    "d_model": 16,
    **{f"{stack}_layers": 2 for stack in ("encoder", "decoder")},
    **{f"{stack}_attention_heads": 2 for stack in ("encoder", "decoder")},
    **{f"{stack}_ffn_dim": 32 for stack in ("encoder", "decoder")},
}
_ENCODER = {**_TOKENS, **_LAYERS}
_SEQ2SEQ = {**_TOKENS, **_STACKS, "decoder_start_token_id": 2, "forced_eos_token_id": None}
_GPT = {**_WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 32, "n_positions": 32}
_LLAMA = {**_ENCODER, "num_key_value_heads": 1, "head_dim": 8}
_T5 = {**_WORDS, "decoder_start_token_id": 0, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
_VISION = {**_LAYERS, "image_size": 8, "patch_size": 4}

# family, which is the model_type of its configuration -> configuration class and sizes
FAMILIES = {
    "albert": ("AlbertConfig", {**_ENCODER, "embedding_size": 8}),
    "bart": ("BartConfig", _SEQ2SEQ),
    "beit": ("BeitConfig", {**_VISION, "use_relative_position_bias": True}),
    "bert": ("BertConfig", _ENCODER),
    "big_bird": ("BigBirdConfig", {**_ENCODER, "attention_type": "original_full", "block_size": 4}),
    "blenderbot": ("BlenderbotConfig", _SEQ2SEQ),
    "blenderbot-small": ("BlenderbotSmallConfig", _SEQ2SEQ),
    "bloom": ("BloomConfig", {**_WORDS, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "clip": ("CLIPConfig", {"projection_dim": 16}),
    "clip_text_model": ("CLIPTextConfig", {**_ENCODER, "projection_dim": 16}),
    "clip_vision_model": ("CLIPVisionConfig", {**_VISION, "projection_dim": 16}),
    "dinov2": ("Dinov2Config", {**_VISION, "mlp_ratio": 2}),
    "distilbert": ("DistilBertConfig", {**_TOKENS, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}),
    "electra": ("ElectraConfig", {**_ENCODER, "embedding_size": 8}),
    "encoder-decoder": ("EncoderDecoderConfig", {}),
    "gemma": ("GemmaConfig", _LLAMA),
    "gpt2": ("GPT2Config", _GPT),
    "gpt_neo": (
        "GPTNeoConfig",
        {**_TOKENS, "hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 2}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "llama": ("LlamaConfig", _LLAMA),
    "longt5": ("LongT5Config", {**_T5, "local_radius": 3, "global_block_size": 4}),
    "marian": ("MarianConfig", _SEQ2SEQ),
    "mbart": ("MBartConfig", _SEQ2SEQ),
    "mistral": ("MistralConfig", _LLAMA),
    "mt5": ("MT5Config", _T5),
    "opt": ("OPTConfig", {**_ENCODER, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "pegasus": ("PegasusConfig", _SEQ2SEQ),
    "regnet": ("RegNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "groups_width": 4}),
    "resnet": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}),
    "roberta": ("RobertaConfig", _ENCODER),
    "roberta-prelayernorm": ("RobertaPreLayerNormConfig", _ENCODER),
    "roformer": ("RoFormerConfig", _ENCODER),
    "speech-encoder-decoder": ("SpeechEncoderDecoderConfig", {}),
    "t5": ("T5Config", _T5),
    "vision-encoder-decoder": ("VisionEncoderDecoderConfig", {}),
    "vision-text-dual-encoder": ("VisionTextDualEncoderConfig", {"projection_dim": 16}),
    "vit": ("ViTConfig", _VISION),
    "wav2vec2": (
        "Wav2Vec2Config",
        {**_LAYERS, "conv_dim": [8, 8], "conv_kernel": [4, 2], "conv_stride": [4, 2], "feat_extract_norm": "layer"}
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_codevectors_per_group": 4}
        | {"codevector_dim": 8, "proj_codevector_dim": 8, "do_stable_layer_norm": True},
    ),
    "whisper": (
        "WhisperConfig",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
        | {"begin_suppress_tokens": None, "classifier_proj_size": 16},
    ),
    "xglm": ("XGLMConfig", {**_TOKENS, "d_model": 16, "ffn_dim": 32, "num_layers": 2, "attention_heads": 2}),
    "xlm-roberta": ("XLMRobertaConfig", _ENCODER),
}

# family of a composite -> argument of its configuration -> family of that part
_DECODER = {"is_decoder": True, "add_cross_attention": True}
PARTS = {
    "clip": {"text_config": ("clip_text_model", {}), "vision_config": ("clip_vision_model", {})},
    "encoder-decoder": {"encoder": ("bert", {}), "decoder": ("bert", _DECODER)},
    "speech-encoder-decoder": {"encoder": ("wav2vec2", {}), "decoder": ("bart", _DECODER)},
    "vision-encoder-decoder": {"encoder": ("vit", {}), "decoder": ("gpt2", _DECODER)},
    "vision-text-dual-encoder": {"vision_config": ("vit", {}), "text_config": ("bert", {})},
}

# Where transformers' own input_shape is larger than a tiny model needs.
_INPUT_SHAPES = {
    "regnet": (1, 32, 32, 3),
    "resnet": (1, 32, 32, 3),
    "speech-encoder-decoder": ((1, 64), (1, 8)),
    "wav2vec2": (1, 64),
}

# Suffixes of class names; the first that a family has is the class that stands for it.
_HEADS = ("ForConditionalGeneration", "MTModel", "ForSequenceClassification", "ForImageClassification")
_HEADS += ("ForCausalLM", "LMHeadModel", "ForPreTraining", "Model")


@functools.cache
def classes() -> list[str]:
    """The names of all Flax model classes that transformers' auto classes know, sorted."""
    names = set()
    for mapping, table in vars(modeling_flax_auto).items():
        if mapping.startswith("FLAX_MODEL_") and mapping.endswith("MAPPING_NAMES"):
            for value in table.values():
                names.update(value if isinstance(value, tuple) else (value,))
    return sorted(names - {None})


def family_of(class_name: str) -> str:
    """The family of a class, which is a key of `FAMILIES`."""
    return getattr(transformers, class_name).config_class.model_type


def config(family: str, **changes):
    """The tiny configuration of a family. For a composite, `changes` are keyed by part: `decoder={…}`."""
    name, sizes = FAMILIES[family]
    parts = {
        argument: config(part, **{**fixed, **changes.pop(argument, {})}).to_dict()
        for argument, (part, fixed) in PARTS.get(family, {}).items()
    }
    return getattr(transformers, name)(**{**sizes, **parts, **changes})


def one_layer(family: str) -> dict:
    """What changes a family's tiny configuration into one of a single layer, where its layers are all alike."""
    if family in PARTS:
        return {argument: one_layer(part) for argument, (part, _) in PARTS[family].items()}
    names = {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"}
    return {} if family == "gpt_neo" else dict.fromkeys(names & FAMILIES[family][1].keys(), 1)


def build(class_name: str, changes: dict | None = None, **kwargs):
    """A tiny model of a class.

    Args:
      class_name: one of `classes()`, or any other Flax class of the families.
      changes: what differs from the family's tiny configuration, see `config`.
      **kwargs: the constructor's. `_do_init=False` works for the composites too, whose constructors refuse it.
    """
    cls, family = getattr(transformers, class_name), family_of(class_name)
    made = config(family, **(changes or {}))
    if family in _INPUT_SHAPES:
        kwargs.setdefault("input_shape", _INPUT_SHAPES[family])
    if kwargs.get("_do_init", True) or family not in PARTS:
        return cls(made, **kwargs)
    construct = transformers.FlaxPreTrainedModel.__init__

    def without_weights(self, *args, **arguments):
        construct(self, *args, **{**arguments, "_do_init": False})

    with mock.patch.object(transformers.FlaxPreTrainedModel, "__init__", without_weights):
        return cls(made, **{**kwargs, "_do_init": True})


def inputs(model, batch: int = 2, length: int = 8) -> dict[str, jax.Array]:
    """Keyword arguments of a real call.

    Args:
      model: a model, or the name of its class.
      batch: how many examples.
      length: how many tokens, also of the decoder. Images and sounds are of the size that the configuration says.
    """
    class_name = model if isinstance(model, str) else type(model).__name__
    made = config(family_of(class_name)) if isinstance(model, str) else model.config
    rng = np.random.default_rng(0)

    def numbers(*shape):
        return jnp.asarray(rng.normal(size=(batch, *shape)), jnp.float32)

    def tokens(*shape):
        ids = rng.integers(3, 60, (batch, *shape))
        ids[..., -1] = _WORDS["eos_token_id"]  # sequence classification of BART and mBART reads there
        return jnp.asarray(ids, jnp.int32)

    def image(part):
        size = getattr(part, "image_size", 32)
        return {"pixel_values": numbers(part.num_channels, size, size)}

    def sound(part):
        if part.model_type == "whisper":
            return {"input_features": numbers(part.num_mel_bins, 2 * part.max_source_positions)}
        return {"input_values": numbers(128)}

    def text(shape=(length,)):
        return {"input_ids": tokens(*shape)}

    decoder = {"decoder_input_ids": tokens(length)}
    match made.model_type:
        case "clip" | "vision-text-dual-encoder":
            return {**text(), **image(made.vision_config)}
        case "encoder-decoder":
            return {**text(), **decoder}
        case "vision-encoder-decoder":
            return {**image(made.encoder), **decoder}
        case "speech-encoder-decoder":
            return {"inputs": sound(made.encoder)["input_values"], **decoder}
        case "whisper" if class_name.endswith("AudioClassification"):
            return sound(made)
        case "whisper":
            return {**sound(made), **decoder}
        case "wav2vec2":
            return sound(made)
    if hasattr(made, "num_channels"):
        return image(made)
    if class_name.endswith("MultipleChoice"):
        return text((2, length))
    if made.is_encoder_decoder and not class_name.endswith(("CausalLM", "EncoderModel")):
        return {**text(), **decoder}
    return text()


def _representative(family: str) -> str:
    own = [name for name in classes() if family_of(name) == family]
    return next(name for head in _HEADS for name in own if name.endswith(head))


REPRESENTATIVE = {family: _representative(family) for family in sorted({family_of(name) for name in classes()})}
