"""Deltas in the format of PyTorch PEFT, both ways: LoRA, prefix tuning and prompt tuning.

A folder of PEFT holds `adapter_config.json` and `adapter_model.safetensors`. Its names are those of the PyTorch model,
which transformers' Flax classes share but for a few; its matrices are transposed, `(out, in)`. Which modules carry LoRA
is read off the tensors' names, so that it does not matter how `target_modules` and its like describe them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta
from safetensors.numpy import save

from jdelta import addressing, backbone, common_names, folder, freezing, hub, surgery
from jdelta.auto import AutoDeltaModel
from jdelta.config import DeltaConfig
from jdelta.delta import DeltaModel
from jdelta.finetuned import BackboneInfo, Finetuned, listing
from jdelta.methods.lora import LoraConfig
from jdelta.methods.prefix import PrefixConfig
from jdelta.methods.soft_prompt import SoftPromptConfig
from jdelta.structure import ModuleInfo, Structure
from jdelta.surgery import Tree

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PROMPT = "prompt_embeddings"

Tensors = Mapping[str, np.ndarray]
Leaves = dict[tuple[str, str], np.ndarray]  # by the host's name and the leaf's, ("…query", "a"); "" is the only host


def from_peft(
    source: str | os.PathLike[str], backbone_model: Any, name: str | None = None, revision: str | None = None
) -> DeltaModel:
    """Attaches an adapter that PyTorch PEFT saved, with its values and with what else was trained with it.

        delta = jdelta.from_peft("out/", backbone_model=model)

    LoRA (of any rank pattern, on dense layers, convolutions and embeddings), prefix tuning and prompt tuning become a
    `LoraModel`, a `PrefixModel` and a `SoftPromptModel` that compute what PEFT does. `modules_to_save` and trained
    biases go into the backbone's leaves, and train further with the delta. Two things PEFT does differently: it counts
    a prefix as positions (pass `position_ids` that begin at `prefix_token_num` for its numbers), and it returns a
    prompt's positions among the outputs.

    Args:
      source: a folder, or `"user/name"` on the Hub.
      backbone_model: the Flax model of the same class; a backbone without its head, or with one, will do as well.
      name: the delta's name in the tree; by default that of its method.
      revision: branch, tag or commit of the repository.

    Raises:
      FileNotFoundError: no such folder or repository, or one of the two files is not in it.
      PermissionError, ConnectionError: of the Hub.
      TypeError: the backbone is none.
      ValueError: a file is damaged, asks for something that jdelta lacks (the message names the field), or does not
        fit the model. The model is then as it was.
    """
    face = backbone.face_of(backbone_model)
    if face.params is None:
        raise ValueError("the model holds no parameters that the values could go into. Give it some: model.params = ….")
    path = hub.fetch(source, revision, (CONFIG, TENSORS))
    fields, tensors = _read(path)
    names = _Names.of(backbone.trace(face), getattr(backbone_model, "base_model_prefix", ""))
    try:
        adapter = _reader(fields)(fields, tensors, names)
        with backbone.unchanged_on_error(face):
            return _attached(adapter, backbone_model, name)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def to_peft(found: Finetuned, structure: Structure, path: str | os.PathLike[str]) -> None:
    """Writes a delta as PyTorch PEFT saves it; the rest is as in `DeltaModel.to_peft`.

    Args:
      found: the trained delta, a prefix as it is without its network.
      structure: the modules of its backbone.
      path: the folder.

    Raises:
      OSError: no permission, no space, or the path is a file. Nothing has changed then.
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
        raise ValueError("PEFT changes modules inside a model, and this delta sits on the model itself.")
    fields, tensors = writer(found, structure)
    base = (found.backbone or BackboneInfo("")).name or None
    fields = {"base_model_name_or_path": base, "task_type": None, "inference_mode": True} | fields
    contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    _write(
        Path(path),
        {
            TENSORS: save(contiguous, metadata={"format": "pt"}),
            CONFIG: (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode(),
        },
    )


# --- names and layouts


@dataclasses.dataclass(frozen=True)
class _Names:
    """The names of a Flax model by those of its PyTorch class.

    Attributes:
      structure: the Flax model.
      prefix: the name of the base model in models with a head.
      modules: every module that has leaves, itself or inside: PyTorch's name to Flax'.
      leaves: Flax names.
    """

    structure: Structure
    prefix: str
    modules: Mapping[str, str]
    leaves: frozenset[str]

    @classmethod
    def of(cls, structure: Structure, prefix: str) -> _Names:
        modules = {_torch_name(module): module for module in _modules(structure)}
        return cls(structure, prefix, modules, frozenset(_shapes(structure.params)))

    def module(self, name: str) -> str:
        """The Flax name of a module. Raises `ValueError` if the model lacks it."""
        for candidate in (name, f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}.")):
            if candidate in self.modules:
                return self.modules[candidate]
        reason = self.structure.uncalled.get(name)
        near = addressing.closest([*self.modules], name)
        raise ValueError(
            f"the adapter changes {name!r}, a module that this model lacks."
            + (f" {reason}" if reason else f" Closest: {', '.join(near)}." if near else "")
            + " Load the model class that the adapter was trained on."
        )

    def leaf(self, name: str) -> str:
        """The Flax name of a leaf of the backbone's own. Raises `ValueError` if the model lacks it."""
        above, _, last = name.rpartition(".")
        module = self.module(above)
        for candidate in ("kernel", "embedding", "scale", "weight") if last == "weight" else (last,):
            if f"{module}.{candidate}" in self.leaves:
                return f"{module}.{candidate}"
        raise ValueError(f"the adapter changes {name!r}, and {module!r} has no such leaf in this model.")


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """The shapes of a tree's leaves by name."""
    leaves = surgery.flatten(surgery.parameters(tree)).items()
    return {surgery.name_of(path): meta.unbox(leaf).shape for path, leaf in leaves if leaf is not surgery.empty_node}


def _modules(structure: Structure) -> list[str]:
    """The names of all modules that have leaves, themselves or inside."""
    paths = surgery.flatten(structure.params)
    return list(dict.fromkeys(surgery.name_of(path[:i]) for path in paths for i in range(1, len(path))))


def _torch_name(name: str) -> str:
    """PyTorch's name of a Flax module: the same, but for the layers of ResNet."""
    return re.sub(r"\blayer\.layer_(\d+)\b", r"layer.\1", name)


def _torch_leaf(name: str) -> str:
    """PyTorch's name of a Flax leaf."""
    module, _, last = name.rpartition(".")
    return f"{_torch_name(module)}.{'weight' if last in ('kernel', 'embedding', 'scale') else last}"


def _turned(array: np.ndarray) -> np.ndarray:
    """From PyTorch's `(out, in, *window)` to Flax' `(*window, in, out)`."""
    return array.transpose(*range(2, array.ndim), 1, 0)


def _turned_back(array: np.ndarray) -> np.ndarray:
    """The inverse of `_turned`."""
    return array.transpose(-1, -2, *range(array.ndim - 2))


def _fitted(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The array with several axes where PyTorch has one; unchanged if it does not fit, which loading then reports."""
    return array.reshape(shape) if array.ndim != len(shape) and array.size == np.prod(shape) else array


def _exact(name: str, names: Iterable[str]) -> str:
    """A pattern that means this name and no other."""
    return f"[r]^{re.escape(name)}" if any(other.endswith(f".{name}") for other in names) else name


# --- reading


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """An adapter in jdelta's terms.

    Attributes:
      config: of the method.
      leaves: the delta's own leaves.
      saved: the backbone's leaves that the file holds, in PyTorch's layout.
      trains: which of them train.
      modules_to_save: PEFT's patterns of some of these.
    """

    config: DeltaConfig
    leaves: Leaves
    saved: Tensors
    trains: frozenset[str]
    modules_to_save: Sequence[str]


def _attached(adapter: _Adapter, backbone_model: Any, name: str | None) -> DeltaModel:
    delta = AutoDeltaModel.from_config(adapter.config, backbone_model, name=name)
    shapes, values = _shapes(delta.shapes()), {}
    for (host, leaf), value in adapter.leaves.items():
        key = f"{host or delta.targets[0]}.{delta.name}.{leaf}"
        values[key] = _fitted(value, shapes.get(key, value.shape))
    saved = _news(adapter, delta.backbone_model.params, _shapes(delta.structure.params))
    delta.load_finetuned(Finetuned(delta.name, adapter.config, values | saved, delta.targets), check_hash=False)
    if saved:
        delta.freeze_module(
            [freezing.DELTAS, *_patterns(saved, adapter.modules_to_save, _shapes(delta.structure.params))]
        )
    return delta


def _news(adapter: _Adapter, params: Tree, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The backbone's leaves that train, or that the file has other values of; PEFT saves some that are as they were."""
    leaves = surgery.flatten(surgery.parameters(params))
    have = {surgery.name_of(path): meta.unbox(leaf) for path, leaf in leaves.items() if path}
    news = {}
    for name, tensor in adapter.saved.items():
        value = _fitted(_turned(tensor) if name.endswith(".kernel") else tensor, shapes[name])
        old = have.get(name)
        known = not isinstance(old, jax.ShapeDtypeStruct) and np.array_equal(value, np.asarray(old))
        if name in adapter.trains or not known:
            news[name] = value
    return news


def _patterns(saved: Collection[str], entries: Sequence[str], leaves: Collection[str]) -> list[str]:
    """Patterns that mean exactly these of the leaves: the entries of `modules_to_save` that do, and names."""
    patterns, rest = [], set(saved)
    for entry in dict.fromkeys(entries):
        hits = {leaf for leaf in leaves if addressing.matches_at_or_above(leaf, entry)}
        if hits and hits <= {*saved}:
            patterns.append(entry)
            rest -= hits
    return [*patterns, *(_exact(name, leaves) for name in sorted(rest))]


# The fields that are read, or that change nothing once the values are there. Others that are set are refused.
_COMMON = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("task_type", "modules_to_save"),
}
_LORA = {
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
}
_VIRTUAL = {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
_PREFIX = {*_VIRTUAL, "encoder_hidden_size", "prefix_projection", "init_weights"}
_PROMPT = {*_VIRTUAL, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}

_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("r", "num_virtual_tokens", "token_dim", "num_attention_heads"), (int,)),
    "lora_alpha": (int, float),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict, type(None))),
    "modules_to_save": (list, type(None)),
}

_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # those that leave the backbone's weights alone

_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")


def _lora(fields: Mapping[str, Any], tensors: Tensors, names: _Names) -> _Adapter:
    _check_fields(fields, _LORA, ["r", "lora_alpha"])
    if fields.get("init_lora_weights") not in _INITS:
        raise ValueError(
            f"init_lora_weights={fields['init_lora_weights']!r} changed the weights of the backbone before training, "
            "and jdelta does not repeat that. Save it as a plain LoRA: save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…)."
        )
    factors: dict[str, dict[str, np.ndarray]] = {}
    rest = {}
    for key, tensor in _without_prefix(tensors, "base_model.model.").items():
        if match := _FACTOR.fullmatch(key):
            factors.setdefault(match[1], {})[match[2].lower()] = _turned(tensor)
        else:
            rest[key] = tensor
    hosts = {name: names.module(name) for name in factors}
    for name, pair in factors.items():
        if pair.keys() != {"a", "b"}:
            raise ValueError(f"of LoRA at {name!r} there is only lora_{pair.popitem()[0].upper()}.")
        _check_lora(names.structure.modules.get(hosts[name]), name)
    if not hosts:
        raise ValueError(f"{TENSORS} holds no LoRA: no key has lora_A or lora_B in it.")
    r, alpha = fields["r"], fields["lora_alpha"]
    ranks = {hosts[name]: _by_pattern(fields.get("rank_pattern"), name, r) for name in hosts}
    alphas = {hosts[name]: _by_pattern(fields.get("alpha_pattern"), name, alpha) for name in hosts}
    patterns = {host: _exact(host, names.structure.modules) for host in hosts.values()}
    config = LoraConfig(
        modified_modules=tuple(patterns.values()),
        lora_r=r,
        lora_alpha=alpha,
        lora_dropout=fields.get("lora_dropout", 0.0),
        rank_pattern={patterns[host]: rank for host, rank in ranks.items() if rank != r} or None,
        alpha_pattern={patterns[host]: value for host, value in alphas.items() if value != alpha} or None,
        use_rslora=fields.get("use_rslora", False),
    )
    leaves = {(hosts[name], letter): value for name, pair in factors.items() for letter, value in pair.items()}
    return _with_saved(config, leaves, rest, fields, names)


def _prefix(fields: Mapping[str, Any], tensors: Tensors, names: _Names) -> _Adapter:
    _check_fields(fields, _PREFIX, ["num_virtual_tokens", "token_dim", "num_attention_heads"])
    _check_no_cross_attention(names.structure)
    layers = [info.name for info in common_names.resolve(names.structure, ["attn"])]
    rest = dict(_without_prefix(tensors, "base_model."))
    rows, tokens = _prompt(rest), fields["num_virtual_tokens"]
    heads, wanted = fields["num_attention_heads"], (tokens, 2 * len(layers) * fields["token_dim"])
    if rows.shape != wanted or fields["token_dim"] % heads:
        raise ValueError(
            f"{PROMPT} has shape {rows.shape}. With num_virtual_tokens={tokens}, token_dim={fields['token_dim']} and "
            f"num_attention_heads={heads}, a model of {len(layers)} attention layers needs {wanted}."
        )
    pairs = rows.reshape(tokens, len(layers), 2, heads, -1).transpose(1, 2, 0, 3, 4)
    patterns = tuple(_exact(name, names.structure.modules) for name in layers)
    config = PrefixConfig(modified_modules=patterns, prefix_token_num=tokens, reparameterize=False)
    leaves = {(h, leaf): pairs[i, j] for i, h in enumerate(layers) for j, leaf in enumerate(("keys", "values"))}
    return _with_saved(config, leaves, rest, fields, names)


def _soft_prompt(fields: Mapping[str, Any], tensors: Tensors, names: _Names) -> _Adapter:
    _check_fields(fields, _PROMPT, ["num_virtual_tokens"])
    rest = dict(_without_prefix(tensors, "base_model."))
    tokens = fields["num_virtual_tokens"]
    rows = _prompt(rest)[:tokens]  # for an encoder-decoder PEFT saves twice as many, and computes with the first
    config = SoftPromptConfig(soft_token_num=tokens, token_init=False)
    return _with_saved(config, {("", "embedding"): rows}, rest, fields, names)


_READERS = {"LORA": _lora, "PREFIX_TUNING": _prefix, "PROMPT_TUNING": _soft_prompt}


def _reader(fields: Mapping[str, Any]) -> Callable[[Mapping[str, Any], Tensors, _Names], _Adapter]:
    kind = fields["peft_type"]
    if not isinstance(kind, str) or kind not in _READERS:
        raise ValueError(f"peft_type={kind!r} is none that jdelta reads. It reads: {', '.join(_READERS)}.")
    return _READERS[kind]


def _with_saved(
    config: DeltaConfig,
    leaves: Leaves,
    rest: Tensors,
    fields: Mapping[str, Any],
    names: _Names,
) -> _Adapter:
    """The adapter with the backbone's leaves that the file holds besides."""
    entries = addressing.checked(fields.get("modules_to_save") or ())
    biases = fields.get("bias", "none") != "none"
    saved, trains = {}, set()
    for key, tensor in rest.items():
        if ".original_module." in key or _is_double(key, rest):  # the former is what PEFT keeps of before
            continue
        plain = key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")  # the latter in older files
        name = names.leaf(plain)
        saved[name] = tensor
        to_save = any(addressing.matches_at_or_above(plain, entry) for entry in entries)
        if to_save and name.rpartition(".")[0] in names.structure.tied:
            raise ValueError(
                f"modules_to_save={list(entries)!r} trains the embedding {plain!r} apart from the head, and in this "
                "model the head computes with it. Load a model with tie_word_embeddings=False."
            )
        if to_save or (biases and name.endswith(".bias")):
            trains.add(name)
    return _Adapter(config, leaves, saved, frozenset(trains), entries)


def _is_double(key: str, rest: Tensors) -> bool:
    """Whether the file holds a tensor by a shorter name too: with `bias="all"`, biases of modules to save."""
    module, _, inside = key.partition(".modules_to_save.")
    return any(f"{module}.{short}" in rest for short in (inside, inside.partition(".")[2]) if short)


def _check_fields(fields: Mapping[str, Any], known: Collection[str], needed: Sequence[str]) -> None:
    """Raises `ValueError` if a field is missing or odd, or asks for something that jdelta lacks."""
    for field in needed:
        if field not in fields:
            raise ValueError(f"{CONFIG} lacks {field!r}, which {fields['peft_type']} needs.")
    for field, value in fields.items():
        if not isinstance(value, _KINDS.get(field, object)):
            kinds = " or ".join(kind.__name__ for kind in _KINDS[field])
            raise ValueError(f"{field}={value!r} in {CONFIG} is no {kinds}.")
        if value and field not in _COMMON and field not in known:
            raise ValueError(
                f"{field}={value!r} asks for something that jdelta's {fields['peft_type']} has not. If PEFT can merge "
                "the adapter into the weights, merge it there and load the model."
            )


def _check_lora(host: ModuleInfo | None, name: str) -> None:
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


def _check_no_cross_attention(structure: Structure) -> None:
    """Raises `ValueError` for an encoder-decoder, where the version of PEFT decides what a prefix means."""
    cross = common_names.known(structure, ["crossattn"])
    if cross:
        raise ValueError(
            f"prefix tuning of a model with cross-attention, at {cross[0].name}: which rows of {PROMPT} are whose "
            "differs between versions of PEFT, and newer ones leave cross-attention out. Only models without can "
            "exchange a prefix."
        )


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """What PEFT reads from a pattern for a module: regexes that match up to the end, from the start or after a dot."""
    try:
        found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name))
        return next(found, otherwise)
    except re.error as error:
        raise ValueError(f"a pattern among {list(patterns or ())} is no regular expression: {error}.") from error


def _prompt(rest: dict[str, np.ndarray]) -> np.ndarray:
    """Takes the prompt out of the tensors."""
    if PROMPT not in rest:
        raise ValueError(f"{TENSORS} lacks {PROMPT!r}; it holds {listing(sorted(rest)) or 'nothing'}.")
    rows = rest.pop(PROMPT)
    if rows.ndim != 2:
        raise ValueError(f"{PROMPT} has shape {rows.shape}, and a table has two axes.")
    return rows


def _without_prefix(tensors: Tensors, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration and the tensors of a folder."""
    for file in (CONFIG, TENSORS):
        if not (path / file).is_file():
            held = ", ".join(sorted(p.name for p in path.iterdir())) if path.is_dir() else ""
            found = f"it holds {held or 'nothing'}" if path.is_dir() else "there is no such folder"
            raise FileNotFoundError(
                f"{path} holds no PEFT adapter: {file} is missing; {found}. (An adapter_model.bin is a pickle, which "
                "can run code and is not read: load it with PEFT, and call save_pretrained, which writes safetensors.)"
            )
    try:
        fields = json.loads((path / CONFIG).read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path / CONFIG} is no JSON file: {error}") from error
    if not isinstance(fields, dict) or "peft_type" not in fields:
        raise ValueError(f"{path / CONFIG} is no configuration of PEFT: it has no 'peft_type'.")
    return fields, folder._tensors(path / TENSORS, (path / TENSORS).read_bytes())


# --- writing

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

Written = tuple[dict[str, Any], dict[str, np.ndarray]]


def _write_lora(found: Finetuned, structure: Structure) -> Written:
    config: LoraConfig = found.config  # type: ignore[assignment]
    shapes = _shapes(structure.params)
    tensors: dict[str, np.ndarray] = {}
    for host in found.targets:
        info = structure[host]
        _check_lora(info, _torch_name(host))
        a, b = (found.values[f"{host}.{found.name}.{leaf}"] for leaf in "ab")
        if any(shapes[f"{host}.{key}"] != leaf.shape for key, leaf in info.params.items()):
            raise ValueError(f"LoRA at {host} has leaves for several layers (nn.scan), and PEFT has a module for each.")
        tensors |= _factors(info, a, b)
    modules, biases = _trained(found, structure)
    saved = {_torch_leaf(name): _in_torch(name, found.values[name], structure) for name in (*modules, *biases)}
    for host in found.targets:  # PEFT puts LoRA in the place of its host, which then is inside
        if f"{host}.bias" in biases:
            saved[f"{_torch_name(host)}.base_layer.bias"] = saved.pop(f"{_torch_name(host)}.bias")
    of_hosts = {f"{host}.bias" for host in found.targets}
    r, alpha = config.lora_r, config.lora_alpha
    own = {f"^{re.escape(_torch_name(host))}": host for host in found.targets}
    fields = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": _whole(alpha),
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "rank_pattern": {key: config.rank_of(host) for key, host in own.items() if config.rank_of(host) != r},
        "alpha_pattern": {
            key: _whole(config.alpha_of(host)) for key, host in own.items() if config.alpha_of(host) != alpha
        },
        "target_modules": [_torch_name(host) for host in found.targets],
        "fan_in_fan_out": any(structure[host].type.__name__ == "FlaxConv1D" for host in found.targets),
        "modules_to_save": _owners(modules) or None,
        "bias": "none" if not biases else "lora_only" if biases <= of_hosts else "all",
    }
    return fields, {f"base_model.model.{key}": value for key, value in (tensors | saved).items()}


def _factors(host: ModuleInfo, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """PEFT's tensors of the LoRA at a module."""
    name = _torch_name(host.name)
    if issubclass(host.type, nn.Embed):
        return {f"{name}.lora_embedding_A": a.T, f"{name}.lora_embedding_B": b.T}
    if issubclass(host.type, nn.Conv):
        ones = (1,) * (a.ndim - 2)
        return {f"{name}.lora_A.weight": _turned_back(a), f"{name}.lora_B.weight": b.T.reshape(*b.shape[::-1], *ones)}
    r = len(b)
    return {f"{name}.lora_A.weight": a.reshape(-1, r).T, f"{name}.lora_B.weight": b.reshape(r, -1).T}


def _write_prefix(found: Finetuned, structure: Structure) -> Written:
    _check_no_cross_attention(structure)
    layers = [info.name for info in common_names.resolve(structure, ["attn"])]
    if missing := sorted({*layers} ^ {*found.targets}):
        raise ValueError(
            f"PEFT has a prefix in every attention layer, {len(layers)} in this model; this one is in "
            f"{len(found.targets)} modules. They differ at {listing(missing)}."
        )
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
    rows = found.values[f"{host}.{found.name}.embedding"]
    fields = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "token_dim": rows.shape[1]}
    return _write_virtual(found, structure, fields, rows)


def _write_virtual(found: Finetuned, structure: Structure, fields: dict[str, Any], rows: np.ndarray) -> Written:
    """What prefix tuning and prompt tuning have in common."""
    kind = (found.backbone or BackboneInfo("")).kind
    task, heads = next((value for end, value in _TASKS.items() if kind.endswith(end)), (None, ()))
    if task is None:
        raise ValueError(f"PEFT needs to know the task of a prompt, and {kind!r} does not tell.")
    modules, biases = _trained(found, structure)
    if biases:
        raise ValueError(f"PEFT trains no biases with a prompt; here {listing(sorted(biases))} trained.")
    for name in _modules(structure):
        if name.endswith(heads) and not any(leaf.startswith(f"{name}.") for leaf in modules):
            raise ValueError(
                f"for {task}, PEFT saves {name!r} with a prompt, and this delta does not train it. Call "
                f"freeze_module(exclude=['deltas', {name!r}]) before."
            )
    saved = {f"base_model.{_torch_leaf(n)}": _in_torch(n, found.values[n], structure) for n in modules}
    shared = {
        "task_type": task,
        "num_virtual_tokens": len(rows),
        "num_transformer_submodules": 1,
        "modules_to_save": _owners(modules) or None,
    }
    return fields | shared, {PROMPT: rows, **saved}


_WRITERS: dict[str, Callable[[Finetuned, Structure], Written]] = {
    "lora": _write_lora,
    "prefix": _write_prefix,
    "soft_prompt": _write_soft_prompt,
}


def _trained(found: Finetuned, structure: Structure) -> tuple[set[str], set[str]]:
    """The backbone's leaves that trained: those of whole modules, and single biases.

    Raises:
      ValueError: others, which PEFT cannot train.
    """
    leaves = _shapes(structure.params)
    trained = leaves.keys() & found.values.keys()
    other = {*map(_owner, leaves.keys() - trained), *found.targets}
    partly = {name[:i] for name in other for i in _ends(name)}
    whole = {leaf for leaf in trained if _owner(leaf) not in partly}
    biases = {leaf for leaf in trained - whole if leaf.endswith(".bias")}
    if odd := sorted(trained - whole - biases):
        raise ValueError(
            f"PEFT trains whole modules without a delta of their own, and biases; this delta trains {listing(odd)}. "
            "Choose others with freeze_module."
        )
    owners = set(map(_owner, whole))
    for name in sorted(owners):
        if name in structure.tied:
            raise ValueError(
                f"the head computes with the embedding {name!r}, and PEFT would train it apart from the head."
            )
        if lone := [module for module in _modules(structure) if module.endswith(name) and module not in owners]:
            raise ValueError(
                f"PEFT takes the ends of names: with {name!r} it would train {listing(lone)} too. Train these as well."
            )
    return whole, biases


def _ends(name: str) -> list[int]:
    """Where the names of the modules around this one end, and its own."""
    return [i for i in range(len(name) + 1) if name[i : i + 1] in (".", "")]


def _owner(leaf: str) -> str:
    """The name of the module that a leaf belongs to."""
    return leaf.rpartition(".")[0]


def _owners(leaves: Iterable[str]) -> list[str]:
    """The names, in PyTorch, of the modules that leaves belong to; not of those inside another."""
    owners = {_owner(leaf) for leaf in leaves}
    outer = [name for name in owners if not any(name[:i] in owners - {name} for i in _ends(name))]
    return sorted(map(_torch_name, outer))


def _in_torch(name: str, value: np.ndarray, structure: Structure) -> np.ndarray:
    """A leaf of the backbone's in PyTorch's layout."""
    if not name.endswith(".kernel"):
        return value
    info = structure.modules.get(_owner(name))
    if value.ndim != 2 and not (info and issubclass(info.type, nn.Conv)):
        raise ValueError(f"{name!r} has shape {value.shape}, and PyTorch has no dense layer with so many axes.")
    return _turned_back(value)


def _whole(number: float) -> float:
    """The number, as an `int` if it is one."""
    return int(number) if number == int(number) else number


def _write(target: Path, files: Mapping[str, bytes]) -> None:
    """Puts files into a folder, which is made if need be; they are written beside it before anything changes.

    A new folder appears as a whole. In one that is there, the files are replaced one right after the other.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file. Name a folder to save an adapter in.")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = (target if target.is_dir() else target.parent) / f".{target.name}.{uuid.uuid4().hex[:8]}"
    beside.mkdir()
    try:
        for name, data in files.items():
            folder._write(beside / name, data)
        if target.exists():
            for name in files:
                os.replace(beside / name, target / name)
        else:
            os.rename(beside, target)
        folder._sync(target.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
