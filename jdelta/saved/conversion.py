"""Any change of weights as LoRA, so that what serves LoRA serves it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdelta.core import merging, weights
from jdelta.core.config import as_number, require_positive_int, shown
from jdelta.core.edits import WeightEdit
from jdelta.core.generators import with_generated
from jdelta.core.state import DeltaState, targets
from jdelta.methods.lora import LoraConfig
from jdelta.methods.lora_rules import LoraRule
from jdelta.saved.extraction import finetuned
from jdelta.saved.finetuned import Finetuned, listing
from jdelta.trees import addressing, processes, surgery
from jdelta.trees.surgery import Path, Tree


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A delta as LoRA, and what that leaves out; `convert_to_lora` returns it.

        converted = jdelta.convert_to_lora(delta, rank=8)
        lora, worst = converted.delta, max(converted.errors, key=converted.errors.get)

    Attributes:
      delta: LoRA, to be saved, attached or combined with others. Its scale is 1.
      errors: name of each module, or parameter, to `‖change − a b‖ / ‖change‖` in Frobenius norms; 0 if there is no
        change. Of the layers of a scan, and of experts, it is that of all together.
    """

    delta: Finetuned
    errors: Mapping[str, float]

    @property
    def error(self) -> float:
        """The largest of the errors."""
        return max(self.errors.values(), default=0.0)


def convert_to_lora(delta: Any, rank: int | float = 8, params: Tree | None = None, name: str = "lora") -> Conversion:
    """Returns a delta that changes weights as LoRA: the best approximation of each change that has a rank.

        converted = jdelta.convert_to_lora(delta, rank=8)
        converted.delta.save("as_lora/")
        print(converted.error)  # the largest of all modules

    The changes are computed in float32 and decomposed in float64. What else trained, such as a head, is taken over.

    Args:
      delta: an attached one, of any method whose change is of weights: LoRA of any kind, LoHa, IA3 before a module, …
      rank: of the result, an int; or a float below 1, the share of each change's variance that is kept: the rank then
        is the lowest that keeps it, a module's own.
      params: the tree that holds the values; by default `model.params`.
      name: the name of the result in the tree.

    Raises:
      RuntimeError: the delta is detached or merged.
      TypeError: it is no attached delta, or the rank is no number.
      ValueError: the delta does something else than change weights, as adapters, prefixes and changed biases do; the
        rank is outside its limits; the model holds shapes only.
    """
    state = getattr(delta, "_state", None)
    if not isinstance(state, DeltaState):
        raise TypeError(f"convert_to_lora takes an attached delta, got {shown(delta)}.")
    rank = _checked(rank)
    own, tree = state.active("converted"), surgery.parameters(state.values(params))
    leaves = surgery.flatten(with_generated({"params": tree}, [own])["params"])
    found = finetuned(state, params)
    _require_weights(state, leaves)

    values = {key: value for key, value in found.values.items() if not found.is_own(key)}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    by_module: dict[str, bool] = {}
    for edit in own.weight_edits:
        if edit.is_bias:
            continue
        target = surgery.name_of(edit.host if edit.by_module else edit.leaf)
        change = _change(edit, leaves)
        pair, ranks[target], errors[target] = _approximated(edit, change, rank)
        values |= {surgery.name_of((*edit.host, name, *edit.own, key)): value for key, value in pair.items()}
        by_module[target] = edit.by_module
    order = [target for target in targets(state) if target in ranks]
    config = _config(order, by_module, ranks, list(state.structure.modules), list(map(surgery.name_of, leaves)))
    result = Finetuned(name, config, values, order, exclude=found.exclude, backbone=found.backbone)
    return Conversion(result, {target: errors[target] for target in order})


def _checked(rank: int | float) -> int | float:
    if isinstance(rank, int) and not isinstance(rank, bool):
        require_positive_int("rank", rank)
        return rank
    share = as_number("rank", rank)
    if not 0 < share < 1:
        raise ValueError(f"rank is a whole number, or a share of variance between 0 and 1, got {share:g}.")
    return share


def _require_weights(state: DeltaState, leaves: Mapping[Path, Any]) -> None:
    """Raises `ValueError` unless all that the delta does is to change weights by products."""
    own = state.attachment
    others = {surgery.name_of(edit.host) for edit in own.call_edits}
    for edit in own.weight_edits:
        if edit.is_bias and np.any(_change(edit, leaves)):
            others.add(surgery.name_of(edit.leaf))
    if others:
        raise ValueError(
            f"{state.label} does more than change matrices, at {listing(sorted(others))}, and LoRA does that alone. "
            "Exclude these, or save it as it is."
        )


def _change(edit: WeightEdit, leaves: Mapping[Path, Any]) -> np.ndarray:
    leaf = leaves[edit.leaf]
    merging.require_steps_of(edit.leaf, leaf)
    value = processes.to_host(weights.update(edit, leaf, weights.own_leaves(edit, leaves)))
    return np.asarray(value, np.float64)


def _approximated(edit: WeightEdit, change: np.ndarray, rank: int | float) -> tuple[dict[str, np.ndarray], int, float]:
    """`a` and `b` as LoRA stores them at this place, their rank, and the error."""
    layout = weights.layout_of(edit)
    for depth, axis in enumerate(reversed(edit.layers)):
        change = np.moveaxis(change, depth + axis, depth)
    n = len(edit.layers)
    order = [*range(n), *(n + axis for axis in (*layout.shared, *layout.d_in, *layout.d_out))]
    d_in, d_out = layout.matrix_shape(edit.shape)
    matrices = change.transpose(order).reshape(*change.shape[:n], *layout.sizes(edit.shape, "shared"), d_in, d_out)
    u, s, v = np.linalg.svd(matrices, full_matrices=False)
    most = min(d_in, d_out)
    if isinstance(rank, float):
        kept = np.cumsum(s**2, -1) >= rank * np.sum(s**2, -1, keepdims=True)
        rank = int(np.max(np.argmax(kept, axis=-1))) + 1
    rank = min(rank, most)
    total, lost = np.sum(s**2), np.sum(s[..., rank:] ** 2)
    root = np.sqrt(s[..., :rank])
    pair = {"a": u[..., :rank] * root[..., None, :], "b": root[..., None] * v[..., :rank, :]}
    lora = dataclasses.replace(edit, rule=LoraRule(rank, 1.0))
    stored = {key: _stored(lora, key, value.astype(np.float32), edit.layers) for key, value in pair.items()}
    return stored, rank, float(np.sqrt(lost / total)) if total else 0.0


def _stored(lora: WeightEdit, key: str, value: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    """A factor as it is stored, from `(*layers, *shared, …)`, the outermost layers first."""
    if not layers:
        return np.asarray(weights.stored_own(lora, key, value))  # type: ignore[arg-type]
    *rest, axis = layers
    return np.stack([_stored(lora, key, each, rest) for each in value], axis=axis)


def _config(
    order: Sequence[str], by_module: Mapping[str, bool], ranks: Mapping[str, int], modules: list[str], leaves: list[str]
) -> LoraConfig:
    """LoRA of these ranks, at the scale 1."""
    patterns = {target: addressing.exact(target, modules if by_module[target] else leaves) for target in order}
    most = max(ranks.values())
    lower: Any = {patterns[target]: ranks[target] for target in order if ranks[target] != most} or None
    of_modules = tuple(patterns[target] for target in order if by_module[target])
    of_leaves = tuple(patterns[target] for target in order if not by_module[target])
    return LoraConfig(
        modified_modules=of_modules or None,
        modified_parameters=of_leaves or None,
        lora_r=most,
        lora_alpha=most,
        rank_pattern=lower,
        alpha_pattern=lower,
    )
