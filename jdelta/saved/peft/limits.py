"""What jdelta lacks of PEFT, or means otherwise: it is refused, so that nothing is computed differently in silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from flax import linen as nn

from jdelta.core.config import as_type, require_positive_int, shown
from jdelta.core.linear import linear_map
from jdelta.core.linear_maps import LookupMap, MatrixMap
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.names import common_names
from jdelta.saved.peft.names import CONFIG, PROMPT, TOKENS, Names, owner, shapes_of
from jdelta.saved.peft.tuners import TUNERS
from jdelta.saved.peft.tuners.tuner import Tuner

# The fields that are read, or that change nothing once the values are there. Others that are set are refused.
_COMMON = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("task_type", "modules_to_save"),
}
_TARGETING = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias"}
_VIRTUAL = {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
_KNOWN = {
    "LORA": {
        *_TARGETING,
        *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
        *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("runtime_config", "megatron_core", "qalora_group_size"),
    },
    "PREFIX_TUNING": {*_VIRTUAL, "encoder_hidden_size", "prefix_projection", "init_weights"},
    "PROMPT_TUNING": {
        *_VIRTUAL,
        *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    },
    "LN_TUNING": {"target_modules", "exclude_modules"},
    "TRAINABLE_TOKENS": {"target_modules", "token_indices", "init_weights"},
    **{
        kind: {*_TARGETING, *tuner.fields, *tuner.patterns, *tuner.other_fields, *tuner.read_fields}
        for kind, tuner in TUNERS.items()
    },
}
_NEEDED = {
    "LORA": ("r", "lora_alpha"),
    "PREFIX_TUNING": ("num_virtual_tokens", "token_dim", "num_attention_heads"),
    "PROMPT_TUNING": ("num_virtual_tokens",),
    "TRAINABLE_TOKENS": ("token_indices",),
}
_ONLY = sorted({"lora_only", *(tuner.biases for tuner in TUNERS.values())} - {""})
_TYPES: dict[str, Any] = {
    **dict.fromkeys(("r", "num_virtual_tokens", "token_dim", "num_attention_heads"), int),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), float),
    "use_rslora": bool,
    "use_dora": bool,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "lambda_pattern": dict[str, float] | None,
    "modules_to_save": tuple[str, ...] | None,
    "bias": Literal["none", "all", *_ONLY],
    "init_lora_weights": bool | str | None,
}
_TYPES_OF: dict[str, dict[str, Any]] = {"ADALORA": {"rank_pattern": dict[str, tuple[bool, ...]] | None}}  # its own
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # those that leave the backbone's weights alone
_REPEATED = ("pissa", "olora")  # those whose change of the weights follows from these


def known_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, those that are read each of its type.

    Raises:
      TypeError, ValueError: a field is missing, wrong or an unsupported option. The message names it.
    """
    kind = as_type("peft_type", given["peft_type"], str)
    types = _TYPES | _TYPES_OF.get(kind, {})
    fields = {key: as_type(key, value, types[key]) if key in types else value for key, value in given.items()}
    if kind not in _KNOWN:
        raise ValueError(f"peft_type={shown(kind)} is not supported. Supported are: {', '.join(_KNOWN)}.")
    for field in _NEEDED.get(kind, ()):
        if field not in fields:
            raise ValueError(f"{CONFIG} lacks {field!r}, which {kind} needs.")
        if isinstance(fields[field], int):
            require_positive_int(field, fields[field])
    for field, value in fields.items():
        if value and field not in _COMMON and field not in _KNOWN[kind]:
            raise ValueError(
                f"{field}={shown(value)} is an unsupported option of {kind}. If PEFT can merge the adapter into the "
                "weights, merge it there and load the model."
            )
    if (init := fields.get("init_lora_weights")) not in (*_INITS, *_REPEATED):
        raise ValueError(
            f"init_lora_weights={shown(init)} changed the weights of the backbone before training, and jdelta does not "
            "repeat that. Save it as a plain LoRA: save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…)."
        )
    return fields


def require_same_lora(host: ModuleInfo | None, name: str) -> None:
    """Raises `ValueError` where LoRA in PEFT and in jdelta are two things. `name` is PyTorch's."""
    if host is None:
        raise ValueError(f"LoRA at {name!r}: in Flax, this module is not called, and cannot carry a delta.")
    if issubclass(host.type, nn.Embed) and name.rpartition(".")[2] == "shared":
        raise ValueError(
            f"LoRA at {name!r}: PyTorch's encoder and decoder hold the shared embedding under names of their own, so "
            "that LoRA there changes nothing in PEFT, and in jdelta it would. Leave that module out."
        )
    if host.fields.get("feature_group_count", 1) > 1:
        raise ValueError(f"LoRA at {name!r}: PEFT splits it otherwise than jdelta in a convolution of groups.")


def require_same(tuner: Tuner, host: ModuleInfo | None, name: str, parts: Sequence[str]) -> None:
    """Raises `ValueError` where another method in PEFT and in jdelta are two things, as far as is known.

    Args:
      tuner: the method.
      host: the module that it is at; `None` if it is not called.
      name: PyTorch's name of it.
      parts: PyTorch's names of all modules that the host is there.
    """
    if host is None:
        raise ValueError(f"{tuner.kind} at {name!r}: in Flax, this module is not called, and cannot carry a delta.")
    if len(parts) > 1:
        raise ValueError(
            f"{tuner.kind} at {name!r}: {' and '.join(parts)} are one module in Flax, {host.name!r}, and what they "
            "have cannot be joined there. LoRA can."
        )
    linear = linear_map(host)
    layout = linear.layout(host.params[linear.weights].shape)
    is_conv1d = isinstance(linear, MatrixMap) and linear.transposed
    if not isinstance(linear, tuner.linear) or layout.shared or (is_conv1d and not tuner.conv1d):
        raise ValueError(
            f"{tuner.kind} at {name!r}, {host.type.__name__}: that is not exchanged with PEFT. save_finetuned saves it."
        )


def require_embedding(name: str, names: Names) -> ModuleInfo:
    """The module of this name of PyTorch's. Raises `ValueError` if it is no embedding that is called."""
    info = names.structure.modules.get(names.module(name))
    if info is None:
        raise ValueError(f"{TOKENS} at {name!r}: in Flax, this module is not called. save_finetuned saves it.")
    if not isinstance(linear_map(info), LookupMap):
        raise ValueError(f"{TOKENS} at {name!r}, {info.type.__name__}: that is no embedding.")
    return info


def copies_of(host: str, names: Names) -> tuple[str, ...]:
    """PyTorch's names of the modules to which PEFT gives the rows of an embedding too, because they are tied to it.

    Raises:
      ValueError: PEFT computes something else with them.
    """
    (name,) = names.torch(host)
    around, _, last = name.rpartition(".")
    is_tied = host in names.structure.tied
    if not is_tied and last == "shared":
        raise ValueError(
            f"{TOKENS} at {name!r}: PyTorch's encoder and decoder hold the shared embedding under names of their own, "
            "which PEFT changes only where the head is tied to it."
        )
    if not is_tied:
        return ()
    heads = common_names.places(names.structure, ["lm_head.proj"])
    if len(heads) != 1:
        raise ValueError(f"{TOKENS} at {name!r}: something computes with the embedding that is no head known here.")
    (head,) = heads
    biases = {f"{head}.bias", f"{owner(head)}.bias"} & shapes_of(names.structure.params).keys()
    if biases:  # with PEFT 0.21 even untrained rows change the output
        raise ValueError(f"{TOKENS} at {name!r}: PEFT computes the tied head {head!r} without its bias.")
    stacks = [f"{around}.{part}".lstrip(".") for part in ("encoder", "decoder") if last == "shared"]
    return (head, *(f"{stack}.embed_tokens" for stack in stacks))


def require_no_cross_attention(structure: Structure) -> None:
    """Raises `ValueError` for an encoder-decoder, where the version of PEFT decides what a prefix means."""
    cross = common_names.known(structure, ["crossattn"])
    if cross:
        raise ValueError(
            f"prefix tuning of a model with cross-attention, at {cross[0].name}: which rows of {PROMPT} are whose "
            "differs between versions of PEFT, and newer ones leave cross-attention out. Only models without can "
            "exchange a prefix."
        )
