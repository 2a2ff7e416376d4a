"""What arithmetic on deltas is given: read, and refused where it does not go together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jdelta.core.config import as_int, as_number, did_you_mean, require_positive_int, shown
from jdelta.core.method import Method
from jdelta.core.warn import warn
from jdelta.methods.lora import LoraConfig
from jdelta.saved import hub
from jdelta.saved.arithmetic.lora_factors import SCALED, leaves_of, same_up_to_rank
from jdelta.saved.arithmetic.merge_rules import COMBINATIONS, Combination, wide
from jdelta.saved.finetuned import Finetuned, HasFinetuned, listing, require_check_hash
from jdelta.trees import dtypes, fingerprint, processes, surgery
from jdelta.trees.addressing import checked, matches_at_or_above, nothing_matches
from jdelta.trees.surgery import Tree

Source = Finetuned | HasFinetuned | str | os.PathLike[str]


def read_all(deltas: Sequence[Source]) -> list[Finetuned]:
    """The deltas apart from any model, all under the first one's name."""
    if isinstance(deltas, (str, os.PathLike, Finetuned, HasFinetuned)):
        raise TypeError("expected a list of deltas, got one. Write [delta].")
    if not isinstance(deltas, Iterable):
        raise TypeError(f"expected a list of deltas, got {shown(deltas)}.")
    found = [_read(source) for source in deltas]
    if not found:
        raise ValueError("there are no deltas. Give at least one.")
    return [delta.renamed(found[0].name) for delta in found]


def _read(source: Source) -> Finetuned:
    if isinstance(source, Finetuned):
        return source
    if isinstance(source, HasFinetuned):
        return source.finetuned()
    if isinstance(source, (str, os.PathLike)):
        return Finetuned.read(hub.fetch(source))
    raise TypeError(f"a delta is what finetuned() gave, an attached delta or a folder, got {type(source).__name__}.")


def finite(weights: Sequence[float], count: int) -> list[float]:
    """The weights, if there are so many, and they are finite."""
    if isinstance(weights, str | bytes) or not isinstance(weights, Iterable):
        raise TypeError(f"expected a list of weights, a number for each delta, got {shown(weights)}.")
    numbers = [as_number(f"weight {i}", weight) for i, weight in enumerate(weights, 1)]
    if len(numbers) != count:
        raise ValueError(f"there are {count} deltas and {len(numbers)} weights. Give one weight for each delta.")
    return numbers


def combination_of(
    combination: str, rank: int | None, density: float | None, first: Finetuned, is_lora: bool
) -> Combination:
    """The combination of this name, if its arguments are given and no others, and the method has it."""
    if not isinstance(combination, str) or combination not in COMBINATIONS:
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
    if rank is not None:
        require_positive_int("rank", as_int("rank", rank))
    if how.keep == "all" and density is not None:
        raise ValueError(f"combination {combination!r} leaves nothing out, and takes no density.")
    if density is not None:
        density = as_number("density", density)
    if how.keep != "all" and (density is None or not 0 < density <= 1):
        raise ValueError(f"combination {combination!r} needs a density above 0 and at most 1, got {density}.")
    return how


def require_alike(
    found: Sequence[Finetuned], kept: set[str], pairs: Sequence[str] = (), any_rank: bool = False
) -> None:
    """Raises `ValueError` unless the deltas are the same up to their values, and LoRA's pairs up to scale or rank."""
    first = found[0]
    for i, other in enumerate(found[1:], 2):
        require_same_arguments(first, other, i, SCALED if pairs else ())
        for what, here, there in (
            ("module", first.targets, other.targets),
            ("inserted layer", first.inserted, other.inserted),
            ("leaf", first.values.keys() - kept, other.values.keys() - kept),
        ):
            if odd := sorted({*here} ^ {*there}):
                without, has = (i, 1) if odd[0] in here else (1, i)
                hint = f" {keep_hint(odd[0])} takes that of delta 1." if what == "leaf" else ""
                raise ValueError(f"delta {without} has no {what} {odd[0]}, which delta {has} has.{hint}")
        for pair in pairs if any_rank else ():
            if not same_up_to_rank(*(d.values[f"{pair}.{leaf}"].shape for d in (first, other) for leaf in "ab")):
                raise ValueError(f"{pair} is that of another module in delta {i} than in delta 1: its widths differ.")
        for key in sorted(first.values.keys() - kept - (leaves_of(pairs) if any_rank else set())):
            _require_shape(first, key, other.values[key].shape, f"in delta {i}")


def require_same_arguments(first: Finetuned, other: Finetuned, i: int, free: Sequence[str]) -> None:
    """Raises `ValueError` unless two deltas are of one method and agree in its arguments, up to some."""
    mine, its = first.config.to_dict(), other.config.to_dict()
    if mine["delta_type"] != its["delta_type"]:
        raise ValueError(
            f"delta 1 is of method {mine['delta_type']!r}, delta {i} of {its['delta_type']!r}. Only deltas of one "
            "method can be combined."
        )
    common = {field.name for field in dataclasses.fields(Method)}
    for key in sorted(mine.keys() - common - {*free}):
        if mine[key] != its[key]:
            raise ValueError(f"delta 1 has {key}={mine[key]!r}, delta {i} has {key}={its[key]!r}.")


def _require_shape(first: Finetuned, key: str, shape: tuple[int, ...], where: str) -> None:
    if (mine := first.values[key].shape) == shape:
        return
    hint = " Deltas of different ranks combine by 'cat' or 'svd'." if isinstance(first.config, LoraConfig) else ""
    if not first.is_own(key):
        hint = f" {keep_hint(key)} takes that of delta 1."
    raise ValueError(f"{key} has shape {list(mine)}, {where} {list(shape)}.{hint}")


def require_one_backbone(found: Sequence[Finetuned], kept: set[str], check_hash: bool | Literal["warn"]) -> None:
    """Raises `ValueError`, or warns, if what stayed as it was in all of the deltas is not the same."""
    require_check_hash(check_hash)
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
            f"the backbone of delta {i} is not that of delta 1: {what}. They do not go together then; if they do, "
            "pass check_hash=False."
        )
        if check_hash != "warn":
            raise ValueError(message)
        warn(message)


def kept_leaves(found: Sequence[Finetuned], keep: Sequence[str]) -> set[str]:
    """The backbone's leaves that patterns name, in any of the deltas."""
    names = sorted({key for delta in found for key in delta.values if not delta.is_own(key)})
    kept: set[str] = set()
    for pattern in checked(keep):
        hits = {key for key in names if matches_at_or_above(key, pattern)}
        if not hits:
            raise ValueError(f"keep takes leaves of the backbone that trained: {nothing_matches(pattern, names)}")
        kept |= hits
    return kept


def values_before(base: Tree | Finetuned | None, first: Finetuned, pairs: Sequence[str]) -> dict[str, np.ndarray]:
    """The base's value of each leaf that it has, LoRA's pairs left out."""
    if base is None:
        return {}
    if isinstance(base, Finetuned):
        leaves: Mapping[str, Any] = base.renamed(first.name).values
    else:
        leaves = {surgery.name_of(path): leaf for path, leaf in surgery.flatten(surgery.parameters(base)).items()}
    values = {key: wide(processes.to_host(leaves[key])) for key in others(first, pairs) if key in leaves}
    for key, value in values.items():
        _require_shape(first, key, value.shape, "in base")
    return values


def others(found: Finetuned, pairs: Sequence[str], kept: Collection[str] = ()) -> list[str]:
    """The leaves that are neither in a pair nor kept; sorted, so that the same seed gives the same numbers."""
    return sorted(found.values.keys() - leaves_of(pairs) - {*kept})


def added_up(found: Sequence[Finetuned], pairs: Sequence[str], kept: Collection[str]) -> list[str]:
    """The leaves that are neither in a pair nor kept. Raises `ValueError` if some of them are no floats."""
    names = others(found[0], pairs, kept)
    for name in names:
        for i, delta in enumerate(found, 1):
            dtype = delta.values[name].dtype
            if not dtypes.takes_steps(dtype) or jnp.issubdtype(dtype, jnp.complexfloating):
                raise ValueError(f"{name} holds {dtype} in delta {i}, and only floats add up. Pass {keep_hint(name)}.")
    return names


def keep_hint(key: str) -> str:
    """What to pass to a function so that it keeps a leaf."""
    return f"keep=[{(key.rpartition('.')[0] or key)!r}]"
