"""Linen modules in `nnx.bridge.ToNNX`: what is in them is recorded and run by the host of linen.

A ToNNX takes its attributes for the variables of its linen module. So the leaves of deltas in it are in nested dicts
among these, `lin.encoder.dense.lora.a`, and for the time of a call they count as parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jdelta.core.edits import Attachment, Edit, WeightEdit
from jdelta.core.host import Trial
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.hosts.linen.instrument import instrument
from jdelta.hosts.linen.trace import recorded
from jdelta.hosts.nnx.creating import is_creating, noted
from jdelta.hosts.nnx.swapping import one_at_a_time
from jdelta.trees import left_out, surgery
from jdelta.trees.surgery import Path
from jdelta.trees.variables import DeltaParam

Bridged = nnx.bridge.ToNNX
_MODULE = "to_nnx__module"  # the attribute that holds the linen module


# --- what is in it


def record(module: nnx.Module, call: Callable, args: tuple, kwargs: dict) -> tuple[Any, Structure]:
    """What a call returns, and the modules that it ran, by their paths in the linen module."""
    linen: Any = vars(module)[_MODULE]
    params = {path: v.get_raw_value() for path, v in _variables(module).items() if isinstance(v, nnx.Param)}
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in params.items()}
    with recorded(type(linen)) as structure_of:
        output = call(*args, **kwargs)
    return output, structure_of(surgery.unflatten(shapes))


def below(path: Path, info: ModuleInfo, caller: Path | None) -> ModuleInfo:
    """A module of the linen module in the ToNNX at a path."""
    outer = caller if info.caller is None else (*path, *info.caller)
    return dataclasses.replace(info, path=(*path, *info.path), caller=outer)


# --- what happens in it


@dataclasses.dataclass(frozen=True, eq=False)
class Inside:
    """What the attachments of a model do in the linen module of a ToNNX.

    Attributes:
      path: of the ToNNX.
      attachments: with paths in the linen module.
      originals: their edits to those of the model's attachments.
    """

    path: Path
    attachments: tuple[Attachment, ...] = ()
    originals: Mapping[Edit, Edit] = dataclasses.field(default_factory=dict)
    _instrumented: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __bool__(self) -> bool:
        return any(a.active or a.after_merge for a in self.attachments)

    def run(self, module: nnx.Module, call: Callable, trial: Trial | None, /, *args: Any, **kwargs: Any) -> Any:
        """The call with the edits.

        Args:
          module: the ToNNX.
          call: of it.
          trial: where to note what ran.
          *args, **kwargs: of the call.
        """
        with one_at_a_time:
            return self._run(module, call, trial, args, kwargs)

    def _run(
        self, module: nnx.Module, call: Callable, trial: Trial | None, args: tuple, kwargs: Mapping[str, Any]
    ) -> Any:
        mine = None if trial is None else self._own_trial(trial)
        gone = frozenset(a.name for a in self.attachments if self._is_left_out(module, a.name))
        held = dict(vars(module))
        given = {name: _as_params(value, gone) for name, value in held.items() if not _is_private(name)}
        try:
            vars(module)[_MODULE] = linen = self._module(held[_MODULE], gone, mine)
            vars(module).update({name: value for name, value in given.items() if value is not None})
            for name in (name for name, value in given.items() if value is None):
                vars(module).pop(name)
            if is_creating():
                made = noted((self.path, ()), lambda key: self._fresh(linen, module, key, args, kwargs))
                for path, leaf in surgery.flatten(made).items():
                    if leaf is not surgery.empty_node:
                        _put(vars(module), path, nnx.Param(leaf))
            return call(*args, **kwargs)
        finally:
            for name in [name for name in vars(module) if not _is_private(name)]:
                if vars(module)[name] is not given.get(name) and name in held:
                    held[name] = _with_leaves_of(vars(module)[name], held[name])
                elif name not in held and name not in given and not is_creating():
                    held[name] = vars(module)[name]  # a collection that the call made
            vars(module).clear()
            vars(module).update(held)
            if mine is not None and trial is not None:
                trial.ran.update(self.originals[edit] for edit in mine.ran)

    def _own_trial(self, trial: Trial) -> Trial:
        begin = surgery.name_of(self.path) + "." if self.path else ""
        return Trial({name.removeprefix(begin): v for name, v in trial.probes.items() if name.startswith(begin)})

    def _module(self, linen: Any, gone: frozenset[str], trial: Trial | None) -> Any:
        if trial is None and self._instrumented.get("of") == (id(linen), gone):
            return self._instrumented["module"]
        attachments = [dataclasses.replace(a, active=a.active and a.name not in gone) for a in self.attachments]
        made = instrument(linen, attachments, trial)
        if trial is None:
            self._instrumented.update(of=(id(linen), gone), module=made, linen=linen)
        return made

    def _is_left_out(self, module: nnx.Module, name: str) -> bool:
        mine = (v for path, v in _variables(module).items() if name in path and isinstance(v, DeltaParam))
        return any(map(left_out.is_marked, mine))

    def _fresh(self, linen: Any, module: nnx.Module, key: jax.Array, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Fresh leaves of the layers that have none yet."""
        params, dropout = jax.random.split(key)
        options = {name: value for name, value in kwargs.items() if name not in ("rngs", "mutable")}
        made = linen.init({"params": params, "dropout": dropout}, *args, **options).get("params", {})
        names, have = {a.name for a in self.attachments}, set(_variables(module))
        new = {p: v for p, v in surgery.flatten(made).items() if names.intersection(p) and p not in have}
        return surgery.unflatten(new)


def inside(path: Path, attachments: Sequence[Attachment], axes: int) -> Inside:
    """What attachments do in the ToNNX at a path.

    Args:
      path: of the ToNNX.
      attachments: of the model.
      axes: how many axes of layers its leaves have besides those that its linen module sees.

    Raises:
      ValueError: the span of an edit leads into it or out of it.
    """
    n, originals, found = len(path), dict[Edit, Edit](), []
    for attachment in attachments:
        edits: list[Edit] = []
        for edit in attachment.edits:
            if edit.host[:n] != path:
                continue
            edits.append(made := _moved(edit, n, axes))
            originals[made] = edit
        leaves = tuple(p[n:] for p in (*attachment.leaves, *attachment.generated) if p[:n] == path)
        frozen = frozenset(p[n:] for p in attachment.frozen if p[:n] == path)
        if edits:  # what the whole model generates is among the leaves here
            rest: dict[str, Any] = {"generator": None, "generated": (), "frozen": frozen, "leaves": leaves}
            found.append(dataclasses.replace(attachment, edits=tuple(edits), **rest))
    return Inside(path, tuple(found), originals)


def _moved(edit: Edit, n: int, axes: int) -> Edit:
    if isinstance(edit, WeightEdit):
        return dataclasses.replace(edit, leaf=edit.leaf[n:], layers=edit.layers[: len(edit.layers) - axes])
    start = edit.span_input
    if start is not None and start[:n] != edit.host[:n]:
        raise ValueError(
            f"the span from {surgery.name_of(start)} to {surgery.name_of(edit.host)} leads into a linen module of "
            "nnx.bridge.ToNNX. Name two modules inside it, or two outside."
        )
    return dataclasses.replace(edit, host=edit.host[n:], span_input=None if start is None else start[n:])


# --- its attributes


def put(module: nnx.Module, path: Path, leaf: DeltaParam) -> None:
    """Adds a leaf of a delta to the attributes of a ToNNX."""
    _put(vars(module), path, leaf)


def take_out(module: nnx.Module, path: Path) -> None:
    """Removes a leaf of a delta, and what then holds nothing."""
    _take_out(vars(module), path)


def deltas(module: nnx.Module) -> list[Path]:
    """The paths of the leaves of deltas among the attributes of a ToNNX."""
    return [path for path, value in _variables(module).items() if isinstance(value, DeltaParam)]


def _is_private(name: str) -> bool:
    return name.startswith(("to_nnx__", "_pytree__"))


def _variables(module: nnx.Module) -> dict[Path, nnx.Variable]:
    """Path to variable of the linen module."""
    found: dict[Path, nnx.Variable] = {}

    def walk(value: Any, path: Path) -> None:
        if isinstance(value, nnx.Variable):
            found[path] = value
        elif isinstance(value, Mapping):
            for key, part in value.items():
                walk(part, (*path, str(key)))

    for name, value in vars(module).items():
        if not _is_private(name):
            walk(value, (name,))
    return found


def _as_params(value: Any, gone: frozenset[str]) -> Any:
    """An attribute with the leaves of deltas as parameters, but for those of some; `None` if that is all."""
    if isinstance(value, DeltaParam):
        return nnx.Param(value.get_raw_value())
    if not isinstance(value, Mapping):
        return value
    parts = {key: _as_params(part, gone) for key, part in value.items() if key not in gone}
    return {key: part for key, part in parts.items() if part is not None} or None


def _with_leaves_of(value: Any, held: Any) -> Any:
    """What a call set in place of an attribute, with the leaves of deltas that were in that."""
    if isinstance(held, DeltaParam):
        return held
    if isinstance(value, Mapping) and isinstance(held, Mapping):
        return {key: _with_leaves_of(part, held.get(key)) for key, part in value.items()}
    return value


def _put(tree: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _take_out(tree: dict[str, Any], path: Path) -> None:
    key, *rest = path
    if rest:
        _take_out(tree[key], tuple(rest))
        if tree[key]:
            return
    del tree[key]
