"""Guesses of the common names of a model that is not in the table, from how its modules are called."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax.numpy as jnp

from jdelta.core.structure import ModuleInfo, Structure
from jdelta.names.table import NAMES, Names
from jdelta.trees.surgery import Path, name_of

# What the projections of attention are called in most code: wq, q_proj, to_q, query, query_key_value, q_einsum, …
_PROJECTION = re.compile(
    r"(?:to_?|w_?)?(q|query|k|key|v|value|kv|key_value|qkv|query_key_value|c_attn|in_proj)"
    r"(?:_?(?:proj|projection|lin|linear|dense|einsum))?"
)
_HELD = {"query": "q", "key": "k", "value": "v", "key_value": "kv"}
_HELD |= dict.fromkeys(("query_key_value", "c_attn", "in_proj"), "qkv")
_OUTPUT = re.compile(r"(?:to_?|w_?|c_)?(?:o|out|output|proj)(?:_?(?:proj|projection|lin|linear|dense|einsum))?")


def guess(structure: Structure) -> dict[str, Names]:
    """The classes of the blocks of a model, and what is in them, as far as names and shapes leave no doubt.

    A block is a layer that is repeated, numbered or scanned; in a model without one, it is the model itself. One
    without an attention whose query, key and value have names that say so is left out.
    """
    weighted = [info for info in structure if _is_linear(info, structure)]
    holders = [info for info in structure if any(_inside(linear, info) for linear in weighted)]
    repeated = [info for info in holders if info.path and _numbered(info, holders)]
    if not repeated:
        calls = max((info.calls for info in holders), default=1)
        repeated = [info for info in holders if info.calls == calls > 1]
    blocks = [info for info in repeated if not any(_inside(info, other) for other in repeated)] or holders[:1]
    first = {block.type.__name__: block for block in reversed(blocks)}
    guesses = {name: _names(block, structure, weighted) for name, block in reversed(first.items())}
    return {name: entry for name, entry in guesses.items() if entry}


def linears(structure: Structure) -> list[str]:
    """The names of the modules that have weights, and nothing inside them has any."""
    return [info.name for info in structure if info.name and not info.closed and _is_linear(info, structure)]


def _names(block: ModuleInfo, structure: Structure, linears: Sequence[ModuleInfo]) -> Names:
    start = len(block.path)
    rest = [info.path[start:] for info in linears if _inside(info, block)]
    entry: dict[str, str | tuple[str, ...]] = {}
    for name in ("attn", "crossattn"):
        queries = [path for path in rest if "q" in _held(path)]
        if not queries:
            break
        parent = queries[0][:-1]
        parts = [path for path in rest if path[:-1] == parent and _held(path)]
        if {letter for path in parts for letter in _held(path)} != {*"qkv"}:
            return {}
        # The output projection is beside the three, or beside the module of the three, as in BERT.
        while parent and not (outputs := [p for p in rest if p[: len(parent)] == parent and p not in parts]):
            parent = parent[:-1]
        if not parent:
            outputs = [path for path in rest if path not in parts and _OUTPUT.fullmatch(path[-1].lower())]
        else:
            entry[name] = name_of(parent)
        for part in "qkv":
            if held := [name_of(path) for path in parts if part in _held(path)]:
                entry[f"{name}.{part}"] = held[0]
        if len(outputs) == 1:
            entry[f"{name}.proj"] = name_of(outputs[0])
        rest = [path for path in rest if path not in parts and path not in outputs]
    if not entry:
        return {}
    if not _is_feed_forward([structure[name_of((*block.path, *path))] for path in rest], block):
        rest = []
    if rest and rest[0][:-1] and len({path[:-1] for path in rest}) == 1:
        entry["ff"] = name_of(rest[0][:-1])
    if len(rest) > 1:
        entry["ff.w1"] = name_of(rest[0]) if len(rest) == 2 else tuple(map(name_of, rest[:-1]))
    if rest:
        entry["ff.w2"] = name_of(rest[-1])
    norms = [info.path[start:] for info in structure if _inside(info, block) and "norm" in info.type.__name__.lower()]
    normed = [name for name in ("attn", "crossattn", "ff") if any(key.startswith(name + ".") for key in entry)]
    if len(norms) == len(normed):
        entry |= {f"{name}.layer_norm": name_of(path) for name, path in zip(normed, norms, strict=True)}
    return {name: entry[name] for name in NAMES if name in entry}


def _is_feed_forward(linears: Sequence[ModuleInfo], block: ModuleInfo) -> bool:
    """Whether these are one or more layers from a block's width to another one, and one layer back."""
    try:
        width, *_ = block.x.shape[-1:]
        ups, down = linears[:-1], linears[-1]
        wide = {info.y.shape[-1] for info in ups}
        there = all(info.x.shape[-1] == width for info in ups) and len(wide) == 1
        return there and down.x.shape[-1] in wide and down.y.shape[-1] == width
    except (TypeError, ValueError, IndexError):
        return False


def _is_linear(info: ModuleInfo, structure: Structure) -> bool:
    """Whether it has weights, and nothing inside it has any."""
    if any(_inside(other, info) for other in structure):
        return False
    try:
        floats = jnp.issubdtype(info.x.dtype, jnp.floating)
    except TypeError:
        return False
    return floats and any(len(leaf.shape) > 1 for leaf in info.params.values())


def _inside(info: ModuleInfo, other: ModuleInfo) -> bool:
    return len(info.path) > len(other.path) and info.path[: len(other.path)] == other.path


def _numbered(info: ModuleInfo, others: Sequence[ModuleInfo]) -> bool:
    """Whether it is one of several of its class beside each other, told apart by a number."""
    alike = [other for other in others if other.type is info.type and other.path[:-1] == info.path[:-1] and other.path]
    return len({other.path[-1].rstrip("0123456789") for other in alike}) < len(alike)


def _held(path: Path) -> str:
    """Which of query, key and value a projection holds, by its name: `"q"`, `"kv"`, `""`, …"""
    match = _PROJECTION.fullmatch(path[-1].lower())
    return _HELD.get(match[1], match[1]) if match else ""
