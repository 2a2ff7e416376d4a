"""LoRAs of other ranks and modules, in one form: what was compiled for one runs them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np

from jdelta.methods.lora import LoraConfig
from jdelta.saved.arithmetic import checks, lora_factors
from jdelta.saved.arithmetic.checks import Source
from jdelta.saved.finetuned import Finetuned, listing
from jdelta.trees import addressing

Shape = tuple[int, ...]

_FREE = tuple(field for field in lora_factors.SCALED if field != "lora_dropout")


def padded(deltas: Sequence[Source], name: str | None = None) -> list[Finetuned]:
    """Returns the same LoRAs with one rank, one scale and the same modules, so that they can be swapped.

        movies, tweets = jdelta.padded(["movies/", "tweets/"])
        delta = jdelta.AutoDeltaModel.from_finetuned(movies, backbone_model=model)
        delta.load_finetuned(tweets)  # functions of the parameters are not compiled again

    The rank is the highest of all. Beyond a delta's own rank, and at modules where it is not, `a` and `b` are zeros.
    Each one's scale is multiplied into `b`, and then is 1. They compute what they did, and fit `stack`. They are not
    for further training: zeros in both factors stay zeros.

    Args:
      deltas: LoRAs on one backbone, given as in `weighted_sum`.
      name: their name in the tree; by default that of the first.

    Returns:
      A delta for each, with one configuration.

    Raises:
      FileNotFoundError, ConnectionError, TypeError: as `weighted_sum`.
      ValueError: a delta is no LoRA, or one with leaves besides `a` and `b`, as DoRA; they train different leaves of
        the backbone, or have dropout at different rates; a module has other widths in one of them.
    """
    found = [delta if name is None else delta.renamed(name) for delta in checks.read_all(deltas)]
    for i, delta in enumerate(found, 1):
        if not isinstance(delta.config, LoraConfig) or delta.inserted:
            raise ValueError(
                f"delta {i} is of method {delta.config.delta_type!r}. jdelta.convert_to_lora makes LoRA of it."
            )
        checks.require_same_arguments(found[0], delta, i, _FREE)
    pairs = [lora_factors.pairs_of(delta) for delta in found]
    rest = [{*checks.others(delta, own)} for delta, own in zip(found, pairs, strict=True)]
    for i, other in enumerate(rest[1:], 2):
        if odd := sorted(rest[0] ^ other):
            raise ValueError(f"delta 1 and delta {i} do not train the same leaves of the backbone: {listing(odd)}.")
    shapes = _shapes(found, pairs)
    rank = max(delta.values[f"{pair}.a"].shape[-1] for delta, own in zip(found, pairs, strict=True) for pair in own)
    config = _config(found, shapes, rank)
    targets = list(dict.fromkeys(target for delta in found for target in delta.targets))
    results = []
    for delta, own in zip(found, pairs, strict=True):
        values = {key: value for key, value in delta.values.items() if key not in lora_factors.leaves_of(own)}
        for pair, (a, b, axis) in shapes.items():
            values |= _pair(delta, pair, a, b, axis, rank)
        own_leaves = frozenset(lora_factors.leaves_of(tuple(shapes)))
        results.append(dataclasses.replace(delta, config=config, values=values, targets=targets, own=own_leaves))
    return results


def _shapes(found: Sequence[Finetuned], pairs: Sequence[Sequence[str]]) -> dict[str, tuple[Shape, Shape, int]]:
    """Of each pair that any delta has: the shapes of `a` and `b`, and the axis of `b` that is the rank."""
    shapes: dict[str, tuple[Shape, Shape, int]] = {}
    for i, (delta, own) in enumerate(zip(found, pairs, strict=True), 1):
        for pair in own:
            a, b = (delta.values[f"{pair}.{leaf}"] for leaf in "ab")
            axis = lora_factors.layer_axes(delta, pair, [a], [b])
            known = shapes.setdefault(pair, (a.shape, b.shape, axis))
            if not lora_factors.same_up_to_rank(a.shape, b.shape, known[0], known[1]):
                raise ValueError(f"{pair} is that of another module in delta {i}: its widths differ.")
    return shapes


def _pair(delta: Finetuned, pair: str, a: Shape, b: Shape, axis: int, rank: int) -> dict[str, np.ndarray]:
    """The factors at one module at the common rank, with the scale in `b`; zeros where the delta is not."""
    wide_a, wide_b = (*a[:-1], rank), (*b[:axis], rank, *b[axis + 1 :])
    if f"{pair}.a" not in delta.values:
        dtype = next(iter(delta.values.values())).dtype
        return {f"{pair}.a": np.zeros(wide_a, dtype), f"{pair}.b": np.zeros(wide_b, dtype)}
    values = {}
    scale = cast(LoraConfig, delta.config).scale_of(lora_factors.target_of(delta, pair))
    for leaf, shape, factor in (("a", wide_a, 1.0), ("b", wide_b, scale)):
        value = delta.values[f"{pair}.{leaf}"]
        more = [(0, size - own) for size, own in zip(shape, value.shape, strict=True)]
        values[f"{pair}.{leaf}"] = np.pad(np.asarray(value * np.asarray(factor, value.dtype)), more)
    return values


def _config(found: Sequence[Finetuned], pairs: Iterable[str], rank: int) -> LoraConfig:
    """LoRA at all of the modules, at the scale 1."""
    modules: dict[str, None] = {}
    leaves: dict[str, None] = {}
    for pair in pairs:
        target = lora_factors.target_of(found[0], pair)
        of_module = pair.split(".")[-1] == found[0].name
        (modules if of_module else leaves)[addressing.exact(target)] = None
    return dataclasses.replace(
        cast(LoraConfig, found[0].config),
        modified_modules=tuple(modules) or None,
        modified_parameters=tuple(leaves) or None,
        exclude_modules=None,
        common_structure=None,
        lora_r=rank,
        lora_alpha=rank,
        rank_pattern=None,
        alpha_pattern=None,
        use_rslora=False,
    )
