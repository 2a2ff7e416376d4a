"""Folds deltas into the weights of their hosts, as a pure function on parameter trees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax.core import meta

from jdelta.core.edits import Attachment, CallEdit
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.trees import dtypes, surgery
from jdelta.trees.surgery import Path, Tree

NO_CHANGE = "what {} computes is no change of the module's weights."


def folded(params: Tree, name: str, attachments: Sequence[Attachment], structure: Structure) -> dict[Path, Any]:
    """The weights of the hosts after the edits of one attached delta are folded into them.

    A layer that can be folded has a method `fold(host, weights, own)`: from the host as the trace saw it, the host's
    own leaves and the layer's, it returns those of the host's leaves that change, and those that it needs besides. Such
    a layer has a method `after_merge()` too: the layer that runs these leaves, if the host has them, while the delta is
    off. Else `movement` can measure the layer, and merging refuses it.

    Args:
      params: the parameters, without other collections.
      name: that of the delta.
      attachments: all of the model, in the order of attaching.
      structure: the backbone's.

    Returns:
      Path to new value of each leaf that changes.

    Raises:
      ValueError: an edit cannot be folded; the message names the first few modules.
    """
    active = [a for a in attachments if a.active]
    earlier = {e.host: a.name for a in active[: [a.name for a in active].index(name)] for e in a.edits if _wraps(e)}
    leaves = surgery.flatten(params)
    modules = {info.path: info for info in structure}
    changed: dict[Path, Any] = {}
    problems: dict[str, list[str]] = {}
    for edit in next(a for a in active if a.name == name).edits:
        if edit.where == "train":
            continue  # the value is in its place
        host = modules[edit.host]
        try:
            changed |= _fold(edit, host, {**leaves, **changed}, earlier.get(edit.host), structure)
        except (TypeError, ValueError) as error:
            problems.setdefault(str(error), []).append(host.name)
    if problems:
        reason, names = next(iter(problems.items()))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"delta {name!r} cannot be merged at {', '.join(names[:3])}{more}: {reason} Keep it attached, or leave "
            "these modules out with exclude_modules."
        )
    return changed


def _wraps(edit: CallEdit) -> bool:
    """Whether later edits of the same host do not see the host itself."""
    return edit.where not in ("parallel", "train")


def _fold(
    edit: CallEdit, host: ModuleInfo, leaves: Mapping[Path, Any], earlier: str | None, structure: Structure
) -> dict[Path, Any]:
    if not foldable(edit):
        raise ValueError(NO_CHANGE.format(type(edit.layer).__name__))
    if earlier is not None:
        raise ValueError(f"delta {earlier!r}, which was attached before, stands between it and the weights.")
    if host.name in structure.tied:
        raise ValueError("its weights are those of a tied head or another method too, which the delta does not change.")
    new = fold(edit, host, leaves)
    require_steps(host, new, leaves)
    lacking = sorted(new.keys() - host.params.keys())
    if lacking and not hasattr(edit.layer, "after_merge"):
        raise ValueError(f"it would have to go into a {lacking[0]}, and the module has none.")
    boxes = {key: leaves[(*host.path, *(edit.leaf if key in lacking else ()), key)] for key in new}
    return {(*host.path, key): surgery.in_place_of(boxes[key], value) for key, value in new.items()}


def require_steps(host: ModuleInfo, keys: Iterable[str], leaves: Mapping[Path, Any]) -> None:
    """Raises `ValueError` if one of these leaves of a module is of a dtype in which nothing can be added to it."""
    for path in ((*host.path, key) for key in keys):
        if path in leaves and dtypes.is_fixed(leaves[path]):
            raise ValueError(
                f"its {path[-1]} holds {meta.unbox(leaves[path]).dtype}, and an update is added only to floats of 16 "
                "bits and more."
            )


def foldable(edit: CallEdit) -> bool:
    """Whether a layer changes the weights of its host: it has a `fold`, and takes the host's own input."""
    return hasattr(edit.layer, "fold") and edit.span_input in (None, edit.host)


def fold(edit: CallEdit, host: ModuleInfo, leaves: Mapping[Path, Any]) -> dict[str, jax.Array]:
    """What the layer's `fold` returns for its host, also inside a scan, where leaves have more axes than a host sees.

    Args:
      edit: one that is foldable.
      host: its host, as the trace saw it.
      leaves: path to value, those of host and layer among them.
    """
    own_keys = {*host.params, "bias"}  # a bias that it did not have may have been merged into it before
    weights = {key: meta.unbox(leaves[(*host.path, key)]) for key in own_keys if (*host.path, key) in leaves}
    begin = (*host.path, *edit.leaf)
    own = {path[-1]: meta.unbox(leaf) for path, leaf in leaves.items() if path[:-1] == begin}
    run: Callable = lambda weights, own: edit.layer.fold(host, weights, own)  # type: ignore[union-attr]  # noqa: E731
    for axis in scanned_axes(weights, host.params):
        run = jax.vmap(run, axis, axis)
    return run(weights, own)


def scanned_axes(weights: Mapping[str, Any], seen: Mapping[str, jax.ShapeDtypeStruct]) -> list[int]:
    """The axes, outermost last, that a module's leaves have inside `nn.scan` besides those that it sees itself."""
    have = [(list(meta.unbox(weights[key]).shape), list(seen[key].shape)) for key in seen]
    axes: list[int] = []
    while any(len(stored) > len(own) for stored, own in have):
        fitting = [
            axis
            for axis in range(min(len(stored) for stored, _ in have))
            if all(len(stored) - len(own) > 1 or stored[:axis] + stored[axis + 1 :] == own for stored, own in have)
        ]
        axes.insert(0, fitting[0])
        have = [(stored[: fitting[0]] + stored[fitting[0] + 1 :], own) for stored, own in have]
    return axes
