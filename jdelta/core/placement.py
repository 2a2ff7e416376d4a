"""Which edits a method makes at the modules that patterns mean."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flax.core import meta

from jdelta.core.edits import Attachment, Edit, WeightEdit
from jdelta.core.linear import linear_map, require_features, runs_alone
from jdelta.core.linear_maps import StoredMap, scanned_axes
from jdelta.core.method import Find, Method, Site
from jdelta.core.parameters import find_parameters
from jdelta.core.rules import FeatureRule
from jdelta.core.state import DeltaState, carried
from jdelta.core.structure import ModuleInfo, ParameterInfo, Structure
from jdelta.core.warn import warn
from jdelta.trees import addressing, surgery

COMMON = {field.name for field in dataclasses.fields(Method)}  # the arguments that every method has


def edits_at(state: DeltaState, patterns: Sequence[str], find: Find | None = None) -> list[Edit]:
    """What the method does at the modules that the patterns mean, but for what `exclude_modules` takes out.

    Args:
      state: the delta.
      patterns: of the modules.
      find: what the patterns mean, if they are no patterns of the model's own names.

    Raises:
      TypeError, ValueError: a pattern means nothing, or modules that cannot have the delta, or get nothing from it.
    """
    made = edits_of(state.method, state.label, state.structure, carried(state), patterns, find)
    return [named(edit, state.name, state.structure) for edit in made]


def edits_of(
    method: Method,
    label: str,
    structure: Structure,
    attachments: Sequence[Attachment],
    patterns: Sequence[str],
    find: Find | None = None,
) -> list[Edit]:
    """As `edits_at`, of a method that is not on a model; the edits know no name of a delta.

    Args:
      method: what it is.
      label: what it is called, for messages.
      structure: of the model.
      attachments: what the model carries already.
      patterns, find: as those of `edits_at`.
    """
    asked: list[ModuleInfo] = []
    exclude = method.exclude_modules or ()

    def noted(patterns: Sequence[str]) -> list[ModuleInfo]:
        found = structure.find(patterns, exclude) if find is None else find(patterns)
        asked.extend(found)
        return found

    site = Site(structure, noted, attachments)
    wanted = [*method.place(site, patterns), *_of_parameters(method, label, structure)]
    edits = without_excluded(method, structure, wanted)
    means = f"{label}: none of the modules that {list(patterns)} mean gets a change from it"
    if patterns and not wanted:
        raise ValueError(f"{means}.")
    if patterns and not any(not edit.auxiliary for edit in edits):
        raise ValueError(f"{means}: exclude_modules={list(exclude)} leaves nothing.")
    if find is None:
        _require_each_changed(label, asked, wanted)
    for field in method.pattern_fields if edits else ():
        _check_patterns(method, label, field, edits)
    return edits


def _of_parameters(method: Method, label: str, structure: Structure) -> Iterator[Edit]:
    """What the method does at the parameters that `modified_parameters` names."""
    names, exclude = method.modified_parameters or (), method.exclude_modules or ()
    leaves = structure.leaves
    for path in find_parameters(structure, names, exclude) if names else ():
        leaf = meta.unbox(leaves[path])
        parameter = ParameterInfo(path, leaf.shape, leaf.dtype)
        try:
            yield from method.parameter_edits(parameter, structure)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{label} at {parameter.name}: {error}") from error


def named(edit: Edit, name: str, structure: Structure) -> Edit:
    """The edit with its own leaves below the delta's name; of a leaf, with how it is used."""
    if isinstance(edit, WeightEdit):
        found = edit if edit.linear is not None else resolved(edit, structure)
        return dataclasses.replace(found, name=name, layers=_layers(found, structure))
    return edit if edit.where == "train" else dataclasses.replace(edit, leaf=(name, *edit.leaf))


def resolved(edit: WeightEdit, structure: Structure) -> WeightEdit:
    """The edit of a leaf with how it is used: in the calls of a linear module alone, or in ways that nobody knows.

    Raises:
      ValueError: there is no such leaf.
    """
    leaves = structure.leaves
    if edit.leaf not in leaves:
        raise ValueError(f"{surgery.name_of(edit.leaf)!r} is no parameter of this model.")
    owner, key = structure.modules.get(surgery.name_of(edit.host)), edit.leaf[-1]
    shape = meta.unbox(leaves[edit.leaf]).shape
    if owner is not None and key in owner.params:
        shape = owner.params[key].shape
    in_call, linear = False, None
    if owner is not None and not owner.closed:
        with contextlib.suppress(TypeError):
            found = linear_map(owner)
            linear = found if found.weights == key else None
            in_call = linear is not None and owner.name not in structure.tied
    if isinstance(edit.rule, FeatureRule):
        require_features(edit.rule, linear or StoredMap(key), shape)
    alone = in_call and owner is not None and runs_alone(owner)
    return dataclasses.replace(edit, linear=linear or StoredMap(key), shape=shape, in_call=in_call, alone=alone)


def _layers(edit: WeightEdit, structure: Structure) -> tuple[int, ...]:
    """The axes that a leaf has besides those that its module sees. All of the module's leaves together tell them."""
    owner = structure.modules.get(surgery.name_of(edit.host))
    if owner is None or edit.leaf[-1] not in owner.params:
        return ()
    stored = structure.leaves
    shapes = [meta.unbox(stored[(*owner.path, key)]).shape for key in owner.params]
    return tuple(scanned_axes(shapes, [leaf.shape for leaf in owner.params.values()]))


def without_excluded(method: Method, structure: Structure, edits: Iterable[Edit]) -> list[Edit]:
    """Those whose module is neither excluded nor below one that is. What only helps others stays."""
    exclude = method.exclude_modules or ()
    by_leaf = bool(method.modified_parameters)  # leaves may be excluded too
    leaves = [surgery.name_of(path) for path in structure.leaves if by_leaf]
    of_modules = [p for p in exclude if not any(addressing.matches_at_or_above(name, p) for name in leaves)]
    structure.find((), of_modules)  # raises if a pattern means nothing

    def is_excluded(name: str) -> bool:
        return any(addressing.matches_at_or_above(name, pattern) for pattern in exclude)

    return [edit for edit in edits if edit.auxiliary or not is_excluded(_changed_name(edit))]


def warn_of_twin(state: DeltaState, edits: Sequence[Edit]) -> None:
    """Warns if an attached delta is the same up to its values, however the patterns of its modules are written."""

    def what(config: Method, edits: Sequence[Edit]) -> Any:
        arguments = config.to_dict()
        own = {key: arguments[key] for key in arguments if key not in COMMON}
        return own, {edit.leaf if isinstance(edit, WeightEdit) else edit.host for edit in edits}

    others = [a for a in state.host.attachments if a.active and a.config is not None]
    twins = [a.name for a in others if edits and what(a.config, a.edits) == what(state.method, edits)]
    if twins:
        warn(
            f"{state.label}: delta {twins[0]!r} of the same arguments is attached to the same modules. The "
            f"new one, {state.name!r}, adds to what it does, and by default only {state.name!r} trains. If the same "
            "lines ran twice, call remove() or detach() on the first before they run again, or load the model "
            "afresh. If both are meant, give the new one a name: name=…."
        )


def _require_each_changed(label: str, asked: Sequence[ModuleInfo], edits: Sequence[Edit]) -> None:
    """Raises `ValueError` if the method does nothing at or below a module that was named."""
    changed = {
        path for edit in edits if not edit.auxiliary for path in (edit.host, edit.span_input) if path is not None
    }
    around = {path[:i] for path in changed for i in range(len(path) + 1)}
    if odd := list({info.path: info for info in asked if info.path not in around}.values()):
        names = ", ".join(f"{info.name} ({info.type.__name__})" for info in odd[:3])
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ValueError(
            f"{label} has nothing to change at {names}{more}. Leave them out of modified_modules, or "
            "name them in exclude_modules."
        )


def _check_patterns(method: Method, label: str, field: str, edits: Sequence[Edit]) -> None:
    """Raises `ValueError` if a pattern of modified modules counts for none of them."""
    left = list(dict.fromkeys(_changed_name(edit) for edit in edits if not edit.auxiliary))
    names = left
    patterns = getattr(method, field) or ()
    for pattern in patterns:
        if not any(addressing.matches(name, pattern) for name in names):
            near = addressing.closest(names, pattern)
            hint = f" Closest: {', '.join(near)}." if near else ""
            raise ValueError(
                f"{label}: {field} has {pattern!r}, which means none of the {len(names)} modules "
                f"that the delta changes.{hint}"
            )
        rest = [name for name in left if not addressing.matches(name, pattern)]
        if rest == left and isinstance(patterns, Mapping):
            raise ValueError(
                f"{label}: {field} has {pattern!r}, and for all that it means an earlier pattern "
                "counts. Put it before that one."
            )
        left = rest


def _changed_name(edit: Edit) -> str:
    """The name of the module that an edit changes: where its leaf trains, or its host."""
    if isinstance(edit, WeightEdit):
        return surgery.name_of(edit.host if edit.by_module else edit.leaf)
    return surgery.name_of((*edit.host, *edit.leaf)[:-1] if edit.where == "train" else edit.host)
