"""A delta on a backbone: what has to be known of it besides its method."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jdelta.core.config import require_name
from jdelta.core.edits import Attachment, CallEdit, WeightEdit
from jdelta.core.host import HostAdapter
from jdelta.core.method import Method
from jdelta.core.random_keys import as_key
from jdelta.core.structure import Structure
from jdelta.trees import fingerprint, surgery
from jdelta.trees.surgery import Path, Tree

_held: weakref.WeakSet[DeltaState] = weakref.WeakSet()  # every delta that somebody holds
_lock = threading.Lock()
AFTER_MERGE = "after.merge"  # the name of what stays of deltas that are gone; no delta has a dot in its name


@dataclasses.dataclass(eq=False)
class DeltaState:
    """One delta on one backbone.

    Attributes:
      host: the backbone.
      backbone_model: the object that the user gave as backbone.
      method: what the delta does.
      label: what its class is called, for messages.
      name: its name in the tree.
      rng: key of its initial values.
      exclude: patterns of what trains, after `freeze_module`; `None`: its own leaves and `unfrozen_modules`.
      inserted: names of the modules where a layer was inserted by hand.
      shapes: of its own leaves, as a tree that is grafted into the backbone's; `None` until it is attached.
      initial: path to digest of its own leaves at initialisation; `None` after values were loaded.
      kept: path to value of what is put back: on detaching the backbone's, on attaching the delta's.
      unmerged: while it is merged, path to the weight before and after.
      was_merged: whether it was merged once.
      removed: what it was on the model, if it was removed.
      check: told the shapes of its own leaves before any is made.
      started: whether its own leaves were initialised from data.
    """

    host: HostAdapter
    backbone_model: Any
    method: Method
    label: str
    name: str = ""
    rng: Any = None
    exclude: tuple[str, ...] | None = None
    inserted: list[str] = dataclasses.field(default_factory=list)
    shapes: Tree | None = None
    initial: dict[Path, str] | None = dataclasses.field(default_factory=dict)
    kept: dict[Path, Any] = dataclasses.field(default_factory=dict)
    unmerged: dict[Path, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    was_merged: bool = False
    removed: Attachment | None = None
    check: Callable[[DeltaState, Mapping[Path, Any]], None] | None = None
    started: bool = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Also of copies: notes that somebody holds it."""
        self = super().__new__(cls)
        with _lock:
            _held.add(self)
        return self

    @property
    def structure(self) -> Structure:
        """The backbone's modules, in the order of execution."""
        return self.host.structure()

    @property
    def merged(self) -> bool:
        """Whether it is merged into the backbone's weights."""
        return bool(self.unmerged)

    @property
    def attachment(self) -> Attachment:
        """What the model carries of it. Raises `RuntimeError` if that is nothing."""
        if self.removed is not None:
            raise RuntimeError(
                f"delta {self.name!r} was removed from its model. Attach a new one; AutoDeltaModel.from_finetuned "
                "attaches one that was saved."
            )
        found = [a for a in self.host.attachments if a.name == self.name]
        if not found:
            raise RuntimeError(f"the model does not carry delta {self.name!r}: its module was replaced. Attach anew.")
        return found[0]

    def active(self, verb: str) -> Attachment:
        """The attachment. Raises `RuntimeError` if it is not active."""
        own = self.attachment
        if not own.active:
            status, remedy = ("merged", "unmerge") if self.merged else ("detached", "attach")
            raise RuntimeError(f"delta {self.name!r} is {status} and cannot be {verb}. Call {remedy}() first.")
        return own

    def tree(self, params: Tree | None) -> Tree:
        """The tree that was given, or that of the model, which may be shapes."""
        return self.host.tree() if params is None else params

    def values(self, params: Tree | None) -> Tree:
        """`tree`, to be read. Raises `RuntimeError` if it was donated."""
        tree = self.tree(params)
        surgery.require_alive(tree)
        surgery.require_arrays(tree)
        return tree


def new_state(
    host: HostAdapter, backbone_model: Any, method: Method, label: str, name: str | None, rng: int | chex.PRNGKey
) -> DeltaState:
    """The state of a delta that is on no module yet. Nothing of the model changes."""
    state = DeltaState(host, backbone_model, method, label, rng=as_key(rng))
    state.name = free_name(state, name)
    return state


# --- what a model carries


def held_on(state: DeltaState) -> list[DeltaState]:
    """All deltas on its model that somebody holds."""
    with _lock:
        held = list(_held)  # others may be made meanwhile
    mine = state.backbone_model
    return [s for s in held if vars(s).get("shapes") is not None and s.backbone_model is mine and s.removed is None]


def carried(state: DeltaState) -> list[Attachment]:
    """What its model carries, without the detached deltas that nobody holds any more, as nobody can attach them."""
    names, attachments = {s.name for s in held_on(state)}, state.host.attachments
    return without(attachments, [a for a in attachments if not a.active and a.name not in names])


def without(attachments: Sequence[Attachment], gone: Sequence[Attachment]) -> list[Attachment]:
    """The attachments without some that are not active. What merging may have added to their hosts is still run."""
    rest = [a for a in attachments if a not in gone]
    edits = {edit.host: edit for a in gone for edit in a.edits if hasattr(edit.layer, "after_merge")}
    return [Attachment(AFTER_MERGE, tuple(edits.values()), active=False), *rest] if edits else rest


def taken(name: str, state: DeltaState) -> str | None:
    """What has this name already, as a message; `None` if nothing has."""
    attachments, structure = carried(state), state.structure
    if name in {a.name for a in attachments}:
        return f"the model has a delta named {name!r} already. Choose another name."
    parts = {key for path in surgery.flatten(structure.params) for key in path}
    if name in parts.union(*(info.path for info in structure)):
        return f"{name!r} is the name of a part of this backbone. Choose another name for the delta."
    if name in structure.reserved:
        return f"modules of this model have an attribute {name!r}. Choose another name for the delta."
    for a in attachments:
        if name in {key for path in (*a.leaves, *a.generated) for key in path}:
            return f"{name!r} is the name of a part of delta {a.name!r}. Choose another name."
    return None


def free_name(state: DeltaState, name: str | None, but: str = "") -> str:
    """The name, if the delta can have it; without one, the method's, numbered if it is taken or is `but`."""
    if name is None:
        kind = state.method.delta_type
        names = itertools.chain([kind], (f"{kind}_{i}" for i in itertools.count(2)))
        return next(n for n in names if n != but and taken(n, state) is None)
    require_name(name)
    if (what := taken(name, state)) is not None:
        raise ValueError(what)
    return name


# --- what it has in a tree


def targets(state: DeltaState) -> list[str]:
    """The names of the modules that it is on, in the order of execution, and those of leaves that it changes."""
    return targets_of(state.removed or state.attachment, state.structure)


def targets_of(attachment: Attachment, structure: Structure) -> list[str]:
    """The names of the modules that an attachment is on, and those of leaves that it changes."""
    edits = [edit for edit in attachment.edits if not edit.auxiliary]
    leaves = [edit.leaf for edit in edits if isinstance(edit, WeightEdit) and not edit.by_module]
    hosts = {edit.host for edit in edits if isinstance(edit, CallEdit) or edit.by_module}
    names = [info.name for info in structure if info.path in hosts]
    known = structure.modules
    others = [name for name in map(surgery.name_of, sorted(hosts)) if name not in known]  # run by another method
    return [*names, *others, *map(surgery.name_of, dict.fromkeys(leaves))]


def require_whole(state: DeltaState, tree: Tree, verb: str) -> None:
    """Raises `ValueError` unless the tree holds all leaves of the backbone and of this delta."""
    have = surgery.parameters_of(tree)
    for path in (*surgery.flatten(surgery.parameters(state.structure.params)), *state.attachment.leaves):
        if path not in have:
            raise ValueError(
                f"{verb}: the tree lacks {surgery.name_of(path)!r}. Pass one of the grafted parameters' structure."
            )


def unfrozen_backbone(state: DeltaState, params: Tree) -> dict[Path, Any]:
    """The backbone's own leaves that train with the delta, by their path in the tree."""
    flat, start = surgery.flatten(params), surgery.root(params)
    return {(*start, *path): flat[(*start, *path)] for path in state.attachment.unfrozen_backbone}


def own(state: DeltaState, tree: Tree) -> Tree:
    """Returns the part of a tree that belongs to this delta alone, with the structure of what `init` returns.

        shardings = delta.shardings(specs, mesh)
        own = jax.jit(delta.init, out_shardings=delta.own(shardings))(jax.random.key(0))

    Args:
      tree: a tree with the structure of the grafted parameters: values, specs, shardings, gradients.

    Raises:
      RuntimeError: the tree was donated.
      ValueError: the tree lacks some of the delta's leaves.
    """
    surgery.require_alive(tree)
    have, start = surgery.flatten(tree), surgery.root(tree)
    for path in state.attachment.leaves:
        if (*start, *path) not in have:
            raise ValueError(f"own: the tree lacks {surgery.name_of(path)!r} of delta {state.name!r}.")
    return surgery.select(tree, state.attachment.leaves)


# --- values


def has_value(leaf: Any) -> bool:
    """Whether a leaf is an array that can be read now."""
    return isinstance(leaf, (jax.Array, np.ndarray)) and not isinstance(leaf, jax.core.Tracer)


def digests(params: Tree, paths: Iterable[Path]) -> dict[Path, str]:
    """Path to digest of those leaves that hold values."""
    leaves = surgery.flatten(params)
    values = {path: meta.unbox(leaves[path]) for path in sorted(paths)}
    return {path: fingerprint.digest(value) for path, value in values.items() if has_value(value)}


def kept_value(kept: Mapping[Path, Any], path: Path) -> Any:
    """The value that was kept of a leaf of the parameters, which may be in a tree of collections."""
    return meta.unbox(kept.get(path, kept.get(("params", *path))))


def copied(leaf: Any) -> Any:
    """A copy that outlives the donation of the original."""
    return jax.tree.map(lambda a: jnp.array(a, copy=True) if isinstance(a, jax.Array) else a, leaf)
