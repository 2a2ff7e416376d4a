"""From PEFT: its files become a delta.

Which modules carry LoRA is read off the tensors' names, so that it does not matter how `target_modules` and its like
describe them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdelta.core import parsing
from jdelta.core.edits import WeightEdit
from jdelta.core.linear import linear_map
from jdelta.core.method import Method
from jdelta.core.structure import ModuleInfo
from jdelta.methods.ln_tuning import LNTuningConfig, is_norm
from jdelta.methods.lora import LoraConfig
from jdelta.methods.lora_rules import takes_from_weight
from jdelta.methods.prefix import PrefixConfig
from jdelta.methods.soft_prompt import SoftPromptConfig, has_pooler
from jdelta.methods.trainable_tokens import TrainableTokensConfig
from jdelta.names import common_names
from jdelta.saved import folder
from jdelta.saved.finetuned import listing
from jdelta.saved.peft.joining import Lora, joined
from jdelta.saved.peft.keys import normalized
from jdelta.saved.peft.limits import (
    copies_of,
    require_embedding,
    require_no_cross_attention,
    require_same,
    require_same_lora,
)
from jdelta.saved.peft.names import CONFIG, NORM, PROMPT, TENSORS, TOKENS, Names, Tensors, owner, to_flax
from jdelta.saved.peft.tuners import TUNERS
from jdelta.saved.peft.tuners.tuner import REPLACED_BY, Tuner
from jdelta.trees import addressing, fingerprint, regexes

Leaves = dict[tuple[str, str], np.ndarray]  # by the host's name and the leaf's, ("…query", "a"); "" is the only host


def checksum(found: tuple[Path, dict[str, Any], Tensors]) -> str:
    """What is the same for all processes that read the same files."""
    _, fields, tensors = found
    return json.dumps([fields, {name: fingerprint.digest(value) for name, value in sorted(tensors.items())}])


def read(path: Path, names: Names) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration and the tensors of a folder, of which a model of these names has some for each of its parts.

    Raises:
      FileNotFoundError: one of the files is missing.
      ValueError: one of them is damaged.
    """
    return folder.steadily(path, lambda: _read(path, names))


def _read(path: Path, names: Names) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not (path / CONFIG).is_file():
        path = folder.left_ready(path, CONFIG)
    for file in (CONFIG, TENSORS):
        if not (path / file).is_file():
            raise FileNotFoundError(
                f"{path} holds no PEFT adapter: {file} is missing; {folder.found_in(path)}. (An adapter_model.bin is a "
                "pickle, which can run code and is not read: load it with PEFT, and call save_pretrained, which writes "
                "safetensors.)"
            )
    fields = parsing.json_object(path / CONFIG)
    if "peft_type" not in fields:
        raise ValueError(f"{path / CONFIG} is no configuration of PEFT: it has no 'peft_type'.")
    return fields, parsing.tensors(path / TENSORS, 8 * parsing.header_limit([*names.modules, *names.leaves]))[0]


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """An adapter in jdelta's terms.

    Attributes:
      config: of the method.
      leaves: the delta's own leaves at modules.
      saved: the backbone's leaves that the file holds, in PyTorch's layout.
      trains: which of them train.
      modules_to_save: PEFT's patterns of some of these.
      shared: the delta's own leaves at the root.
    """

    config: Method
    leaves: Leaves
    saved: Tensors
    trains: frozenset[str]
    modules_to_save: Sequence[str]
    shared: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def patterns_of(saved: Collection[str], entries: Sequence[str], leaves: Collection[str]) -> list[str]:
    """Patterns that mean exactly these of the leaves: the entries of `modules_to_save` that do, and names."""
    patterns, rest = [], set(saved)
    for entry in dict.fromkeys(entries):
        hits = {leaf for leaf in leaves if addressing.matches_at_or_above(leaf, entry)}
        if hits and hits <= {*saved}:
            patterns.append(entry)
            rest -= hits
    return [*patterns, *(addressing.exact(name, leaves) for name in sorted(rest))]


# --- each method

_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?")


def _lora(fields: Mapping[str, Any], tensors: Tensors, names: Names) -> PeftAdapter:
    factors: dict[str, dict[str, np.ndarray]] = {}
    magnitudes: dict[str, np.ndarray] = {}
    rest = {}
    for key, tensor in normalized(tensors, "base_model.model.", names).items():
        if match := _FACTOR.fullmatch(key):
            factors.setdefault(match[1], {})[match[2].lower()] = to_flax(tensor)
        elif match := _MAGNITUDE.fullmatch(key):
            magnitudes[match[1]] = tensor.reshape(-1)
        else:
            rest[key] = tensor
    hosts = {name: names.module(name) for name in factors}
    for name, pair in factors.items():
        if pair.keys() != {"a", "b"}:
            raise ValueError(f"of LoRA at {name!r} there is only lora_{pair.popitem()[0].upper()}.")
        require_same_lora(names.structure.modules.get(hosts[name]), name)
    if not hosts:
        raise ValueError(
            f"{TENSORS} holds no LoRA: no key has lora_A or lora_B in it. It holds "
            f"{listing(sorted(tensors)) or 'nothing'}."
        )
    use_dora = fields.get("use_dora", False)
    if odd := sorted(hosts.keys() ^ magnitudes.keys() if use_dora else magnitudes):
        raise ValueError(
            f"use_dora={use_dora} in {CONFIG}, and {TENSORS} has {'no ' if use_dora else ''}lora_magnitude_vector at "
            f"{listing(odd)}."
        )
    start = fields.get("init_lora_weights", True)
    r, alpha, use_rslora = fields["r"], fields["lora_alpha"], fields.get("use_rslora", False)
    ranks = {name: _by_pattern(fields.get("rank_pattern"), name, r) for name in hosts}
    found: dict[str, dict[int, Lora]] = {}
    for name, pair in factors.items():
        if (a := pair["a"].shape[-1:]) != (b := pair["b"].shape[-2:-1]) or a != (ranks[name],):
            raise ValueError(
                f"LoRA at {name!r} has rank {ranks[name]} by r and rank_pattern in {CONFIG}, and its tensors "
                f"have {a[0] if a else 'none'} in lora_A and {b[0] if b else 'none'} in lora_B."
            )
        lora = Lora(pair["a"], pair["b"], _by_pattern(fields.get("alpha_pattern"), name, alpha))
        found.setdefault(hosts[name], {})[names.part(name, hosts[name])] = lora
    whole = {host: _whole(host, parts, names, use_rslora) for host, parts in found.items()}
    patterns = {host: addressing.exact(host, names.structure.modules) for host in whole}
    config = LoraConfig(
        modified_modules=tuple(patterns.values()),
        lora_r=r,
        lora_alpha=alpha,
        lora_dropout=fields.get("lora_dropout", 0.0),
        rank_pattern={patterns[host]: lora.rank for host, lora in whole.items() if lora.rank != r} or None,
        alpha_pattern={patterns[host]: lora.alpha for host, lora in whole.items() if lora.alpha != alpha} or None,
        use_rslora=use_rslora,
        use_dora=use_dora,
        init_lora_weights=start if takes_from_weight(start) else True,
    )
    leaves = {(host, letter): leaf for host, lora in whole.items() for letter, leaf in (("a", lora.a), ("b", lora.b))}
    for name, magnitude in magnitudes.items():
        if len(parts := names.torch(hosts[name])) > 1:
            raise ValueError(f"DoRA at {name!r}: {' and '.join(parts)} are one module in Flax, and cannot be joined.")
        leaves[hosts[name], "m"] = magnitude
    return _with_saved(config, leaves, rest, fields, names)


def _whole(host: str, parts: Mapping[int, Lora], names: Names, use_rslora: bool) -> Lora:
    """The LoRA at a Flax module, from those of its parts in PyTorch."""
    torch = names.torch(host)
    if len(torch) == 1:
        return parts[0]
    info = names.structure[host]
    linear = linear_map(info)
    shape = info.params[linear.weights].shape
    try:
        return joined(dict(sorted(parts.items())), len(torch), linear.layout(shape).matrix_shape(shape)[1], use_rslora)
    except ValueError as error:
        raise ValueError(f"LoRA at {host!r}, which is {' and '.join(torch)} in PyTorch: {error}") from error


def _tuner(tuner: Tuner, fields: Mapping[str, Any], tensors: Tensors, names: Names) -> PeftAdapter:
    """Reads a method that changes weights of modules."""
    end_of = re.compile(rf"(.+)\.({'|'.join(map(re.escape, tuner.tensors.values()))})")
    leaf_of = {end: leaf for leaf, end in tuner.tensors.items()}
    shared_of = {end: leaf for leaf, end in tuner.shared.items()}
    found: dict[str, dict[str, np.ndarray]] = {}
    shared: dict[str, np.ndarray] = {}
    rest = {}
    for key, tensor in normalized(tensors, "base_model.model.", names).items():
        if match := end_of.fullmatch(key):
            found.setdefault(match[1], {})[leaf_of[match[2]]] = tensor
        elif key in shared_of:
            shared[shared_of[key]] = tensor
        elif key.rpartition(".")[2] not in shared_of:  # RandLoRA's file has a copy at each module
            rest[key] = tensor
    if not found:
        raise ValueError(
            f"{TENSORS} holds nothing of {tuner.kind}: no key ends with {' or '.join(leaf_of)}. It holds "
            f"{listing(sorted(tensors)) or 'nothing'}."
        )
    hosts = {name: names.module(name) for name in found}
    for name, host in hosts.items():
        require_same(tuner, names.structure.modules.get(host), name, names.torch(host))
    patterns = {host: addressing.exact(host, names.structure.modules) for host in hosts.values()}
    try:
        arguments = {field: fields[field] for field in tuner.fields if field in fields}
        for pattern in tuner.patterns:
            usual = fields.get(field := REPLACED_BY[pattern], tuner.method().to_dict()[field])
            own = {host: _by_pattern(fields.get(pattern), name, usual) for name, host in hosts.items()}
            arguments[pattern] = {patterns[host]: value for host, value in own.items() if value != usual} or None
        arguments |= tuner.arguments(fields, {name: patterns[host] for name, host in hosts.items()})
        config = tuner.method(modified_modules=tuple(patterns.values()), **arguments)
        leaves: Leaves = {}
        shapes = {host: _matrix_shape(names.structure[host]) for host in hosts.values()}
        for name, host in hosts.items():
            edits = config.edits(names.structure[host], names.structure)
            edit = next(edit for edit in edits if isinstance(edit, WeightEdit))
            own = tuner.leaves_at(edit, found[name])
            tuner.require_fit(own, *shapes[host])
            leaves |= {(host, leaf): value for leaf, value in own.items()}
        shared = tuner.shared_leaves(shared, config, [*shapes.values()])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{tuner.kind}: {error}") from error
    return dataclasses.replace(_with_saved(config, leaves, rest, fields, names), shared=shared)


def _matrix_shape(host: ModuleInfo) -> tuple[int, int]:
    linear = linear_map(host)
    shape = host.params[linear.weights].shape
    return linear.layout(shape).matrix_shape(shape)


def _norms(fields: Mapping[str, Any], tensors: Tensors, names: Names) -> PeftAdapter:
    found: dict[str, np.ndarray] = {}
    rest = {}
    for key, tensor in normalized(tensors, "base_model.model.", names).items():
        if f".{NORM}." in key:
            found[names.leaf(key.replace(f".{NORM}.", "."))] = tensor
        else:
            rest[key] = tensor
    if not found:
        raise ValueError(f"{TENSORS} holds no {NORM}. It holds {listing(sorted(tensors)) or 'nothing'}.")
    hosts = [*dict.fromkeys(map(owner, found))]
    for host in hosts:
        info = names.structure.modules.get(host)
        if info is None or not is_norm(info):
            raise ValueError(f"LN_TUNING at {host!r}: that is no norm. Other modules train with modules_to_save.")
    patterns = tuple(addressing.exact(host, names.structure.modules) for host in hosts)
    others = _with_saved(LNTuningConfig(modified_modules=patterns), {}, rest, fields, names)
    return dataclasses.replace(others, saved={**others.saved, **found}, trains=others.trains.union(found))


def _tokens(fields: Mapping[str, Any], tensors: Tensors, names: Names) -> PeftAdapter:
    found: dict[str, np.ndarray] = {}
    rest = {}
    for key, tensor in normalized(tensors, "base_model.model.", names).items():
        if key.endswith(f".{TOKENS}"):
            found[key.removesuffix(f".{TOKENS}")] = tensor
        else:
            rest[key] = tensor
    if not found:
        raise ValueError(f"{TENSORS} holds no {TOKENS}. It holds {listing(sorted(tensors)) or 'nothing'}.")
    copies: dict[str, str] = {}
    for name in found:
        if names.find(name) in names.structure.tied:
            copies |= dict.fromkeys(copies_of(names.module(name), names), name)
    for copy, name in copies.items():
        if copy not in found or not np.array_equal(found[copy], found[name]):
            raise ValueError(f"{copy!r} is tied to {name!r}, and the file has no equal {TOKENS} of both.")
    hosts = {name: require_embedding(name, names).name for name in found if name not in copies}
    for host in hosts.values():
        copies_of(host, names)  # what is refused
    patterns = tuple(addressing.exact(host, names.structure.modules) for host in hosts.values())
    arguments = {key: fields[key] for key in ("token_indices", "init_weights") if key in fields}
    config = TrainableTokensConfig(modified_modules=patterns, **arguments)
    leaves = {(host, "tokens"): found[name] for name, host in hosts.items()}
    return _with_saved(config, leaves, rest, fields, names)


def _prefix(fields: Mapping[str, Any], tensors: Tensors, names: Names) -> PeftAdapter:
    require_no_cross_attention(names.structure)
    layers = [info.name for info in common_names.resolve(names.structure, ["attn"])]
    rest = dict(normalized(tensors, "base_model.", names))
    rows, tokens = _prompt(rest), fields["num_virtual_tokens"]
    heads, wanted = fields["num_attention_heads"], (tokens, 2 * len(layers) * fields["token_dim"])
    if rows.shape != wanted or fields["token_dim"] % heads:
        raise ValueError(
            f"{PROMPT} has shape {rows.shape}. With num_virtual_tokens={tokens}, token_dim={fields['token_dim']} and "
            f"num_attention_heads={heads}, a model of {len(layers)} attention layers needs {wanted}."
        )
    pairs = rows.reshape(tokens, len(layers), 2, heads, -1).transpose(1, 2, 0, 3, 4)
    patterns = tuple(addressing.exact(name, names.structure.modules) for name in layers)
    config = PrefixConfig(
        modified_modules=patterns, prefix_token_num=tokens, reparameterize=False, shift_positions=True
    )
    leaves = {(h, leaf): pairs[i, j] for i, h in enumerate(layers) for j, leaf in enumerate(("keys", "values"))}
    return _with_saved(config, leaves, rest, fields, names)


def _soft_prompt(fields: Mapping[str, Any], tensors: Tensors, names: Names) -> PeftAdapter:
    rest = dict(normalized(tensors, "base_model.", names))
    tokens = fields["num_virtual_tokens"]
    rows = _prompt(rest)[:tokens]  # for an encoder-decoder PEFT saves twice as many, and computes with the first
    if len(rows) < tokens:
        raise ValueError(f"{PROMPT} has {len(rows)} rows, and num_virtual_tokens={tokens}.")
    tables = common_names.resolve(names.structure, ["embeddings"])
    pools = any(has_pooler(names.structure, info) for info in tables[:1])
    if not pools and (fields.get("task_type") == "SEQ_CLS" or any(n.endswith("pooler") for n in names.modules)):
        raise ValueError(
            "PEFT pools the prompt's first position, and in this model no module does that by itself, so that jdelta "
            "would pool the input's."
        )
    config = SoftPromptConfig(soft_token_num=tokens, token_init=False, pool_prompt=pools)
    return _with_saved(config, {("", "embedding"): rows}, rest, fields, names)


READERS: dict[str, Callable[[Mapping[str, Any], Tensors, Names], PeftAdapter]] = {
    "LORA": _lora,
    "LN_TUNING": _norms,
    "TRAINABLE_TOKENS": _tokens,
    "PREFIX_TUNING": _prefix,
    "PROMPT_TUNING": _soft_prompt,
    **{kind: functools.partial(_tuner, tuner) for kind, tuner in TUNERS.items()},
}


def _with_saved(config: Method, leaves: Leaves, rest: Tensors, fields: Mapping[str, Any], names: Names) -> PeftAdapter:
    """The adapter with the backbone's leaves that the file holds besides."""
    entries = addressing.checked(fields.get("modules_to_save") or ())
    biases = fields.get("bias", "none") != "none"
    saved: dict[str, np.ndarray] = {}
    trains: set[str] = set()
    pieces: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in rest.items():
        if ".original_module." in key or _is_double(key, rest):  # the former is what PEFT keeps of before
            continue
        plain = key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")  # the latter in older files
        name = names.leaf(plain)
        pieces.setdefault(name, {})[names.torch(name)[names.part(plain, name)]] = tensor
        to_save = any(addressing.matches_at_or_above(plain, entry) for entry in entries)
        if to_save and owner(name) in names.tied:
            raise ValueError(
                f"modules_to_save={list(entries)!r} trains the embedding {plain!r} apart from the head, and in this "
                "model the head computes with it. Load a model with tie_word_embeddings=False."
            )
        if to_save or (biases and plain.endswith(".bias")):
            trains.add(name)
    for name, found in pieces.items():
        if missing := [part for part in names.torch(name) if part not in found]:
            raise ValueError(
                f"the adapter holds {listing(sorted(found))} and not {listing(missing)}, and in this model they are "
                f"one leaf, {name!r}."
            )
        tensors = [found[part] for part in names.torch(name)]
        saved[name] = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
    return PeftAdapter(config, leaves, saved, frozenset(trains), entries)


def _is_double(key: str, rest: Tensors) -> bool:
    """Whether the file holds a tensor by a shorter name too: with `bias="all"`, biases of modules to save."""
    module, _, inside = key.partition(".modules_to_save.")
    return any(f"{module}.{short}" in rest for short in (inside, inside.partition(".")[2]) if short)


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """What PEFT reads from a pattern for a module: regexes that match up to the end, from the start or after a dot."""
    found = (value for key, value in (patterns or {}).items() if _regex(key).fullmatch(name))
    return next(found, otherwise)


@functools.lru_cache(maxsize=4096)
def _regex(key: str) -> regexes.Regex:
    return regexes.Regex(rf"(.*\.)?({key})$", written=key)


def _prompt(rest: dict[str, np.ndarray]) -> np.ndarray:
    """Takes the prompt out of the tensors."""
    if PROMPT not in rest:
        raise ValueError(f"{TENSORS} lacks {PROMPT!r}; it holds {listing(sorted(rest)) or 'nothing'}.")
    rows = rest.pop(PROMPT)
    if rows.ndim != 2:
        raise ValueError(f"{PROMPT} has shape {rows.shape}, and a table has two axes.")
    return rows
