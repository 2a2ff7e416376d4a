"""The shardings of deltas' leaves over a mesh, derived from the backbone's: see `jdelta.core.backbone_specs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jdelta.core.backbone_specs import BackboneSpecs, Entry, names_of, parts_of
from jdelta.core.state import DeltaState
from jdelta.scale.specs import in_boxes, is_box, shape_of
from jdelta.trees import states, surgery
from jdelta.trees.surgery import Path, Tree, empty_node


def partition_specs(state: DeltaState, specs: Tree, mesh: Mesh | None = None) -> Tree:
    """Returns the `PartitionSpec` of every leaf, also of the deltas', from those of the backbone's.

        specs = jdelta.match_partition_rules(rules, params, default=P())  # or nn.get_partition_spec(…), …
        specs = delta.partition_specs(specs)

    A delta's leaf follows the weights of its host: LoRA's `a` the axis of their input and `b` that of their output,
    adapters and biases the axis of the host's output, and all of them the layer axis in `nn.scan`. Axes of its own,
    such as the rank and the width in the middle, are replicated.

    Args:
      specs: a tree of the backbone's parameters, or of the grafted ones, of `PartitionSpec`s (which may have fewer
        entries than the leaf has axes; `None` is `P()`), of `NamedSharding`s, of placed arrays, or of boxes of
        `nn.Partitioned`. Entries for the deltas' own leaves are ignored. An `nnx.State` may be that of
        `nnx.get_partition_spec`, or of arrays or shapes, which are sharded as they are placed or as the metadata of
        their variables says; its other variables, such as statistics, stay in it.
      mesh: the mesh. With it, the specs are checked, and a delta also follows where sizes differ and the mesh divides
        both, such as a prefix's heads. `NamedSharding`s have it already.

    Returns:
      A tree with the structure of the grafted parameters and a `PartitionSpec` for each leaf; an `nnx.State` with the
      specs in its variables, if `specs` is one. `jdelta.partition`, `jdelta.prune` and `delta.own` take it as they take
      parameters.

    Raises:
      TypeError: an entry is not a spec, or specs of two types are mixed.
      ValueError: a leaf of the backbone has no spec, or one that does not fit its shape or the mesh, or there are
        several meshes. The message names the leaf.
    """
    return _derived_specs(specs, state, mesh)[0]


def shardings(state: DeltaState, specs: Tree, mesh: Mesh | None = None) -> Tree:
    """Returns `partition_specs` as `NamedSharding`s, for `jax.jit` and `jax.device_put`.

        shardings = delta.shardings(specs, mesh)
        delta_params = jax.jit(delta.init, out_shardings=delta.own(shardings))(jax.random.key(0))
        step = jax.jit(step, in_shardings=(shardings, batch_sharding))

    Args:
      specs: as in `partition_specs`.
      mesh: the mesh, unless `specs` have one.

    Returns:
      A tree with the structure of the grafted parameters. It holds given `NamedSharding`s as they are.

    Raises:
      TypeError, ValueError: as `partition_specs`; also if there is no mesh.
    """
    tree, given, mesh = _derived_specs(specs, state, mesh)
    if mesh is None:
        raise ValueError("shardings: PartitionSpecs are on no mesh. Pass one: mesh=….")

    def on_mesh(path: Path, spec: Any) -> Any:
        held = _sharding(given.get(path))
        return held if isinstance(held, NamedSharding) else NamedSharding(mesh, spec)

    leaves = surgery.flatten(tree)
    placed = {path: spec if spec is empty_node else on_mesh(path, spec) for path, spec in leaves.items()}
    return surgery.unflatten(placed, like=tree)


def _derived_specs(specs: Tree, state: DeltaState, mesh: Any) -> tuple[Tree, dict[Path, Any], Any]:
    """The specs of a grafted tree, what was given for each of the backbone's leaves, and the mesh, if there is one."""
    params, attachments, structure = state.tree(None), state.host.attachments, state.structure
    leaves = surgery.flatten(params)
    start, deltas = surgery.root(params), {path for a in attachments for path in a.leaves}
    backbone = {path for path in leaves if path[: len(start)] != start or path[len(start) :] not in deltas}
    given, others = _of_backbone(specs, leaves, backbone)
    mesh = _mesh_of(given, mesh)
    sizes = dict(mesh.shape) if mesh is not None else None
    own = {path: _spec(held, path) for path, held in given.items()}
    checked = {path: _entries(path, spec, leaves[path], sizes) for path, spec in own.items()}
    shapes = {path: shape_of(leaf) for path, leaf in leaves.items()}
    backbone_specs = BackboneSpecs(_below(start, checked), _below(start, shapes), structure, sizes)
    derived = {path: P() for path in deltas if (*start, *path) in leaves}
    for edit in (edit for a in attachments if a.active for edit in a.edits):
        derived |= backbone_specs.specs_of(edit)
    whole = leaves | own | {(*start, *path): spec for path, spec in derived.items()}  # what is left is empty nodes
    whole |= {path: _spec(held, path) for path, held in others.items()}
    like = [specs] if states.is_state(specs) else [params]
    if any(states.is_variable(leaf) for _, leaf in states.walk(specs)):
        like = [state.host.held_tree(), *like]  # the deltas' leaves in the variables in which the module has them
    return states.unflatten(whole, like), given | others, mesh


# --- what the user gave


def _of_backbone(
    specs: Tree, leaves: Mapping[Path, Any], backbone: set[Path]
) -> tuple[dict[Path, Any], dict[Path, Any]]:
    """What was given for each of the backbone's leaves, after checking that these are all and of one kind.

    And what was given for the variables of a state that hold no parameters.
    """
    if not isinstance(specs, Mapping):
        raise TypeError(f"partition_specs: expected a tree of specs like the backbone's, got {type(specs).__name__}.")
    boxed = in_boxes(specs) if states.is_state(specs) else specs
    everything = {path: leaf for path, leaf in surgery.flatten(boxed).items() if leaf is not empty_node}
    flat = surgery.parameters_of(specs) if states.is_state(specs) else everything
    flat, others = ({p: v for p, v in everything.items() if (p in flat) == own} for own in (True, False))
    wanted = {path for path in backbone if leaves[path] is not empty_node}
    if lacking := wanted - flat.keys():
        path = min(lacking)
        raise ValueError(
            f"partition_specs: {len(lacking)} of the backbone's {len(wanted)} leaves have no spec, first "
            f"{surgery.name_of(path)!r} of shape {shape_of(leaves[path])}. Give P() to a leaf that is to be replicated."
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
    return given, others


def _kind(leaf: Any, path: Path) -> str | None:
    """What a leaf is given as; `None` stands for `P()` among specs and shardings alike."""
    if leaf is None:
        return None
    for kind in (P, NamedSharding):
        if isinstance(leaf, kind):
            return f"a {kind.__name__}" if kind is NamedSharding else "a PartitionSpec"
    if is_box(leaf) or hasattr(leaf, "sharding") or isinstance(leaf, np.ndarray):
        return "an array"
    raise TypeError(
        f"partition_specs: {surgery.name_of(path)!r} is given as {leaf!r}; expected a PartitionSpec, a NamedSharding, "
        "an array that has one, or nn.Partitioned metadata."
    )


def _sharding(leaf: Any) -> Any:
    return leaf if is_box(leaf) else getattr(leaf, "sharding", leaf)


def _spec(leaf: Any, path: Path) -> P:
    if is_box(leaf):
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
    shape, where = shape_of(leaf), f"partition_specs: {surgery.name_of(path)!r} of shape {shape_of(leaf)}"
    if len(spec) > len(shape):
        raise ValueError(f"{where} has {len(shape)} axes, and its spec {spec} {len(spec)} entries.")
    entries = (*spec, *[None] * (len(shape) - len(spec)))
    for size, entry in zip(shape, entries, strict=True) if sizes is not None else ():
        for name in names_of(entry):
            if sizes is not None and name not in sizes:
                raise ValueError(
                    f"{where} has the spec {spec}, and the mesh no axis {name!r}: it has {', '.join(sizes)}. Logical "
                    "names become those of a mesh by nn.logical_to_mesh(specs, rules)."
                )
        if sizes is not None and size % parts_of(entry, sizes):
            raise ValueError(
                f"{where} has the spec {spec}, but {size} is not divided by the {parts_of(entry, sizes)} devices along "
                f"{' × '.join(names_of(entry))}."
            )
    return entries


def _below(start: Path, leaves: Mapping[Path, Any]) -> dict[Path, Any]:
    """The leaves below a path, without it."""
    return {path[len(start) :]: leaf for path, leaf in leaves.items() if path[: len(start)] == start}


def _described(mesh: Any) -> str:
    return " × ".join(f"{name} {size}" for name, size in dict(mesh.shape).items())
