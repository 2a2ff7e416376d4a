"""Arithmetic on trained deltas of one backbone: weighted sums, task arithmetic, TIES, DARE, interpolation.

Each leaf holds a *change* or a *value*. A change says how far training went from the backbone, so it can be added,
weighted and negated: the pairs of LoRA and the biases that BitFit adds are changes. Everything else holds values: the
leaves of adapters, prefixes and prompts, and the backbone's own leaves that trained, such as a classifier head. Values
can only be averaged, unless `base` tells what they were before training; their difference from it is a change.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import numpy as np

from jdelta import fingerprint, hub, surgery
from jdelta.addressing import checked, matches_at_or_above, nothing_matches
from jdelta.config import DeltaConfig, did_you_mean
from jdelta.delta import DeltaModel
from jdelta.finetuned import Finetuned, listing
from jdelta.methods.bitfit import BitFitConfig
from jdelta.methods.lora import LoraConfig
from jdelta.surgery import Tree

Source = Finetuned | DeltaModel | str | os.PathLike[str]
Shape = tuple[int, ...]


class Combination(NamedTuple):
    """What happens to the changes of one leaf.

    Attributes:
      keep: which entries stay; the others become 0.
      elect: whether entries against the majority's sign are left out, and the others averaged.
      lora: what it works on in LoRA: each of the two factors, their product, or factors side by side.
    """

    keep: Literal["all", "largest", "random"] = "all"
    elect: bool = False
    lora: Literal["factors", "product", "side by side"] = "factors"


COMBINATIONS = {
    "cat": Combination(lora="side by side"),
    "svd": Combination(lora="product"),
    "linear": Combination(),
    "ties": Combination("largest", True),
    "ties_svd": Combination("largest", True, "product"),
    "dare_linear": Combination("random"),
    "dare_linear_svd": Combination("random", lora="product"),
    "dare_ties": Combination("random", True),
    "dare_ties_svd": Combination("random", True, "product"),
    "magnitude_prune": Combination("largest"),
    "magnitude_prune_svd": Combination("largest", lora="product"),
}

Merge = Callable[[Sequence[np.ndarray], Sequence[float]], np.ndarray]


def weighted_sum(
    deltas: Sequence[Source],
    weights: Sequence[float],
    combination: str | None = None,
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
    rng: int | jax.Array = 0,
    base: Tree | Finetuned | None = None,
    keep: Sequence[str] = (),
    name: str | None = None,
    check_hash: bool | Literal["warn"] = "warn",
) -> Finetuned:
    """One delta that does what several do, each as much as its weight says.

        both = jdelta.weighted_sum(["movies/", "tweets/"], [0.7, 0.3], "svd", rank=8, keep=["classifier"])
        delta = jdelta.AutoDeltaModel.from_finetuned(both, backbone_model=model)

    Negative weights subtract a task (Ilharco et al. 2023, arXiv 2212.04089). The combinations are those of PyTorch
    PEFT's `add_weighted_adapter`, and give its numbers. For every method there are

    - `linear`: the sum of the leaves. LoRA's two factors are summed apart, each with the root of weight times scale, so
      that the product has cross terms: two equal deltas at weights of a half do twice what one does.
    - `magnitude_prune`: the same of the `density` largest entries of each leaf.
    - `ties`: these, without those that go against the majority's sign, averaged over how many are left
      (Yadav et al. 2023, arXiv 2306.01708).
    - `dare_linear`, `dare_ties`: with a random `density` of the entries in place of the largest, divided by it (Yu
      et al. 2023, arXiv 2311.03099).

    and for LoRA, which may differ in rank then,

    - `cat`: the factors side by side. It is exact, and the ranks add up.
    - `svd`: the best approximation of the exact sum that has rank `rank`.
    - `magnitude_prune_svd`, `ties_svd`, `dare_linear_svd`, `dare_ties_svd`: the same as above, but of the products of
      the factors, which are then approximated in rank `rank`.

    Sums are computed in float64, and have the first delta's dtype. The layers of an `nn.scan` share their leaves, so
    `density` counts over all of them.

    Args:
      deltas: what `finetuned` gave, attached deltas, saved folders, or repositories of the Hub.
      weights: a number for each.
      combination: one of the above; by default the exact sum: `cat` for LoRA, `linear` for everything else.
      rank: of the result of the `svd` kind; by default, at each module, the highest rank among the deltas.
      density: for those that leave entries out: the share that stays, above 0 and at most 1.
      majority_sign_method: of the `ties` kind: the sign of the sum, `"total"`, or that which most have, `"frequency"`.
      rng: seed or key of the `dare` kind.
      base: what values were before training: the backbone's parameters, or `delta.finetuned()` of that time. A leaf
        that it has is then taken as a change from there, except LoRA's, which is a change anyway. Without it, values
        can only be averaged, by weights that sum to 1.
      keep: patterns of the backbone's leaves that are the first delta's in the result, such as the classifier head of
        its task. The other deltas may have others there, or none.
      name: the result's name in the tree; by default the first delta's.
      check_hash: what to do if the deltas were trained on different backbones: `"warn"`, `True` to refuse, `False`
        for nothing.

    Returns:
      A delta of the same method, to be saved, attached or loaded. LoRA's update has the scale 1 then.

    Raises:
      FileNotFoundError, ConnectionError: as `AutoDeltaModel.from_finetuned`.
      TypeError: something is no delta, or no list of them.
      ValueError: deltas of different methods, arguments, modules or shapes; a combination that is unknown, that this
        method does not have, or whose arguments are missing, superfluous or beyond their limits; weights that
        values cannot have; another backbone, with `check_hash=True`.
    """
    found = _read_all(deltas)
    first, numbers = found[0], _weights(weights, len(found))
    kept, pairs = _kept(found, keep), _pairs(first)
    if combination is None:
        combination = "cat" if pairs else "linear"
    how = _combination(combination, rank, density, first, bool(pairs))
    _require_alike(found, kept, pairs, any_rank=how.lora != "factors")
    _require_one_backbone(found, kept, check_hash)
    before = _values_of(base, first, pairs)
    merge = _merge(how, density, majority_sign_method, rng)

    values = dict(first.values)
    for prefix in pairs:
        values |= _merged_pair(found, numbers, prefix, how, rank, merge)
    for key in _others(first, pairs, kept):
        leaves = [delta.values[key] for delta in found]
        if key in before or _is_change(first, key):
            start = before.get(key, np.zeros(()))
            values[key] = start + merge([_wide(leaf) - start for leaf in leaves], numbers)
        elif how.keep == "all" and math.isclose(sum(numbers), 1, abs_tol=1e-6):
            values[key] = _linear(leaves, numbers)
        else:
            asked = f"{combination!r} with weights {', '.join(f'{w:g}' for w in numbers)}"
            raise ValueError(f"{asked}: {_no_change(first, key)} 'linear' with weights that sum to 1 is their mean.")
    return _result(first, values, name, _at_ranks(first, values, pairs))


def interpolate(
    a: Source,
    b: Source,
    t: float,
    *,
    keep: Sequence[str] = (),
    name: str | None = None,
    check_hash: bool | Literal["warn"] = "warn",
) -> Finetuned:
    """The delta at `t` on the straight line from one to another, in the space of the leaves: `(1 − t) a + t b`.

        jdelta.interpolate("movies/", "tweets/", 0.5)

    Any method has it, as values can be averaged. Every leaf is taken for itself, LoRA's factors too, so the ends
    are the deltas themselves, and two equal ones give the same in between. The *update* of LoRA runs along a straight
    line in `weighted_sum([a, b], [1 - t, t])`.

    Args:
      a: the delta at 0: as in `weighted_sum`, and the others of this name too.
      b: the delta at 1.
      t: where; below 0 and above 1 it extrapolates.
      keep: patterns of the backbone's leaves that are those of `a` everywhere.
      name: the result's name in the tree; by default that of `a`.
      check_hash: what to do if they were trained on different backbones.

    Returns:
      A delta with the configuration of `a`.

    Raises:
      FileNotFoundError, ConnectionError, TypeError, ValueError: as `weighted_sum`.
    """
    found = _read_all([a, b])
    first, kept = found[0], _kept(found, keep)
    weights = _weights([1 - t, t], 2)
    _require_alike(found, kept)
    _require_one_backbone(found, kept, check_hash)
    others = _others(first, (), kept)
    mixed = {key: _linear([delta.values[key] for delta in found], weights) for key in others}
    return _result(first, {**first.values, **mixed}, name)


def negate(
    delta: Source, *, base: Tree | Finetuned | None = None, keep: Sequence[str] = (), name: str | None = None
) -> Finetuned:
    """The delta that undoes another: task negation (Ilharco et al. 2023, arXiv 2212.04089).

        jdelta.negate("toxic/", keep=["classifier"])

    LoRA's update gets the opposite sign, by that of `a`, exactly; so do the biases that BitFit adds. A leaf of `base`
    goes as far to the other side of it. There is no negative of an adapter, a prefix or a prompt without `base`.

    Args:
      delta: as in `weighted_sum`, and the others of this name too.
      base: what values were before training.
      keep: patterns of the backbone's leaves that stay as they are.
      name: the result's name in the tree; by default the delta's.

    Returns:
      A delta with the same configuration.

    Raises:
      FileNotFoundError, ConnectionError, TypeError: as `weighted_sum`.
      ValueError: a leaf holds a value that is not in `base`.
    """
    (found,) = _read_all([delta])
    kept, pairs = _kept([found], keep), _pairs(found)
    before = _values_of(base, found, pairs)
    values = dict(found.values)
    for prefix in pairs:
        values[f"{prefix}.a"] = -values[f"{prefix}.a"]
    for key in _others(found, pairs, kept):
        if key in before:
            values[key] = 2 * before[key] - _wide(values[key])
        elif _is_change(found, key):
            values[key] = -values[key]
        else:
            raise ValueError(f"negate: {_no_change(found, key)}")
    return _result(found, values, name)


# --- changes of one leaf, in float64


def _merge(
    how: Combination, density: float | None, majority_sign_method: Literal["total", "frequency"], rng: int | jax.Array
) -> Merge:
    """The function that makes one change of several."""
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method is 'total' or 'frequency', got {majority_sign_method!r}.")
    key = jax.random.key(rng) if isinstance(rng, int) else rng
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    share = 1.0 if density is None else density

    def merge(changes: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
        if how.keep == "largest":
            changes = [_largest(change, share) for change in changes]
        elif how.keep == "random":
            changes = [change * (generator.random(change.shape) < share) / share for change in changes]
        return _elected(changes, weights, majority_sign_method) if how.elect else _linear(changes, weights)

    return merge


def _linear(leaves: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    return sum((weight * _wide(leaf) for leaf, weight in zip(leaves, weights, strict=True)), np.zeros(()))


def _largest(change: np.ndarray, density: float) -> np.ndarray:
    """The share of entries that are largest, at least one of them; 0 for the others."""
    flat = change.reshape(-1)
    stay = np.argsort(-np.abs(flat), kind="stable")[: max(1, int(density * flat.size))]
    left = np.zeros_like(flat)
    left[stay] = flat[stay]
    return left.reshape(change.shape)


def _elected(changes: Sequence[np.ndarray], weights: Sequence[float], method: str) -> np.ndarray:
    """The mean, over those that have the majority's sign, of change times weight; with no majority, that is plus."""
    stack = np.stack(changes)
    signs = np.sign(stack)
    votes = (stack if method == "total" else signs).sum(0)
    agree = signs == np.where(votes >= 0, 1, -1)
    weighted = stack * agree * np.reshape(weights, (-1, *[1] * (stack.ndim - 1)))
    return weighted.sum(0) / np.maximum(agree.sum(0), 1)


# --- LoRA: a is (layers…, *d_in, r) and b (layers…, r, *d_out), with axes of layers where there is an nn.scan

_SCALED = ("lora_r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora")  # may differ


def _at_ranks(first: Finetuned, values: Mapping[str, np.ndarray], pairs: Sequence[str]) -> DeltaConfig:
    """The first delta's configuration; that of LoRA for leaves of these ranks, whose scale is 1."""
    if not pairs:
        return first.config
    ranks = {prefix.rpartition(".")[0]: values[f"{prefix}.a"].shape[-1] for prefix in pairs}
    rank = max(ranks.values())
    # The first pattern that matches counts, so a name goes before those that it ends with.
    each = {target: ranks[target] for target in sorted(ranks, key=len, reverse=True)}
    pattern = each if len({*ranks.values()}) > 1 else None
    return dataclasses.replace(
        cast(LoraConfig, first.config),
        lora_r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        use_rslora=False,
    )


def _pairs(found: Finetuned) -> tuple[str, ...]:
    """Where LoRA has its pairs of leaves; nothing for another method, or where layers were put in by hand."""
    if not isinstance(found.config, LoraConfig) or found.inserted:
        return ()
    own = {key for key in found.values if _is_own(found, key)}
    prefixes = tuple(sorted(key.removesuffix(".a") for key in own if key.endswith(".a")))
    if odd := own ^ _leaves(prefixes):
        raise ValueError(f"delta {found.name!r} has not the leaves of LoRA at {listing(sorted(odd))}.")
    return prefixes


def _leaves(pairs: Sequence[str]) -> set[str]:
    return {f"{prefix}.{leaf}" for prefix in pairs for leaf in ("a", "b")}


def _merged_pair(
    found: Sequence[Finetuned], weights: Sequence[float], prefix: str, how: Combination, rank: int | None, merge: Merge
) -> dict[str, np.ndarray]:
    """The leaves of one module's update, whose scale is 1."""
    target = prefix.rpartition(".")[0]
    a, b = ([_wide(delta.values[f"{prefix}.{leaf}"]) for delta in found] for leaf in ("a", "b"))
    scales = [cast(LoraConfig, delta.config).scale_of(target) for delta in found]
    total = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
    if how.lora == "factors":
        roots = [math.sqrt(abs(c)) for c in total]
        signed = [math.copysign(root, c) for root, c in zip(roots, total, strict=True)]
        return {f"{prefix}.a": merge(a, signed), f"{prefix}.b": merge(b, roots)}

    n = _layer_axes(found[0], prefix, a, b)
    layers, d_in, d_out = a[0].shape[:n], a[0].shape[n:-1], b[0].shape[n + 1 :]
    left = [x.reshape(*layers, -1, x.shape[-1]) for x in a]
    right = [x.reshape(*layers, x.shape[n], -1) for x in b]
    if how.keep == "all":
        u = np.concatenate([c * x for c, x in zip(total, left, strict=True)], -1)
        v = np.concatenate(right, -2)
        full, ranks = min(u.shape[-2], v.shape[-1]), u.shape[-1]
        if how.lora == "product":
            u, v = _truncated_product(u, v, _checked_rank(rank, left, min(full, ranks), target))
        elif ranks > full:
            raise ValueError(f"'cat': the ranks add up to {ranks}, above the width of {target}, {full}. Take 'svd'.")
    else:
        products = [scale * x @ y for scale, x, y in zip(scales, left, right, strict=True)]
        full = min(products[0].shape[-2:])
        u, v = _truncated(merge(products, weights), _checked_rank(rank, left, full, target))
    return {f"{prefix}.a": u.reshape(*layers, *d_in, -1), f"{prefix}.b": v.reshape(*layers, -1, *d_out)}


def _checked_rank(rank: int | None, left: Sequence[np.ndarray], full: int, target: str) -> int:
    """The rank of the result, by default the highest of the `(…, d_in, r)` factors."""
    rank = max(x.shape[-1] for x in left) if rank is None else rank
    if rank > full:
        raise ValueError(f"rank={rank} is more than the sum has at {target}. Take at most {full}.")
    return rank


def _truncated(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The two factors of the closest matrix of some rank (Eckart and Young 1936); the first one is orthonormal."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return u[..., :rank], s[..., :rank, None] * v[..., :rank, :]


def _truncated_product(left: np.ndarray, right: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """`_truncated(left @ right, rank)`, without making the product, which for an embedding is as large as this."""
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(np.swapaxes(right, -1, -2))
    u, v = _truncated(r_left @ np.swapaxes(r_right, -1, -2), rank)
    return q_left @ u, v @ np.swapaxes(q_right, -1, -2)


def _layer_axes(first: Finetuned, prefix: str, a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> int:
    """How many axes of layers come first. The leaves' shapes do not tell it if there are as many layers as ranks."""
    fitting = [n for n in range(a[0].ndim - 1) if all(_fits(x, y, n) for x, y in zip(a, b, strict=True))]
    if (kernel := _kernel_axes(first, prefix.rpartition(".")[0])) is not None:
        fitting = [n for n in fitting if n == a[0].ndim + b[0].ndim - 2 - kernel]
    if len(fitting) == 1:
        return fitting[0]
    raise ValueError(
        f"{prefix}: which axes of a, {list(a[0].shape)}, and b, {list(b[0].shape)}, are ranks and which are layers is "
        "unclear without the backbone's kernel. Use 'linear', or deltas that were saved with jdelta's fingerprint."
    )


def _fits(a: np.ndarray, b: np.ndarray, n: int) -> bool:
    return b.ndim >= n + 2 and a.shape[:n] == b.shape[:n] and a.shape[-1] == b.shape[n]


def _kernel_axes(found: Finetuned, target: str) -> int | None:
    """The number of axes of the host's weights, if they are known."""
    for weights in (f"{target}.kernel".lstrip("."), f"{target}.embedding".lstrip(".")):
        if weights in found.values:
            return found.values[weights].ndim
        if found.backbone is not None and weights in found.backbone.leaves:
            shape = found.backbone.leaves[weights].partition("[")[2].partition("]")[0]
            return shape.count(",") + 1
    return None


# --- what is given


def _read_all(deltas: Sequence[Source]) -> list[Finetuned]:
    """The deltas apart from any model, all under the first one's name."""
    if isinstance(deltas, (str, os.PathLike, Finetuned, DeltaModel)):
        raise TypeError("expected a list of deltas, got one. Write [delta].")
    found = [_read(source) for source in deltas]
    if not found:
        raise ValueError("there are no deltas. Give at least one.")
    return [delta.renamed(found[0].name) for delta in found]


def _read(source: Source) -> Finetuned:
    if isinstance(source, Finetuned):
        return source
    if isinstance(source, DeltaModel):
        return source.finetuned()
    if isinstance(source, (str, os.PathLike)):
        return Finetuned.read(hub.fetch(source))
    raise TypeError(f"a delta is what finetuned() gave, an attached delta or a folder, got {type(source).__name__}.")


def _weights(weights: Sequence[float], count: int) -> list[float]:
    numbers = [float(weight) for weight in weights]
    if len(numbers) != count:
        raise ValueError(f"there are {count} deltas and {len(numbers)} weights. Give one weight for each delta.")
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"weights are finite numbers, got {numbers}.")
    return numbers


def _combination(
    combination: str, rank: int | None, density: float | None, first: Finetuned, is_lora: bool
) -> Combination:
    """The combination of this name, if its arguments are given and no others, and the method has it."""
    if combination not in COMBINATIONS:
        near = did_you_mean(str(combination), COMBINATIONS)
        raise ValueError(f"combination {combination!r} is unknown.{near} There are: {', '.join(COMBINATIONS)}.")
    how = COMBINATIONS[combination]
    if how.lora != "factors" and not is_lora:
        has = ", ".join(key for key, other in COMBINATIONS.items() if other.lora == "factors")
        by_hand = " with layers put in by hand" if first.inserted else ""
        raise ValueError(
            f"combination {combination!r} is for LoRA; method {first.config.delta_type!r}{by_hand} has {has}."
        )
    if rank is not None and how.lora != "product":
        raise ValueError(f"combination {combination!r} takes no rank.")
    if rank is not None and rank < 1:
        raise ValueError(f"rank is at least 1, got {rank}.")
    if how.keep == "all" and density is not None:
        raise ValueError(f"combination {combination!r} leaves nothing out, and takes no density.")
    if how.keep != "all" and (density is None or not 0 < density <= 1):
        raise ValueError(f"combination {combination!r} needs a density above 0 and at most 1, got {density}.")
    return how


def _require_alike(
    found: Sequence[Finetuned], kept: set[str], pairs: Sequence[str] = (), any_rank: bool = False
) -> None:
    """Raises `ValueError` unless the deltas are the same up to their values, and LoRA's pairs up to scale or rank."""
    first = found[0]
    for i, other in enumerate(found[1:], 2):
        _require_same_arguments(first, other, i, _SCALED if pairs else ())
        for what, here, there in (
            ("module", first.targets, other.targets),
            ("inserted layer", first.inserted, other.inserted),
            ("leaf", first.values.keys() - kept, other.values.keys() - kept),
        ):
            if odd := sorted({*here} ^ {*there}):
                without, has = (i, 1) if odd[0] in here else (1, i)
                hint = f" {_keep_hint(odd[0])} takes that of delta 1." if what == "leaf" else ""
                raise ValueError(f"delta {without} has no {what} {odd[0]}, which delta {has} has.{hint}")
        for prefix in pairs if any_rank else ():
            if not _same_up_to_rank(*(d.values[f"{prefix}.{leaf}"].shape for d in (first, other) for leaf in "ab")):
                raise ValueError(f"{prefix} is that of another module in delta {i} than in delta 1: its widths differ.")
        for key in sorted(first.values.keys() - kept - (_leaves(pairs) if any_rank else set())):
            _require_shape(first, key, other.values[key].shape, f"in delta {i}")


def _require_same_arguments(first: Finetuned, other: Finetuned, i: int, free: Sequence[str]) -> None:
    mine, its = first.config.to_dict(), other.config.to_dict()
    if mine["delta_type"] != its["delta_type"]:
        raise ValueError(
            f"delta 1 is of method {mine['delta_type']!r}, delta {i} of {its['delta_type']!r}. Only deltas of one "
            "method can be combined."
        )
    common = {field.name for field in dataclasses.fields(DeltaConfig)}
    for key in sorted(mine.keys() - common - {*free}):
        if mine[key] != its[key]:
            raise ValueError(f"delta 1 has {key}={mine[key]!r}, delta {i} has {key}={its[key]!r}.")


def _same_up_to_rank(a: Shape, b: Shape, other_a: Shape, other_b: Shape) -> bool:
    """Whether two pairs differ in the last axis of `a`, and likewise in one axis of `b`, at most."""
    ranks = (a[-1], other_a[-1])
    unequal = [sizes for sizes in zip(b, other_b, strict=False) if sizes[0] != sizes[1]]
    return a[:-1] == other_a[:-1] and len(b) == len(other_b) and unequal == [ranks] * (ranks[0] != ranks[1])


def _require_shape(first: Finetuned, key: str, shape: Shape, where: str) -> None:
    if (mine := first.values[key].shape) == shape:
        return
    hint = " Deltas of different ranks combine by 'cat' or 'svd'." if isinstance(first.config, LoraConfig) else ""
    if not _is_own(first, key):
        hint = f" {_keep_hint(key)} takes that of delta 1."
    raise ValueError(f"{key} has shape {list(mine)}, {where} {list(shape)}.{hint}")


def _require_one_backbone(found: Sequence[Finetuned], kept: set[str], check_hash: bool | Literal["warn"]) -> None:
    """Compares what stayed as it was in all of the deltas."""
    mine = found[0].backbone
    for i, other in enumerate(found[1:], 2):
        if not check_hash or mine is None or other.backbone is None:
            continue
        trained = {*kept, *found[0].values, *other.values}
        have, want = (
            {key: text for key, text in info.leaves.items() if key not in trained} for info in (other.backbone, mine)
        )
        structure, values = fingerprint.differences(have, want)
        if not structure and not values:
            continue
        what = listing(structure) if structure else f"other values in {listing(values)}"
        message = (
            f"the backbone of delta {i} is not that of delta 1: {what}. Their sum means nothing then; if it does, "
            "pass check_hash=False."
        )
        if check_hash != "warn":
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)


def _kept(found: Sequence[Finetuned], keep: Sequence[str]) -> set[str]:
    """The backbone's leaves that patterns name, in any of the deltas."""
    names = sorted({key for delta in found for key in delta.values if not _is_own(delta, key)})
    kept: set[str] = set()
    for pattern in checked(keep):
        hits = {key for key in names if matches_at_or_above(key, pattern)}
        if not hits:
            raise ValueError(f"keep takes leaves of the backbone that trained: {nothing_matches(pattern, names)}")
        kept |= hits
    return kept


def _values_of(base: Tree | Finetuned | None, first: Finetuned, pairs: Sequence[str]) -> dict[str, np.ndarray]:
    """The base's value of each leaf that it has, LoRA's pairs left out."""
    if base is None:
        return {}
    if isinstance(base, Finetuned):
        leaves: Mapping[str, Any] = base.renamed(first.name).values
    else:
        leaves = {surgery.name_of(path): leaf for path, leaf in surgery.flatten(surgery.parameters(base)).items()}
    values = {key: _wide(fingerprint.to_host(leaves[key])) for key in _others(first, pairs) if key in leaves}
    for key, value in values.items():
        _require_shape(first, key, value.shape, "in base")
    return values


def _others(found: Finetuned, pairs: Sequence[str], kept: Collection[str] = ()) -> list[str]:
    """The leaves that are neither in a pair nor kept; sorted, so that the same seed gives the same numbers."""
    return sorted(found.values.keys() - _leaves(pairs) - {*kept})


def _is_own(found: Finetuned, key: str) -> bool:
    """Whether a leaf is the delta's, and not one of the backbone's."""
    return found.name in key.split(".")


def _is_change(found: Finetuned, key: str) -> bool:
    return isinstance(found.config, BitFitConfig) and not found.inserted and _is_own(found, key)


def _no_change(found: Finetuned, key: str) -> str:
    what = f"{key} holds a value and no change. Pass what it was before training as base"
    if _is_own(found, key):
        return f"{what}; method {found.config.delta_type!r} has no zero to count from."
    return f"{what}, or {_keep_hint(key)} to take it as it is."


def _keep_hint(key: str) -> str:
    return f"keep=[{(key.rpartition('.')[0] or key)!r}]"


def _wide(value: np.ndarray) -> np.ndarray:
    return np.asarray(value, np.float64)


def _result(
    first: Finetuned, values: Mapping[str, np.ndarray], name: str | None, config: DeltaConfig | None = None
) -> Finetuned:
    """A delta as the first one, with these values in its dtypes."""
    typed = {key: np.asarray(value).astype(first.values[key].dtype) for key, value in values.items()}
    result = dataclasses.replace(first, config=config or first.config, values=typed)
    return result if name is None else result.renamed(name)
