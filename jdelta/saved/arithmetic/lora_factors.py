"""The pairs of leaves that LoRA has, as what arithmetic makes of several.

`a` is `(layers…, *d_in, r)` and `b` is `(layers…, r, *d_out)`, with axes of layers where there is an `nn.scan`. A pair
goes by its prefix, `"…query.lora"`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from jdelta.core.method import Method
from jdelta.methods.lora import LoraConfig
from jdelta.saved.arithmetic.merge_rules import Combination, Merge, truncated, truncated_product, wide
from jdelta.saved.finetuned import Finetuned, listing

Shape = tuple[int, ...]

# Arguments that may differ.
SCALED = ("lora_r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights")


def pairs_of(found: Finetuned) -> tuple[str, ...]:
    """Where LoRA has its pairs; nothing for another method, or where layers were put in by hand.

    Raises:
      ValueError: other leaves of the delta's own are there.
    """
    if not isinstance(found.config, LoraConfig) or found.inserted:
        return ()
    own = {key for key in found.values if found.is_own(key)}
    pairs = tuple(sorted(key.removesuffix(".a") for key in own if key.endswith(".a")))
    if odd := own ^ leaves_of(pairs):
        raise ValueError(f"delta {found.name!r} does not have the leaves of LoRA at {listing(sorted(odd))}.")
    return pairs


def leaves_of(pairs: Sequence[str]) -> set[str]:
    """The names of the leaves."""
    return {f"{pair}.{leaf}" for pair in pairs for leaf in "ab"}


def target_of(found: Finetuned, pair: str) -> str:
    """The name of the module that a pair is at, or of the parameter."""
    *before, last = pair.split(".")
    if last == found.name:
        return ".".join(before)
    at = len(before) - 1 - before[::-1].index(found.name)
    return ".".join((*before[:at], *before[at + 1 :], last))


def same_up_to_rank(a: Shape, b: Shape, other_a: Shape, other_b: Shape) -> bool:
    """Whether two pairs differ in the last axis of `a`, and likewise in one axis of `b`, at most."""
    ranks = (a[-1], other_a[-1])
    unequal = [sizes for sizes in zip(b, other_b, strict=False) if sizes[0] != sizes[1]]
    return a[:-1] == other_a[:-1] and len(b) == len(other_b) and unequal == [ranks] * (ranks[0] != ranks[1])


def merged(
    found: Sequence[Finetuned], weights: Sequence[float], pair: str, how: Combination, rank: int | None, merge: Merge
) -> dict[str, np.ndarray]:
    """The leaves of one pair that does what those of all deltas do, at the scale 1.

    Raises:
      ValueError: the rank is above what the module has, or the axes of the layers cannot be told.
    """
    target = target_of(found[0], pair)
    a, b = ([wide(delta.values[f"{pair}.{leaf}"]) for delta in found] for leaf in "ab")
    scales = [cast(LoraConfig, delta.config).scale_of(target) for delta in found]
    total = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
    if how.lora == "factors":
        roots = [math.sqrt(abs(c)) for c in total]
        signed = [math.copysign(root, c) for root, c in zip(roots, total, strict=True)]
        return {f"{pair}.a": merge(a, signed), f"{pair}.b": merge(b, roots)}

    n = layer_axes(found[0], pair, a, b)
    layers, d_in, d_out = a[0].shape[:n], a[0].shape[n:-1], b[0].shape[n + 1 :]
    left = [x.reshape(*layers, -1, x.shape[-1]) for x in a]
    right = [x.reshape(*layers, x.shape[n], -1) for x in b]
    full = min(math.prod(d_in), math.prod(d_out))
    if how.keep == "all":
        u = np.concatenate([c * x for c, x in zip(total, left, strict=True)], -1)
        v = np.concatenate(right, -2)
        ranks = u.shape[-1]
        if how.lora == "product":
            u, v = truncated_product(u, v, _checked_rank(rank, left, min(full, ranks), target))
        elif ranks > full:
            raise ValueError(f"'cat': the ranks add up to {ranks}, above the width of {target}, {full}. Take 'svd'.")
    else:
        products = [scale * x @ y for scale, x, y in zip(scales, left, right, strict=True)]
        u, v = truncated(merge(products, weights), _checked_rank(rank, left, full, target))
    return {f"{pair}.a": u.reshape(*layers, *d_in, -1), f"{pair}.b": v.reshape(*layers, -1, *d_out)}


def at_ranks(found: Finetuned, values: Mapping[str, np.ndarray], pairs: Sequence[str]) -> Method:
    """The configuration for pairs of these ranks, whose scale is 1. Without pairs it stays as it is."""
    if not pairs:
        return found.config
    ranks = {target_of(found, pair): values[f"{pair}.a"].shape[-1] for pair in pairs}
    rank = max(ranks.values())
    # The first pattern that matches counts, so a name goes before those that it ends with.
    each = {target: ranks[target] for target in sorted(ranks, key=len, reverse=True)}
    pattern = each if len({*ranks.values()}) > 1 else None
    return dataclasses.replace(
        cast(LoraConfig, found.config),
        lora_r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        use_rslora=False,
    )


def _checked_rank(rank: int | None, left: Sequence[np.ndarray], full: int, target: str) -> int:
    """The rank of the result, by default the highest of the `(…, d_in, r)` factors."""
    rank = max(x.shape[-1] for x in left) if rank is None else rank
    if rank > full:
        raise ValueError(f"rank={rank} is more than the sum has at {target}. Take at most {full}.")
    return rank


def layer_axes(first: Finetuned, pair: str, a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> int:
    """How many axes of layers come first. The leaves' shapes do not tell it if there are as many layers as ranks."""

    def fits(a: np.ndarray, b: np.ndarray, n: int) -> bool:
        return b.ndim >= n + 2 and a.shape[:n] == b.shape[:n] and a.shape[-1] == b.shape[n]

    fitting = [n for n in range(a[0].ndim - 1) if all(fits(x, y, n) for x, y in zip(a, b, strict=True))]
    if (kernel := _kernel_axes(first, pair.rpartition(".")[0])) is not None:
        fitting = [n for n in fitting if n == a[0].ndim + b[0].ndim - 2 - kernel]
    if len(fitting) == 1:
        return fitting[0]
    raise ValueError(
        f"{pair}: which axes of a, {list(a[0].shape)}, and b, {list(b[0].shape)}, are ranks and which are layers is "
        "unclear without the backbone's kernel. Use 'linear', or deltas that were saved with jdelta's fingerprint."
    )


def _kernel_axes(found: Finetuned, target: str) -> int | None:
    """The number of axes of the host's weights, if they are known; under a name of its own, no leaf there has more."""
    start = f"{target}." if target else ""
    known = {key: value.ndim for key, value in found.values.items() if not found.is_own(key)}
    for key, text in found.backbone.leaves.items() if found.backbone is not None else ():
        known.setdefault(key, text.partition("[")[2].partition("]")[0].count(",") + 1)
    counts = {
        key[len(start) :]: n for key, n in known.items() if key.startswith(start) and "." not in key[len(start) :]
    }
    named = [counts[key] for key in ("kernel", "embedding") if key in counts]
    return named[0] if named else max(counts.values(), default=None)
