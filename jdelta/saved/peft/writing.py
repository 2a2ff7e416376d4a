"""To PEFT: a delta becomes the files that PEFT saves."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from jdelta.core import weights
from jdelta.core.edits import WeightEdit
from jdelta.core.linear import linear_map
from jdelta.core.linear_maps import ConvMap, EinsumMap, LookupMap, MatrixMap
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.core.warn import warn
from jdelta.methods.lora import LoraConfig
from jdelta.methods.lora_rules import takes_from_weight
from jdelta.methods.prefix import PrefixConfig
from jdelta.methods.soft_prompt import SoftPromptConfig, has_pooler
from jdelta.methods.trainable_tokens import TrainableTokensConfig
from jdelta.names import common_names
from jdelta.saved import folder
from jdelta.saved.finetuned import BackboneInfo, Finetuned, listing
from jdelta.saved.peft.limits import (
    copies_of,
    require_embedding,
    require_no_cross_attention,
    require_same,
    require_same_lora,
)
from jdelta.saved.peft.names import CONFIG, NORM, PROMPT, TENSORS, TOKENS, Names, modules_of, owner, shapes_of, to_torch
from jdelta.saved.peft.torch_leaves import Parts
from jdelta.saved.peft.trained import in_torch, owners_of, trained_leaves
from jdelta.saved.peft.tuners import TUNERS
from jdelta.saved.peft.tuners.tuner import REPLACED_BY, Tuner
from jdelta.trees import addressing

Written = tuple[dict[str, Any], dict[str, np.ndarray]]


def to_peft(found: Finetuned, structure: Structure, path: str | os.PathLike[str]) -> None:
    """Writes a delta as PyTorch PEFT saves it; the rest is as in `DeltaModel.to_peft`.

    Args:
      found: the trained delta, a prefix as it is without its network.
      structure: the modules of its backbone.
      path: the folder.

    Raises:
      OSError: as `folder.replace`. Nothing has changed then.
      ValueError: PEFT has no such method, or cannot train those leaves of the backbone's.
    """
    writer = _WRITERS.get(found.config.delta_type)
    if writer is None:
        raise ValueError(
            f"PEFT has no method for {found.config.delta_type!r}. It takes: {', '.join(_WRITERS)}; save_finetuned "
            "saves every delta."
        )
    if found.inserted:
        raise ValueError(f"PEFT has no place for layers that were put in by hand, at {listing(found.inserted)}.")
    if "" in found.targets:
        raise ValueError("PEFT changes modules inside a model, and this delta is attached at the model itself.")
    fields, tensors = writer(found, structure)
    base = (found.backbone or BackboneInfo("")).name or None
    fields = {"base_model_name_or_path": base, "task_type": None, "inference_mode": True} | fields
    contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    files = {
        TENSORS: save(contiguous, metadata={"format": "pt"}),
        CONFIG: (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode(),
    }
    folder.replace(path, files, CONFIG)


def _write_lora(found: Finetuned, structure: Structure) -> Written:
    config: LoraConfig = found.config  # type: ignore[assignment]
    names, doubled = Names.of(structure), takes_from_weight(config.init_lora_weights)
    tensors: dict[str, np.ndarray] = {}
    for host in found.targets:
        info = structure[host]
        parts = names.torch(host)
        require_same_lora(info, parts[0])
        a, b = (found.values[f"{host}.{found.name}.{leaf}"] for leaf in "ab")
        if doubled:  # as PEFT writes it: the difference to the start
            a0, b0 = (found.values[f"{host}.{found.name}.{leaf}0"] for leaf in "ab")
            a, b = np.concatenate([a, a0], axis=-1), np.concatenate([b, -b0])
        _require_one_layer(found, structure, host)
        tensors |= _factors(info, parts, a, b)
        if config.use_dora:
            if len(parts) > 1:
                raise ValueError(f"DoRA at {host}, which is {' and '.join(parts)} in PyTorch, is not written.")
            norms = found.values[f"{host}.{found.name}.m"].reshape(-1)
            shape = (1, -1, *(1,) * (a.ndim - 2)) if isinstance(linear_map(info), ConvMap) else (-1,)
            tensors[f"{parts[0]}.lora_magnitude_vector"] = norms.reshape(shape)
    ranks = 2 if doubled else 1
    alphas = math.sqrt(ranks) if config.use_rslora else float(ranks)
    r, alpha = ranks * config.lora_r, alphas * config.lora_alpha
    hosts = _hosts(found, names)
    own = {f"^{re.escape(part)}": host for part, host in hosts.items()}
    fields = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": _whole(alpha),
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": {key: ranks * n for key, host in own.items() if (n := config.rank_of(host)) != config.lora_r},
        "alpha_pattern": {
            key: _whole(alphas * own_alpha)
            for key, host in own.items()
            if (own_alpha := config.alpha_of(host)) != config.lora_alpha
        },
        "fan_in_fan_out": any(_is_transposed(structure[host]) for host in found.targets),
    }
    return _write_modules(found, names, fields, tensors, "lora_only")


def _write_tuner(tuner: Tuner, found: Finetuned, structure: Structure) -> Written:
    """What PEFT has of a method that changes weights of modules."""
    names, config = Names.of(structure), found.config
    tensors: dict[str, np.ndarray] = {}
    rules: dict[str, Any] = {}
    for host in found.targets:
        info, parts = structure[host], names.torch(host)
        require_same(tuner, info, parts[0], parts)
        _require_one_layer(found, structure, host)
        edit = next(each for each in config.edits(info, structure) if isinstance(each, WeightEdit))
        rules[parts[0]] = edit.rule
        keys = {leaf: f"{host}.{found.name}.{leaf}" for leaf in tuner.tensors}  # an option may leave some out
        own = {leaf: jnp.asarray(found.values[key]) for leaf, key in keys.items() if key in found.values}
        seen = {leaf: np.asarray(value) for leaf, value in weights.seen_own(edit, own).items()}
        tuner.require_fit(seen, *weights.layout_of(edit).matrix_shape(edit.shape))
        written = tuner.written_at(edit, seen)
        tensors |= {f"{parts[0]}.{tuner.tensors[leaf]}": value for leaf, value in written.items()}
    hosts = _hosts(found, names)
    fields = {"peft_type": tuner.kind, **{field: getattr(config, field) for field in tuner.fields}}
    for pattern in config.pattern_fields:
        if pattern not in tuner.patterns:
            if getattr(config, pattern) and pattern not in tuner.read_fields:
                raise ValueError(f"PEFT has no {pattern} of {tuner.kind}, and this delta has one.")
            continue
        usual = getattr(config, REPLACED_BY[pattern])
        own_value = {
            part: addressing.first_match(getattr(config, pattern), host, usual) for part, host in hosts.items()
        }
        fields[pattern] = {f"^{re.escape(part)}": value for part, value in own_value.items() if value != usual}
    if tuner.conv1d:
        fields["fan_in_fan_out"] = any(_is_transposed(structure[host]) for host in found.targets)
    fields |= tuner.written_fields(config, hosts) | tuner.fields_at(rules)
    fields, written = _write_modules(found, names, fields, tensors, tuner.biases)
    kept = {leaf: f"{found.name}.{leaf}" for leaf in tuner.shared}
    shared = {leaf: found.values[key] for leaf, key in kept.items() if key in found.values}
    return fields, written | {f"base_model.{k}": v for k, v in tuner.written_shared(shared, [*hosts]).items()}


def _write_norms(found: Finetuned, structure: Structure) -> Written:
    names = Names.of(structure)
    tensors: dict[str, np.ndarray] = {}
    values = dict(found.values)
    for host in found.targets:
        _require_one_layer(found, structure, host)
        for leaf in (f"{host}.{key}" for key in structure[host].params):
            if leaf in values:  # what is frozen is as it was
                for name, value in names.in_torch(leaf, values.pop(leaf)).items():
                    tensors[f"{owner(name)}.{NORM}.{name.rpartition('.')[2]}"] = value
    others = dataclasses.replace(found, values=values, own=frozenset())
    return _write_modules(others, names, {"peft_type": "LN_TUNING"}, tensors, "")


def _require_one_layer(found: Finetuned, structure: Structure, host: str) -> None:
    """Raises `ValueError` for a module inside `nn.scan`, whose leaves have an axis of layers."""
    shapes = shapes_of(structure.params)
    if any(shapes[f"{host}.{key}"] != leaf.shape for key, leaf in structure[host].params.items()):
        raise ValueError(
            f"{found.name!r} at {host} has leaves for several layers (nn.scan), and PEFT has a module for each."
        )


def _hosts(found: Finetuned, names: Names) -> dict[str, str]:
    """PyTorch's name of each module with a delta to the one here."""
    return {part: host for host in found.targets for part in names.torch(host)}


def _write_modules(
    found: Finetuned, names: Names, fields: dict[str, Any], tensors: Mapping[str, np.ndarray], only: str
) -> Written:
    """What a method at modules has in common with others: what trained besides, and where it is.

    Args:
      found: the delta.
      names: of the model.
      fields: those that the method has.
      tensors: those of its modules.
      only: what it calls the biases of its modules in `bias`; empty if it trains none.
    """
    modules, biases = trained_leaves(found, names)
    saved = in_torch((*modules, *biases), found, names)
    hosts = _hosts(found, names)
    of_hosts = {f"{part}.bias" for part in hosts} & saved.keys()
    for bias in of_hosts:  # PEFT puts its module in the place of its host, which then is inside
        saved[f"{owner(bias)}.base_layer.bias"] = saved.pop(bias)
    if biases and not only:
        raise ValueError(f"PEFT trains no biases with {fields['peft_type']}; here {listing(sorted(biases))} trained.")
    shared: dict[str, Any] = {"target_modules": [*hosts], "modules_to_save": owners_of(modules, names) or None}
    if only:
        shared["bias"] = "none" if not biases else only if len(biases) == len(of_hosts) else "all"
    return fields | shared, {f"base_model.model.{key}": value for key, value in {**tensors, **saved}.items()}


def _is_transposed(host: ModuleInfo) -> bool:
    linear = linear_map(host)
    return isinstance(linear, MatrixMap) and linear.transposed


def _factors(host: ModuleInfo, parts: Parts, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """PEFT's tensors of the LoRA at a module. Where that is several in PyTorch, each has `a` and its part of `b`."""
    name = parts[0]
    linear = linear_map(host)
    if isinstance(linear, LookupMap):
        return {f"{name}.lora_embedding_A": a.T, f"{name}.lora_embedding_B": b.T}
    if isinstance(linear, ConvMap):
        ones = (1,) * (a.ndim - 2)
        return {f"{name}.lora_A.weight": to_torch(a), f"{name}.lora_B.weight": b.T.reshape(*b.shape[::-1], *ones)}
    if isinstance(linear, EinsumMap) and linear.layout(host.params[linear.weights].shape).shared:
        raise ValueError(f"LoRA at {name}: PEFT has no module with weights for each row, as {linear.equation!r} has.")
    r = len(b)
    columns = np.split(b.reshape(r, -1).T, len(parts))
    return {f"{part}.lora_A.weight": a.reshape(-1, r).T for part in parts} | {
        f"{part}.lora_B.weight": column for part, column in zip(parts, columns, strict=True)
    }


def _write_tokens(found: Finetuned, structure: Structure) -> Written:
    assert isinstance(found.config, TrainableTokensConfig)
    names, config = Names.of(structure), found.config
    hosts = [target if target in structure.modules else owner(target) for target in found.targets]  # or of a leaf
    tensors: dict[str, np.ndarray] = {}
    for host in hosts:
        name = names.torch(host)[0]
        require_embedding(name, names)
        (value,) = (value for key, value in found.values.items() if key.startswith(f"{host}.{found.name}."))
        tensors |= {f"{part}.{TOKENS}": value for part in (name, *copies_of(host, names))}
    fields = {
        "peft_type": "TRAINABLE_TOKENS",
        "token_indices": list(config.token_indices),
        "init_weights": config.init_weights,
    }
    whole, written = _write_modules(dataclasses.replace(found, targets=hosts), names, fields, tensors, "")
    if modules := whole.pop("modules_to_save"):
        raise ValueError(f"PEFT trains nothing besides with TRAINABLE_TOKENS; here {listing(modules)} trained.")
    return whole, written


def _write_prefix(found: Finetuned, structure: Structure) -> Written:
    require_no_cross_attention(structure)
    layers = [info.name for info in common_names.resolve(structure, ["attn"])]
    if missing := sorted({*layers} ^ {*found.targets}):
        raise ValueError(
            f"PEFT has a prefix in every attention layer, {len(layers)} in this model; this one is in "
            f"{len(found.targets)} modules. They differ at {listing(missing)}."
        )
    assert isinstance(found.config, PrefixConfig)
    if not found.config.shift_positions:
        _warn_of_other_numbers(found, "counts a prefix as positions", "shift_positions")
    rows = [found.values[f"{host}.{found.name}.{leaf}"] for host in layers for leaf in ("keys", "values")]
    tokens, heads, width = rows[0].shape
    fields = {
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "encoder_hidden_size": heads * width,
        "num_layers": len(layers),
        "num_attention_heads": heads,
        "token_dim": heads * width,
    }
    return _write_virtual(found, structure, fields, np.stack(rows, 1).reshape(tokens, -1))


def _write_soft_prompt(found: Finetuned, structure: Structure) -> Written:
    (host,) = found.targets
    assert isinstance(found.config, SoftPromptConfig)
    if host not in structure.modules:
        raise ValueError(
            f"PEFT's prompts are those of a word embedding that is called, and {host!r} is run by a method."
        )
    if has_pooler(structure, structure[host]) and not found.config.pool_prompt:
        _warn_of_other_numbers(found, "pools the prompt's first position", "pool_prompt")
    rows = found.values[f"{host}.{found.name}.embedding"]
    fields = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "token_dim": rows.shape[1]}
    return _write_virtual(found, structure, fields, rows)


def _warn_of_other_numbers(found: Finetuned, does: str, field: str) -> None:
    warn(
        f"to_peft: PEFT {does}, and delta {found.name!r} was trained without that, so that PEFT computes other numbers "
        f"with it. Train it with {field}=True."
    )


# What PEFT calls a task by the end of a model's class; and the heads that it then saves with a prompt.
_TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", ()),
    "MTModel": ("SEQ_2_SEQ_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
    "Model": ("FEATURE_EXTRACTION", ()),
}


def _write_virtual(found: Finetuned, structure: Structure, fields: dict[str, Any], rows: np.ndarray) -> Written:
    """What prefix tuning and prompt tuning have in common."""
    kind = (found.backbone or BackboneInfo("")).kind
    task, heads = next((value for end, value in _TASKS.items() if kind.endswith(end)), (None, ()))
    if task is None:
        raise ValueError(f"PEFT needs to know the task of a prompt, and {kind!r} does not tell.")
    names = Names.of(structure)
    modules, biases = trained_leaves(found, names)
    if biases:
        raise ValueError(f"PEFT trains no biases with a prompt; here {listing(sorted(biases))} trained.")
    saves = [name for name in modules_of(structure) if name.endswith(heads)]
    for name in saves:
        if not any(leaf.startswith(f"{name}.") for leaf in modules):
            raise ValueError(
                f"for {task}, PEFT saves {name!r} with a prompt, and this delta does not train it. Call "
                f"freeze_module(exclude=['deltas', {name!r}]) before."
            )
    saved = {f"base_model.{name}": value for name, value in in_torch(modules, found, names).items()}
    # of a head with modules inside, PEFT adds the name of the whole, and fails on both
    wholes = (next((f"{n}." for n in saves if m.startswith(f"{n}.")), m) for m in modules)
    shared = {
        "task_type": task,
        "num_virtual_tokens": len(rows),
        "num_transformer_submodules": 1,
        "modules_to_save": owners_of(wholes, names) or None,
    }
    return fields | shared, {PROMPT: rows, **saved}


_WRITERS: dict[str, Callable[[Finetuned, Structure], Written]] = {
    "lora": _write_lora,
    "ln_tuning": _write_norms,
    "trainable_tokens": _write_tokens,
    "prefix": _write_prefix,
    "soft_prompt": _write_soft_prompt,
    **{tuner.method.delta_type: functools.partial(_write_tuner, tuner) for tuner in TUNERS.values()},
}


def _whole(number: float) -> float:
    """The number, as an `int` if it is one."""
    return int(number) if number == int(number) else number
