"""Arithmetic on trained deltas of one backbone: weighted sums, task arithmetic, TIES, DARE, interpolation.

Each leaf holds a *change* or a *value*. A change says how far training went from the backbone, so it can be added,
weighted and negated: the pairs of LoRA and the biases that BitFit adds are changes. Everything else holds values: the
leaves of adapters, prefixes and prompts, and the backbone's own leaves that trained, such as a classifier head. Values
can only be averaged, unless `base` tells what they were before training; their difference from it is a change.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import chex
import numpy as np

from jdelta.core.config import as_number, require_name
from jdelta.core.method import Method
from jdelta.methods.bitfit import BitFitConfig
from jdelta.saved.arithmetic import checks, lora_factors
from jdelta.saved.arithmetic.checks import Source
from jdelta.saved.arithmetic.merge_rules import linear, merger, wide
from jdelta.saved.finetuned import Finetuned
from jdelta.trees.surgery import Tree


def weighted_sum(
    deltas: Sequence[Source],
    weights: Sequence[float],
    combination: str | None = None,
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
    rng: int | chex.PRNGKey = 0,
    base: Tree | Finetuned | None = None,
    keep: Sequence[str] = (),
    name: str | None = None,
    check_hash: bool | Literal["warn"] = "warn",
) -> Finetuned:
    """Returns the weighted sum of several deltas, as one delta.

        both = jdelta.weighted_sum(["movies/", "tweets/"], [0.7, 0.3], "svd", rank=8, keep=["classifier"])
        delta = jdelta.AutoDeltaModel.from_finetuned(both, backbone_model=model)

    Negative weights subtract a task (Ilharco et al. 2023, arXiv 2212.04089). The combinations are those of PyTorch
    PEFT's `add_weighted_adapter`, with the same results. For every method there are

    - `linear`: the sum of the leaves. LoRA's two factors are summed separately, each with the root of weight times
      scale, so that the product has cross terms: two equal deltas with weights 0.5 have twice the effect of one.
    - `magnitude_prune`: the same, of the largest entries of each leaf, `density` of them.
    - `ties`: the same largest entries, without those whose sign is not the majority's, averaged over the number that
      remain (Yadav et al. 2023, arXiv 2306.01708).
    - `dare_linear`, `dare_ties`: a random share `density` of the entries, divided by `density`, in place of the largest
      (Yu et al. 2023, arXiv 2311.03099).

    and for LoRA, whose ranks may then differ,

    - `cat`: the concatenated factors. It is exact, and its rank is the sum of the ranks.
    - `svd`: the best approximation of the exact sum that has rank `rank`.
    - `magnitude_prune_svd`, `ties_svd`, `dare_linear_svd`, `dare_ties_svd`: as above, but of the products of the
      factors, which are then approximated with rank `rank`.

    Sums are computed in float64 and have the dtype of the first delta. The layers of an `nn.scan` are in one leaf, and
    `density` is over all of them.

    Args:
      deltas: `Finetuned` objects, attached deltas, saved folders, or repositories of the Hub.
      weights: a number for each delta.
      combination: one of the above; by default the exact sum: `cat` for LoRA, `linear` for all other methods.
      rank: of the result of the `svd` combinations; by default, at each module, the highest rank among the deltas.
      density: the share of entries that remain, above 0 and at most 1, for the combinations that drop entries.
      majority_sign_method: for `ties`: the sign of the sum, `"total"`, or the most frequent sign, `"frequency"`.
      rng: seed or key, for `dare`.
      base: the values before training: the backbone's parameters, or `delta.finetuned()` of that time. A leaf of it
        counts as a change from there, except LoRA's, which is a change already. Without it, values can only be
        averaged, with weights that sum to 1.
      keep: patterns of the backbone's leaves that the result takes from the first delta, such as the classifier head of
        its task. The other deltas may have different ones, or none.
      name: the name of the result in the tree; by default that of the first delta.
      check_hash: what happens if the deltas were trained on different backbones: a warning with `"warn"`, an error with
        `True`, nothing with `False`.

    Returns:
      A delta of the same method, to be saved, attached or loaded. The scale of LoRA's update is then 1.

    Raises:
      FileNotFoundError, ConnectionError: as `AutoDeltaModel.from_finetuned`.
      TypeError: `deltas` is not a list of deltas.
      ValueError: the deltas differ in method, arguments, modules or shapes; the combination is unknown or the method
        does not support it, or its arguments are missing, superfluous or outside their limits; the weights do not sum
        to 1 where values are averaged; the backbones differ, with `check_hash=True`.
    """
    if name is not None:
        require_name(name)
    found = checks.read_all(deltas)
    first, numbers = found[0], checks.finite(weights, len(found))
    kept, pairs = checks.kept_leaves(found, keep), lora_factors.pairs_of(first)
    if combination is None:
        combination = "cat" if pairs else "linear"
    how = checks.combination_of(combination, rank, density, first, bool(pairs))
    checks.require_alike(found, kept, pairs, any_rank=how.lora != "factors")
    checks.require_one_backbone(found, kept, check_hash)
    before = checks.values_before(base, first, pairs)
    merge = merger(how, density, majority_sign_method, rng)

    values = dict(first.values)
    for pair in pairs:
        values |= lora_factors.merged(found, numbers, pair, how, rank, merge)
    for key in checks.added_up(found, pairs, kept):
        leaves = [delta.values[key] for delta in found]
        if key in before or _is_change(first, key):
            start = before.get(key, np.zeros(()))
            values[key] = start + merge([wide(leaf) - start for leaf in leaves], numbers)
        elif how.keep == "all" and math.isclose(sum(numbers), 1, abs_tol=1e-6):
            values[key] = linear(leaves, numbers)
        else:
            asked = f"{combination!r} with weights {', '.join(f'{w:g}' for w in numbers)}"
            raise ValueError(f"{asked}: {_no_change(first, key)} 'linear' with weights that sum to 1 is their mean.")
    return _result(first, values, name, lora_factors.at_ranks(first, values, pairs))


def interpolate(
    a: Source,
    b: Source,
    t: float,
    *,
    keep: Sequence[str] = (),
    name: str | None = None,
    check_hash: bool | Literal["warn"] = "warn",
) -> Finetuned:
    """Returns the delta between two others, leaf by leaf: `(1 − t) a + t b`.

        half = jdelta.interpolate("movies/", "tweets/", 0.5)
        delta = jdelta.AutoDeltaModel.from_finetuned(half, backbone_model=model)

    Every method supports it. Each leaf is interpolated by itself, LoRA's factors too: the results at 0 and 1 are the
    deltas themselves, and between two equal deltas all are equal. LoRA's *update* is interpolated by
    `weighted_sum([a, b], [1 - t, t])`.

    Args:
      a: the delta at 0, given as in `weighted_sum`.
      b: the delta at 1.
      t: the position; below 0 and above 1 it extrapolates.
      keep: patterns of the backbone's leaves that the result takes from `a`.
      name: the name of the result in the tree; by default that of `a`.
      check_hash: as in `weighted_sum`.

    Returns:
      A delta with the configuration of `a`.

    Raises:
      FileNotFoundError, ConnectionError, TypeError, ValueError: as `weighted_sum`.
    """
    t = as_number("t", t)
    found = checks.read_all([a, b])
    first, kept = found[0], checks.kept_leaves(found, keep)
    weights = checks.finite([1 - t, t], 2)
    checks.require_alike(found, kept)
    checks.require_one_backbone(found, kept, check_hash)
    values = dict(first.values)
    for key in checks.added_up(found, (), kept):
        values[key] = linear([delta.values[key] for delta in found], weights)
    return _result(first, values, name)


def negate(
    delta: Source, *, base: Tree | Finetuned | None = None, keep: Sequence[str] = (), name: str | None = None
) -> Finetuned:
    """Returns the delta with the opposite change: task negation (Ilharco et al. 2023, arXiv 2212.04089).

        opposite = jdelta.negate("toxic/", keep=["classifier"])
        delta = jdelta.AutoDeltaModel.from_finetuned(opposite, backbone_model=model)

    LoRA's update is negated exactly, by the sign of `a`; so are the biases that BitFit adds. A leaf that is in `base`
    becomes `2 · base − leaf`. Without `base`, an adapter, a prefix or a prompt has no negative.

    Args:
      delta: given as in `weighted_sum`.
      base: the values before training, as in `weighted_sum`.
      keep: patterns of the backbone's leaves that stay as they are.
      name: the name of the result in the tree; by default that of the delta.

    Returns:
      A delta with the same configuration.

    Raises:
      FileNotFoundError, ConnectionError, TypeError: as `weighted_sum`.
      ValueError: a leaf holds a value, and `base` does not have it.
    """
    (found,) = checks.read_all([delta])
    kept, pairs = checks.kept_leaves([found], keep), lora_factors.pairs_of(found)
    before = checks.values_before(base, found, pairs)
    values = dict(found.values)
    for pair in pairs:
        values[f"{pair}.a"] = -values[f"{pair}.a"]
    for key in checks.added_up([found], pairs, kept):
        if key in before:
            values[key] = 2 * before[key] - wide(values[key])
        elif _is_change(found, key):
            values[key] = -values[key]
        else:
            raise ValueError(f"negate: {_no_change(found, key)}")
    return _result(found, values, name)


def _is_change(found: Finetuned, key: str) -> bool:
    return isinstance(found.config, BitFitConfig) and not found.inserted and found.is_own(key)


def _no_change(found: Finetuned, key: str) -> str:
    what = f"{key} holds a value and no change. Pass what it was before training as base"
    if found.is_own(key):
        return f"{what}; method {found.config.delta_type!r} has no zero to count from."
    return f"{what}, or {checks.keep_hint(key)} to take it as it is."


def _result(
    first: Finetuned, values: Mapping[str, np.ndarray], name: str | None, config: Method | None = None
) -> Finetuned:
    """A delta as the first one, with these values in its dtypes."""
    typed = {key: np.asarray(value).astype(first.values[key].dtype) for key, value in values.items()}
    result = dataclasses.replace(first, config=config or first.config, values=typed)
    return result if name is None else result.renamed(name)
