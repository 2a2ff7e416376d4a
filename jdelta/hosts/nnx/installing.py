"""Puts deltas on an nnx model: the roles of its modules, and what their dropout needs."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
from flax import nnx

from jdelta.core.edits import Attachment, Edit, WeightEdit
from jdelta.core.structure import Structure
from jdelta.hosts.nnx import graph
from jdelta.hosts.nnx.bridge import Bridged
from jdelta.hosts.nnx.recording import Layers, layers_at
from jdelta.hosts.nnx.roles import edits_by_module
from jdelta.hosts.nnx.running import Edited, drops_out
from jdelta.hosts.nnx.swapping import give
from jdelta.trees import surgery
from jdelta.trees.surgery import Path


def put_on(
    model: nnx.Module,
    attachments: Sequence[Attachment],
    structure: Structure | None,
    dropouts: Mapping[Path, graph.Leaves] = MappingProxyType({}),
    apart: bool = False,
) -> None:
    """Gives each module of a model the role that makes it run exactly these.

    Args:
      model: it is changed.
      attachments: active or not.
      structure: the model's; it is not needed if there are no attachments.
      dropouts: path of a delta at a module to what held its leaves before it was detached, with what its dropout needs.
      apart: whether these roles are equal to no others, so that jax traces each module, even those that are alike.
    """
    modules, owners = graph.modules(model), graph.shared_variables(model)
    merged = [path for path, module in modules.items() if any(graph.is_added(module, name) for name in vars(module))]
    bridges = {
        path: len(layers_at(structure, path).axes)
        for path, module in modules.items()
        if structure is not None and isinstance(module, Bridged)
    }
    edits = edits_by_module(attachments, modules, owners, merged, bridges, apart)
    names = {a.name for a in attachments if a.active}
    for path, module in modules.items():
        mine = edits.get(path)
        give(module, Edited(mine) if mine is not None else None)
        for name, holder in list(vars(module).items()):
            if isinstance(holder, graph.Leaves) and not graph.variables(holder) and name not in names:
                graph.delete(module, name)
        for edit in mine.all if mine is not None else ():
            if structure is not None and _name_of(edit) and drops_out(edit):
                name, layers = _name_of(edit), layers_at(structure, path)
                _give_dropout(model, module, (*path, name), layers, dropouts.get((*path, name)))
    share(model, attachments)


def share(model: nnx.Module, attachments: Sequence[Attachment]) -> None:
    """Gives the leaves at a parameter that modules share to all of these."""
    for edit in (edit for a in attachments if a.active for edit in a.weight_edits if not edit.in_call):
        graph.share(model, edit)


def _give_dropout(
    model: nnx.Module, module: nnx.Module, path: Path, layers: Layers, before: graph.Leaves | None
) -> None:
    """Makes what the dropout of a delta needs, if that is not there yet. It is on as the model's own is."""
    holder = graph.holder_of(module, path[-1])
    if "deterministic" in vars(holder):
        return
    earlier = {} if before is None else vars(before)
    mode = _is_deterministic(model, earlier.get("deterministic", False))
    graph.set_data(holder, "deterministic", mode, is_data=False)
    if (stream := earlier.get("rngs")) is None:
        key = jax.random.key(zlib.crc32(surgery.name_of(path).encode()))
        stream = nnx.RngStream(jax.random.split(key, layers.sizes[::-1]) if layers.sizes else key, tag="dropout")
    graph.set_data(holder, "rngs", stream)


def _is_deterministic(model: nnx.Module, otherwise: bool) -> bool:
    """Whether a model is in the mode of `eval`, as a module in it says that has a mode; deltas are asked last."""
    inside = sorted((module for _, module in nnx.iter_modules(model)), key=lambda m: isinstance(m, graph.Leaves))
    modes = [getattr(module, name, None) for module in inside for name in ("deterministic", "use_running_average")]
    return next((mode for mode in modes if isinstance(mode, bool)), otherwise)


def _name_of(edit: Edit) -> str:
    """The name of an edit's delta; nothing, if it belongs to none."""
    return edit.name if isinstance(edit, WeightEdit) else next(iter(edit.leaf), "")
