"""The shardings of deltas' leaves over a mesh, derived from the backbone's: pure functions on trees.

A layer declares which axes of the backbone's weights its own axes follow, in a method

    def sharding_axes(self, host: ModuleInfo, x: Axes, y: Axes) -> dict[str, Axes]:
        return {"a": (*x, None), "b": (None, *y)}

where `x` and `y` are the axes of weights that the features of its input and output have, one for `nn.Dense`. It
returns an entry for each axis of each leaf, named below the layer (`"down.kernel"`); `None` is an axis of the layer's
own. A leaf that is not named is replicated, and so is an axis whose length the mesh does not divide.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta
from jax.sharding import AbstractMesh, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jdelta.core import axes, merging
from jdelta.core.axes import Axes, Axis
from jdelta.core.edits import Attachment, CallEdit
from jdelta.core.structure import Structure
from jdelta.trees import addressing, surgery
from jdelta.trees.surgery import Path, Tree, empty_node

Entry = str | tuple[str, ...] | None  # of a PartitionSpec: the mesh axes over which one axis of a leaf is sharded
Rule = tuple[str, P]


def match_partition_rules(rules: Iterable[Rule], tree: Any, default: P | None = None) -> Any:
    """Returns the `PartitionSpec` of each leaf, by its name: the first rule that matches applies.

        rules = [("query.kernel", P(None, "model")), (r"[r]output\\.dense\\.kernel", P("model", None))]
        specs = jdelta.match_partition_rules(rules, model.params, default=P())

    Args:
      rules: pairs of a pattern, by the naming rules of `jdelta.match`, and a spec.
      tree: parameters or their shapes, or a tree with such leaves, such as a `TrainState`.
      default: the spec of leaves that no rule matches. (Scalars need no rule: theirs is always `P()`.)

    Returns:
      A tree of the same structure, with a spec for each leaf.

    Raises:
      TypeError: a rule is not a pair of a pattern and a `PartitionSpec`.
      ValueError: no rule matches a leaf, a spec has more entries than the leaf has axes, or a regex is invalid.
    """
    if isinstance(rules, str | bytes) or not isinstance(rules, Iterable):
        raise TypeError(f"match_partition_rules: expected a list of pairs (pattern, PartitionSpec), got {rules!r}.")
    if default is not None and not isinstance(default, P):
        raise TypeError(f"match_partition_rules: default is a PartitionSpec, got {default!r}.")
    rules = [_checked_rule(rule) for rule in rules]

    def spec(path: Any, leaf: Any) -> P:
        name, ndim = jax.tree_util.keystr(path, simple=True, separator="."), np.ndim(meta.unbox(leaf))
        if not ndim:
            return P()
        pattern, found = next(((p, s) for p, s in rules if addressing.matches(name, p)), ("default", default))
        if found is None:
            raise ValueError(f"match_partition_rules: no rule matches {name!r}. Add one, or give a default=P().")
        if len(found) > ndim:
            raise ValueError(f"match_partition_rules: {pattern!r} gives {found} to {name!r}, which has {ndim} axes.")
        return found

    return jax.tree_util.tree_map_with_path(spec, tree, is_leaf=_is_box)


def partition_specs(
    specs: Tree, params: Tree, attachments: Sequence[Attachment], structure: Structure, mesh: Mesh | None = None
) -> Tree:
    """The `PartitionSpec`s of a grafted tree, from those of the backbone's leaves.

    Args:
      specs: what `DeltaModel.partition_specs` takes.
      params: the grafted tree; shapes suffice.
      attachments: of the model, which that tree is for.
      structure: the backbone's.
      mesh: to check the specs against; where they bring their own, that is taken.

    Raises:
      TypeError, ValueError: as `DeltaModel.partition_specs`.
    """
    return _worked_out(specs, params, attachments, structure, mesh)[0]


def shardings(
    specs: Tree, params: Tree, attachments: Sequence[Attachment], structure: Structure, mesh: Mesh | None = None
) -> Tree:
    """`partition_specs` as `NamedSharding`s; those that were given for the backbone's leaves are in it as they were.

    Raises:
      TypeError, ValueError: as `DeltaModel.shardings`.
    """
    tree, given, mesh = _worked_out(specs, params, attachments, structure, mesh)
    if mesh is None:
        raise ValueError("shardings: PartitionSpecs are on no mesh. Pass one: mesh=….")

    def on_mesh(path: Path, spec: Any) -> Any:
        held = _sharding(given.get(path))
        return held if isinstance(held, NamedSharding) else NamedSharding(mesh, spec)

    leaves = surgery.flatten(tree)
    split = {path: spec if spec is empty_node else on_mesh(path, spec) for path, spec in leaves.items()}
    return surgery.unflatten(split, like=tree)


def _worked_out(
    specs: Tree, params: Tree, attachments: Sequence[Attachment], structure: Structure, mesh: Any
) -> tuple[Tree, dict[Path, Any], Any]:
    """The specs of a grafted tree, what was given for each of the backbone's leaves, and the mesh, if there is one."""
    leaves = surgery.flatten(params)
    start, deltas = surgery.root(params), {path for a in attachments for path in a.leaves}
    backbone = {path for path in leaves if path[: len(start)] != start or path[len(start) :] not in deltas}
    given = _of_backbone(specs, leaves, backbone)
    mesh = _mesh_of(given, mesh)
    sizes = dict(mesh.shape) if mesh is not None else None
    own = {path: _spec(held, path) for path, held in given.items()}
    checked = {path: _entries(path, spec, leaves[path], sizes) for path, spec in own.items()}
    shapes = {path: _shape(leaf) for path, leaf in leaves.items()}
    split = _Split(_below(start, checked), _below(start, shapes), structure, sizes)
    derived = {path: P() for path in deltas if (*start, *path) in leaves}
    for edit in (edit for a in attachments if a.active for edit in a.edits):
        derived |= split.specs_of(edit)
    whole = leaves | own | {(*start, *path): spec for path, spec in derived.items()}  # what is left is empty nodes
    return surgery.unflatten(whole, like=params), given, mesh


def state_shardings(state: Any, shardings: Tree) -> Any:
    """Returns the sharding of each leaf of a training state, from those of the parameters.

        state = jax.eval_shape(lambda: TrainState.create(apply_fn=model.__call__, params=params, tx=tx))
        shardings = jdelta.state_shardings(state, delta.shardings(specs, mesh))

    Args:
      state: a tree with leaves under the names of parameters: a `TrainState` or an optimizer's state; shapes suffice.
      shardings: a tree of the parameters with `NamedSharding`s or `PartitionSpec`s.

    Returns:
      A tree of the structure of `state`. A leaf whose path ends with that of a parameter, such as a moment of Adam, is
      sharded like it, if its axes allow that; all others are replicated.

    Raises:
      ValueError: `shardings` is empty.
    """
    split = {path: leaf for path, leaf in surgery.flatten(shardings).items() if leaf is not empty_node}
    if not split:
        raise ValueError("state_shardings: the tree of shardings holds nothing.")
    first = next(iter(split.values()))
    everywhere = NamedSharding(first.mesh, P()) if isinstance(first, NamedSharding) else P()

    def like(keys: Any, leaf: Any) -> Any:
        path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        own = next((split[path[i:]] for i in range(len(path)) if path[i:] in split), everywhere)
        return own if _fits(own, _shape(leaf)) else everywhere

    return jax.tree_util.tree_map_with_path(like, state, is_leaf=_is_box)


def _fits(held: Any, shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape can be sharded so."""
    spec = held.spec if isinstance(held, NamedSharding) else held
    sizes = held.mesh.shape if isinstance(held, NamedSharding) else {}
    parts = [_parts(entry, sizes) if sizes else 1 for entry in spec]
    return len(spec) <= len(shape) and not any(size % n for size, n in zip(shape, parts, strict=False))


# --- what the user gave


def _of_backbone(specs: Tree, leaves: Mapping[Path, Any], backbone: set[Path]) -> dict[Path, Any]:
    """What was given for each of the backbone's leaves, after checking that these are all and of one kind."""
    if not isinstance(specs, Mapping):
        raise TypeError(f"partition_specs: expected a tree of specs like the backbone's, got {type(specs).__name__}.")
    flat = {path: leaf for path, leaf in surgery.flatten(specs).items() if leaf is not empty_node}
    wanted = {path for path in backbone if leaves[path] is not empty_node}
    if lacking := wanted - flat.keys():
        path = min(lacking)
        raise ValueError(
            f"partition_specs: {len(lacking)} of the backbone's {len(wanted)} leaves have no spec, first "
            f"{surgery.name_of(path)!r} of shape {_shape(leaves[path])}. Give P() to a leaf that is to be replicated."
        )
    if surplus := flat.keys() - leaves.keys():
        raise ValueError(
            f"partition_specs: {len(surplus)} specs are for leaves that the model lacks, first "
            f"{surgery.name_of(min(surplus))!r}."
        )
    given = {path: flat[path] for path in leaves if path in wanted}
    first: tuple[str, Path] | None = None
    for path, leaf in given.items():
        kind = _kind(leaf, path)
        first = first or ((kind, path) if kind else None)
        if kind and first and kind != first[0]:
            raise TypeError(
                f"partition_specs: {surgery.name_of(first[1])!r} is given as {first[0]} and {surgery.name_of(path)!r} "
                f"as {kind}. Give all in one way."
            )
    return given


def _kind(leaf: Any, path: Path) -> str | None:
    """What a leaf is given as; `None` stands for `P()` among specs and shardings alike."""
    if leaf is None:
        return None
    for kind in (P, NamedSharding):
        if isinstance(leaf, kind):
            return f"a {kind.__name__}" if kind is NamedSharding else "a PartitionSpec"
    if _is_box(leaf) or hasattr(leaf, "sharding") or isinstance(leaf, np.ndarray):
        return "an array"
    raise TypeError(
        f"partition_specs: {surgery.name_of(path)!r} is given as {leaf!r}; expected a PartitionSpec, a NamedSharding, "
        "an array that has one, or nn.Partitioned metadata."
    )


def _sharding(leaf: Any) -> Any:
    return leaf if _is_box(leaf) else getattr(leaf, "sharding", leaf)


def _spec(leaf: Any, path: Path) -> P:
    if _is_box(leaf):
        return nn.get_partition_spec(leaf)
    held = _sharding(leaf)
    if isinstance(held, (NamedSharding, P)):
        return held.spec if isinstance(held, NamedSharding) else held
    if held is None or isinstance(held, (SingleDeviceSharding, np.ndarray)):
        return P()
    raise TypeError(
        f"partition_specs: {surgery.name_of(path)!r} has a {type(held).__name__}, which names no mesh axes; place it "
        "with a NamedSharding."
    )


def _mesh_of(given: Mapping[Path, Any], mesh: Any) -> Any:
    """The one mesh of everything; `None` if there is none."""
    for path, leaf in given.items():
        held = _sharding(leaf)
        if not isinstance(held, NamedSharding):
            continue
        if mesh is not None and held.mesh != mesh:
            raise ValueError(
                f"partition_specs: {surgery.name_of(path)!r} is on another mesh, {_described(held.mesh)}, than "
                f"{_described(mesh)}. Put all leaves on one."
            )
        mesh = held.mesh
    if mesh is not None and not isinstance(mesh, (Mesh, AbstractMesh)):
        raise TypeError(f"mesh is a jax.sharding.Mesh, got {mesh!r}.")
    return mesh


def _entries(path: Path, spec: P, leaf: Any, sizes: Mapping[str, int] | None) -> tuple[Entry, ...]:
    """One entry for each axis of a leaf of the backbone's, after checking that they fit it and the mesh."""
    shape, where = _shape(leaf), f"partition_specs: {surgery.name_of(path)!r} of shape {_shape(leaf)}"
    if len(spec) > len(shape):
        raise ValueError(f"{where} has {len(shape)} axes, and its spec {spec} {len(spec)} entries.")
    entries = (*spec, *[None] * (len(shape) - len(spec)))
    for size, entry in zip(shape, entries, strict=True) if sizes is not None else ():
        for name in _names(entry):
            if sizes is not None and name not in sizes:
                raise ValueError(
                    f"{where} has the spec {spec}, and the mesh no axis {name!r}: it has {', '.join(sizes)}. Logical "
                    "names become those of a mesh by nn.logical_to_mesh(specs, rules)."
                )
        if sizes is not None and size % _parts(entry, sizes):
            raise ValueError(
                f"{where} has the spec {spec}, but {size} is not divided by the {_parts(entry, sizes)} devices along "
                f"{' × '.join(_names(entry))}."
            )
    return entries


# --- what the deltas get


@dataclasses.dataclass(frozen=True)
class _Split:
    """How the backbone's leaves are split.

    Attributes:
      entries: path to the entries of the spec, one for each axis.
      shapes: path to shape of each leaf, those of the deltas too.
      structure: the backbone's.
      sizes: of the mesh's axes, if there is a mesh.
    """

    entries: Mapping[Path, tuple[Entry, ...]]
    shapes: Mapping[Path, tuple[int, ...]]
    structure: Structure
    sizes: Mapping[str, int] | None

    def specs_of(self, edit: CallEdit) -> dict[Path, P]:
        """The specs of the leaves of one edit's layer, as far as it says what they follow."""
        found: dict[Path, P] = {}
        followed = self._followed(edit)
        leaf = next((axis.leaf for own in followed.values() for axis in own if axis), self._leaf_in(edit.host))
        for name, own in followed.items():
            path = (*edit.host, *edit.leaf, *name.split("."))
            if path in self.shapes:  # not, if it is made from shared leaves
                found[path] = self._allowed(self.shapes[path], self._with_layers(own, path, leaf))
        return found

    def _followed(self, edit: CallEdit) -> Mapping[str, Axes]:
        if not hasattr(edit.layer, "sharding_axes"):
            return {}
        host, start = (self.structure[surgery.name_of(path)] for path in (edit.host, edit.span_input or edit.host))
        x = axes.of_output(host, self.structure) if edit.where == "after" else axes.of_input(start, self.structure)
        y = axes.of_input(host, self.structure) if edit.where == "before" else axes.of_output(host, self.structure)
        return edit.layer.sharding_axes(host, x, y)  # type: ignore[union-attr]

    def _with_layers(self, followed: Axes, path: Path, leaf: Path | None) -> list[_Followed]:
        """What each axis of a delta's leaf follows; those of the layers in `nn.scan` are as in `leaf`."""
        found = [self._at(axis) for axis in followed]
        more = len(self.shapes[path]) - len(found)
        if more and leaf is not None:
            _, inserted, layers = self._stored(leaf)
            if more == len(inserted):
                for place, layer in zip(inserted, layers, strict=True):
                    found.insert(place, (self.entries[leaf][layer], self.shapes[leaf][layer]))
        return found

    def _at(self, axis: Axis | None) -> _Followed:
        if axis is None:
            return None, 1
        place = self._stored(axis.leaf)[0][axis.number]
        return self.entries[axis.leaf][place], self.shapes[axis.leaf][place]

    def _stored(self, leaf: Path) -> tuple[list[int], list[int], list[int]]:
        """How a leaf inside `nn.scan` is stored: where the axes are that its module sees; where to insert those of the
        layers, one after the other; and where these then are."""
        info = self.structure[surgery.name_of(leaf[:-1])]
        weights = {key: jax.ShapeDtypeStruct(self.shapes[(*info.path, key)], np.float32) for key in info.params}
        inserted = merging.scanned_axes(weights, info.params)
        places = list(range(len(self.shapes[leaf])))
        layers: list[int] = []
        for axis in reversed(inserted):
            layers.insert(0, places.pop(axis))
        return places, inserted, layers

    def _leaf_in(self, host: Path) -> Path | None:
        """A leaf of a module, or of the first in it that has one."""
        return next(((*info.path, key) for info in self.structure.below(host) for key in info.params), None)

    def _allowed(self, shape: Sequence[int], followed: Sequence[_Followed]) -> P:
        """The spec, with what fits: where sizes agree or are known to be divided, and no mesh axis twice."""
        used: set[str] = set()
        kept: list[Entry] = []
        for size, (entry, of) in zip(shape, followed, strict=True) if len(shape) == len(followed) else ():
            divided = size == of if self.sizes is None else size % _parts(entry, self.sizes) == 0
            kept.append(entry if divided and _names(entry) and used.isdisjoint(_names(entry)) else None)
            used.update(_names(kept[-1]))
        return P(*kept) if any(kept) else P()


_Followed = tuple[Entry, int]  # how an axis that is followed is split, and its size


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry) if isinstance(entry, tuple) else ()


def _parts(entry: Entry, sizes: Mapping[str, int]) -> int:
    """Over how many devices an entry splits an axis."""
    return math.prod(sizes[name] for name in _names(entry))


def _below(start: Path, leaves: Mapping[Path, Any]) -> dict[Path, Any]:
    """The leaves below a path, without it."""
    return {path[len(start) :]: leaf for path, leaf in leaves.items() if path[: len(start)] == start}


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(np.shape(meta.unbox(leaf))) if leaf is not empty_node else ()


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, meta.AxisMetadata)


def _checked_rule(rule: Any) -> Rule:
    if not (isinstance(rule, (tuple, list)) and len(rule) == 2 and isinstance(rule[0], str) and isinstance(rule[1], P)):
        raise TypeError(f"match_partition_rules: a rule is a pair (pattern, PartitionSpec), got {rule!r}.")
    return rule[0], rule[1]


def _described(mesh: Any) -> str:
    return " × ".join(f"{name} {size}" for name, size in dict(mesh.shape).items())
