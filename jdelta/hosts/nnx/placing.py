"""Where the leaves of deltas are on a mesh, and what their variables say of it: both follow the backbone's."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jdelta.core.backbone_specs import BackboneSpecs, Entry
from jdelta.core.edits import Attachment, Edit
from jdelta.core.structure import Structure
from jdelta.hosts.nnx import graph
from jdelta.trees.surgery import Path

_ANNOTATIONS = ("mesh", "sharding_rules")  # metadata that say what the names in `out_sharding` mean

Variables = Mapping[Path, nnx.Param]
Entries = dict[Path, tuple[Entry, ...]]


def place(model: nnx.Module, attachments: Sequence[Attachment], structure: Structure, new: Collection[Path]) -> None:
    """Gives new leaves of deltas the metadata of sharding that follow from the backbone's, and places them likewise.

    Leaves are placed where the backbone's arrays are on one mesh, and where nobody placed them before.

    Args:
      model: the model, with the leaves.
      attachments: what it carries.
      structure: the backbone's.
      new: the paths of the leaves.
    """
    held = graph.variables(model)
    edits = [edit for a in attachments for edit in a.edits]  # what is put in comes before its delta is active
    backbone = {path: held[path] for path in structure.leaves if path in held}
    annotated = {path: _annotation(variable) for path, variable in backbone.items()}
    if any(annotated.values()):
        for edit, path, spec in _followed(edits, annotated, held, structure, None):
            if path in new:
                held[path].set_metadata(out_sharding=tuple(spec), **_meaning(edit, backbone))
    placed = {path: _placed(variable.get_raw_value()) for path, variable in backbone.items()}
    meshes = {sharding.mesh for sharding in placed.values() if sharding is not None}
    if len(meshes) != 1:
        return
    mesh: Any = meshes.pop()
    entries = {path: tuple(sharding.spec) if sharding else () for path, sharding in placed.items()}
    specs = {path: spec for _, path, spec in _followed(edits, entries, held, structure, dict(mesh.shape))}
    for path in new:
        if not _is_somewhere(value := held[path].get_raw_value()):
            held[path].set_raw_value(_at(value, NamedSharding(mesh, specs.get(path, P()))))


def metadata_of_new(model: nnx.Module) -> dict[str, Any]:
    """Metadata of new variables that say whether nnx places what it makes of them, as those of the backbone's do."""
    first = next(filter(_annotation, graph.variables(model).values()), None)
    return {} if first is None else {"eager_sharding": first.eager_sharding}


def as_before(value: Any, before: Any) -> Any:
    """A value that is nowhere in particular, where the one is that it replaces, if that is on a mesh."""
    sharding = _placed(before)
    if sharding is None or getattr(value, "committed", False) or np.shape(value) != np.shape(before):
        return value
    return _at(value, sharding)


def _followed(
    edits: Sequence[Edit],
    entries: Entries,
    held: Variables,
    structure: Structure,
    sizes: Mapping[str, int] | None,
) -> Iterator[tuple[Edit, Path, P]]:
    """The leaves of deltas that follow leaves of the backbone's which are sharded, with their specs."""
    shapes = {path: tuple(variable.get_raw_value().shape) for path, variable in held.items()}
    whole = {path: (*own, *[None] * (len(shapes[path]) - len(own))) for path, own in entries.items()}
    specs = BackboneSpecs(whole, shapes, structure, sizes)
    for edit in edits:
        for path, spec in specs.specs_of(edit).items():
            if any(spec):
                yield edit, path, spec


def _annotation(variable: nnx.Param) -> tuple[Entry, ...]:
    """What the metadata of a variable say of its axes; nothing, where there are none."""
    names = variable.get_metadata().get("out_sharding")
    shape = variable.get_raw_value().shape
    return tuple(names) if isinstance(names, (tuple, list, P)) and len(names) <= len(shape) else ()


def _meaning(edit: Edit, backbone: Variables) -> dict[str, Any]:
    """Of the first leaf with such metadata that the host of an edit has, or a module in it."""
    n = len(edit.host)
    inside = (v.get_metadata() for path, v in backbone.items() if path[:n] == edit.host and _annotation(v))
    return {key: value for key, value in next(inside, {}).items() if key in _ANNOTATIONS and value}


def _placed(value: Any) -> NamedSharding | None:
    sharding = getattr(value, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


def _is_somewhere(value: Any) -> bool:
    """Whether somebody chose where a value is: what is made under `jax.set_mesh` is replicated if nobody did."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return value.sharding is not None
    return isinstance(value, jax.Array) and bool(value.committed) and not value.sharding.is_fully_replicated


def _at(value: Any, sharding: NamedSharding) -> Any:
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    return jax.device_put(value, sharding)
