"""A delta in its place: its edits on the backbone, its leaves in the tree, and the way on and off."""

from __future__ import annotations

import dataclasses
import itertools
import re
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta

from jdelta.core.config import DeltaConfig, require_name
from jdelta.core.edits import Attachment, CallEdit
from jdelta.core.random_keys import as_key
from jdelta.core.structure import ModuleInfo, Structure, require_open
from jdelta.hosts import backbone
from jdelta.hosts.linen.instrument import attachments_of, instrument, with_made
from jdelta.names import common_names
from jdelta.saved.finetuned import Finetuned, listing, misfits
from jdelta.trees import addressing, dtypes, fingerprint, freezing, memory, surgery
from jdelta.trees.surgery import Path, Tree

Find = Callable[[Sequence[str]], list[ModuleInfo]]


class _NamedLikeALeaf(ValueError):
    """A delta has the name of one of its own leaves."""


_held: weakref.WeakSet[Placed] = weakref.WeakSet()  # every delta that somebody holds
_lock = threading.Lock()
_COMMON = {field.name for field in dataclasses.fields(DeltaConfig)}  # the arguments that every method has
AFTER_MERGE = "after.merge"  # the name of what stays of deltas that are gone; no delta has a dot in its name


def carried(backbone_model: Any) -> list[Attachment]:
    """What a model carries, without the detached deltas that nobody holds any more, as nobody can attach them."""
    with _lock:
        put = [delta for delta in _held if "_shapes" in vars(delta)]  # others are being made, or failed
    names = {delta.name for delta in put if delta.backbone_model is backbone_model and delta._removed is None}
    attachments = attachments_of(backbone.adapt(backbone_model).module)
    return without(attachments, [a for a in attachments if not a.active and a.name not in names])


def without(attachments: Sequence[Attachment], gone: Sequence[Attachment]) -> list[Attachment]:
    """The attachments without some that are off. What merging may have left behind in their hosts is still run."""
    rest = [a for a in attachments if a not in gone]
    edits = {edit.host: edit for a in gone for edit in a.edits if hasattr(edit.layer, "after_merge")}
    return [Attachment(AFTER_MERGE, tuple(edits.values()), active=False), *rest] if edits else rest


def taken(name: str, backbone_model: Any, structure: Structure) -> str | None:
    """What has this name already, as a message; `None` if nothing has."""
    attachments = carried(backbone_model)
    if name in {a.name for a in attachments}:
        return f"the model has a delta named {name!r} already. Choose another name."
    parts = {key for path in surgery.flatten(structure.params) for key in path}
    if name in parts.union(*(info.path for info in structure)):
        return f"{name!r} is the name of a part of this backbone. Choose another name for the delta."
    for a in attachments:
        if name in {key for path in (*a.leaves, *a.generated) for key in path}:
            return f"{name!r} is the name of a part of delta {a.name!r}. Choose another name."
    return None


class Placed:
    """What `DeltaModel` is made on: what a method says of itself, and how that gets onto the model.

    Attributes:
      config: the method's arguments.
      name: the delta's name in the tree.
      backbone_model: what it is on.
    """

    delta_type: ClassVar[str] = "delta"
    config_class: ClassVar[type[DeltaConfig]] = DeltaConfig
    default_modified_modules: ClassVar[Sequence[str]] = ()

    config: Any  # of config_class
    name: str
    _removed: Attachment | None = None  # what it was on the model, if it was taken off for good
    _saved: Finetuned | None = None  # while one that was saved is attached: that one

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Also of copies: notes that somebody holds it."""
        self = super().__new__(cls)
        with _lock:
            _held.add(self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without what is computed when it is asked for, such as the structure, whose modules need not pickle."""
        computed = {
            name for cls in type(self).__mro__ for name, v in vars(cls).items() if isinstance(v, cached_property)
        }
        return {name: value for name, value in vars(self).items() if name not in computed}

    # --- what a method says

    def edits(self, host: ModuleInfo, structure: Structure) -> Iterable[CallEdit]:
        """What this method does at a module that it was pointed at. Override it.

        Raises:
          TypeError, ValueError: the module cannot take this delta; `host.name` is put in front of the message.
        """
        return ()

    def place(self, structure: Structure, find: Find, patterns: Sequence[str]) -> Iterable[CallEdit]:
        """The edits at all modules that the patterns mean. Override it for a method whose modules come in pairs."""
        for host in find(patterns) if patterns else ():
            try:
                yield from self.edits(host, structure)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{type(self).__name__} at {host.name} ({host.type.__name__}): {error}") from error

    def shared(self, shapes: Mapping[Path, jax.ShapeDtypeStruct]) -> nn.Module | None:
        """A module that makes leaves of several hosts from parameters of its own. Override it.

        Its parameters lie once in the tree, below the delta's name at the root; what it makes is then not in the tree.

        Args:
          shapes: path to shape of each leaf that the delta's layers have.

        Returns:
          An unbound module which, called without arguments, returns `{path: array}` for some of these paths.
        """
        return None

    def folded(self) -> DeltaConfig | None:
        """The configuration after what `shared` makes has taken the place of its parameters. Override it.

        A delta is saved in that form. `None`: it stays as it is.
        """
        return None

    def frozen(self, leaf: Path) -> bool:
        """Whether this leaf of the delta's own never trains. Override it."""
        return False

    def start(self, leaves: Mapping[Path, jax.Array], params: Mapping[Path, jax.Array]) -> Mapping[Path, jax.Array]:
        """The initial values of the delta's own leaves, where they depend on the backbone's. Override it.

        Args:
          leaves: path to value, as the layers initialise it.
          params: path to value of the backbone's parameters.
        """
        return leaves

    # --- what it is

    @property
    def structure(self) -> Structure:
        """The backbone's modules, in the order of execution."""
        return self._structure

    @cached_property
    def _structure(self) -> Structure:
        return backbone.trace(self._adapter)

    @property
    def attached(self) -> bool:
        """Whether the model runs this delta."""
        return self._removed is None and self._attachment.active

    @property
    def merged(self) -> bool:
        """Whether the delta is folded into the backbone's weights."""
        return bool(self._unmerged)

    @property
    def targets(self) -> list[str]:
        """The names of the modules this delta sits on, in the order of execution."""
        hosts = {edit.host for edit in (self._removed or self._attachment).edits if not edit.auxiliary}
        return [info.name for info in self._structure if info.path in hosts]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths of the delta's own leaves in the tree of parameters."""
        return (self._removed or self._attachment).leaves

    def shapes(self) -> Tree:
        """Shapes of the delta's own leaves, as a tree to be grafted into the backbone's."""
        return self._shapes

    # --- on and off

    def detach(self) -> None:
        """Takes the delta off: the model then computes what it computed without it.

        The leaves that `model.params` held are kept, and `attach` puts them back; leaves of the backbone's own that
        trained with the delta get their earlier values meanwhile. Deltas come off in any order. A tree that you hold
        yourself is yours to change: `jdelta.prune(params, delta)`.

        Raises:
          RuntimeError: it is detached already, or `model.params` was donated.
          ValueError: `model.params` lacks leaves of this delta.
        """
        self._switch(active=False)

    def attach(self) -> None:
        """Puts the delta back in its place, with the values it had when it was detached.

        Raises:
          RuntimeError: it is attached already, or `model.params` was donated.
        """
        self._switch(active=True)

    def remove(self) -> None:
        """Takes the delta off for good: its leaves go, and its name is free again.

        Nothing can be done with this object afterwards; what `finetuned` gave before can be attached anew. A delta that
        is merged stays in the weights, which are then the model's own: `merge(); remove()` leaves a bare backbone. To
        forget a detached delta, `del` will do: one that nobody holds does not stay on the model.

        Raises:
          RuntimeError: it was removed already.
          RuntimeError, ValueError: as `detach`.
        """
        if self._attachment.active:
            self._switch(active=False)
        own, others = self._attachment, carried(self.backbone_model)
        rest = without(others, [own]) if self._was_merged else [a for a in others if a.name != self.name]
        self._adapter.module = instrument(self._adapter.module, rest)
        self._removed = own
        self._kept.clear()
        self._unmerged.clear()

    # --- inside: before it is on the model

    def _begin(self, backbone_model: Any, name: str | None, rng: int | chex.PRNGKey) -> None:
        """Everything but the modules that it goes to; `config` is there already. Nothing of the model changes."""
        self.backbone_model = backbone_model
        self._adapter = backbone.adapt(backbone_model)
        self._structure = backbone.trace(self._adapter)
        self._rng = as_key(rng)
        self.name = self._free_name(name)
        self._is_named = name is not None  # by the user
        self._exclude: tuple[str, ...] | None = None  # None: own leaves and self._unfrozen
        self._unfrozen = tuple(self.config.unfrozen_modules or ())
        self._inserted: list[str] = []  # modules where a layer was put in by hand
        self._was_merged = False
        self._unmerged: dict[Path, tuple[Any, Any]] = {}  # while it is merged: the weights before and after
        self._initial: dict[Path, str] | None = {}  # digests of own leaves at initialisation; None: values were loaded
        self._kept: dict[Path, Any] = {}  # values to put back: on detach the backbone's, on attach the delta's

    def _edits_at(self, patterns: Sequence[str], common: bool = False) -> list[CallEdit]:
        """What the method does at the modules that the patterns mean, but for what `exclude_modules` takes out."""
        asked: list[ModuleInfo] = []
        find = self._finder(common, self.config.exclude_modules or ())

        def noted(patterns: Sequence[str]) -> list[ModuleInfo]:
            found = find(patterns)
            asked.extend(found)
            return found

        wanted = list(self.place(self._structure, noted, patterns))
        edits = self._without_excluded(wanted)
        means = f"{type(self).__name__}: none of the modules that {list(patterns)} mean gets a change from it"
        if patterns and not wanted:
            raise ValueError(f"{means}.")
        if patterns and not any(not edit.auxiliary for edit in edits):
            raise ValueError(f"{means}: exclude_modules={list(self.config.exclude_modules or ())} leaves nothing.")
        if not common:
            self._require_each_changed(asked, wanted)
        for field in self.config.pattern_fields if edits else ():
            self._check_patterns(field, edits)
        return edits

    def _without_excluded(self, edits: Iterable[CallEdit]) -> list[CallEdit]:
        """Those whose module is neither excluded nor below one that is. What only auxiliary others stays."""
        self._structure.find((), self.config.exclude_modules or ())  # raises if a pattern means nothing
        return [edit for edit in edits if edit.auxiliary or not self._is_excluded(_changed_name(edit))]

    def _is_excluded(self, name: str) -> bool:
        """Whether a module is excluded, or below one that is."""
        return any(addressing.matches_at_or_above(name, p) for p in self.config.exclude_modules or ())

    def _require_each_changed(self, asked: Sequence[ModuleInfo], edits: Sequence[CallEdit]) -> None:
        """Raises `ValueError` if the method does nothing at or below a module that was named."""
        changed = {
            path for edit in edits if not edit.auxiliary for path in (edit.host, edit.span_input) if path is not None
        }
        around = {path[:i] for path in changed for i in range(len(path) + 1)}
        if odd := list({info.path: info for info in asked if info.path not in around}.values()):
            names = ", ".join(f"{info.name} ({info.type.__name__})" for info in odd[:3])
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            raise ValueError(
                f"{type(self).__name__} has nothing to change at {names}{more}. Leave them out of modified_modules, or "
                "name them in exclude_modules."
            )

    def _check_patterns(self, field: str, edits: Sequence[CallEdit]) -> None:
        """Raises `ValueError` if a pattern of modified modules counts for none of them."""
        left = list(dict.fromkeys(surgery.name_of(edit.host) for edit in edits if not edit.auxiliary))
        names = left
        for pattern in getattr(self.config, field) or ():
            if not any(addressing.matches(name, pattern) for name in names):
                near = addressing.closest(names, pattern)
                hint = f" Closest: {', '.join(near)}." if near else ""
                raise ValueError(
                    f"{type(self).__name__}: {field} has {pattern!r}, which means none of the {len(names)} modules "
                    f"that the delta changes.{hint}"
                )
            rest = [name for name in left if not addressing.matches(name, pattern)]
            if rest == left:
                raise ValueError(
                    f"{type(self).__name__}: {field} has {pattern!r}, and for all that it means an earlier pattern "
                    "counts. Put it before that one."
                )
            left = rest

    def _free_name(self, name: str | None, but: str = "") -> str:
        """The name, if the delta can have it; without one, the method's, numbered if it is taken or is `but`."""
        if name is None:
            numbers = (f"{self.delta_type}_{i}" for i in itertools.count(2))
            names = itertools.chain([self.delta_type], numbers)
            return next(n for n in names if n != but and taken(n, self.backbone_model, self._structure) is None)
        require_name(name)
        if (what := taken(name, self.backbone_model, self._structure)) is not None:
            raise ValueError(what)
        return name

    def _finder(self, common: bool, exclude: Sequence[str]) -> Find:
        def find(patterns: Sequence[str]) -> list[ModuleInfo]:
            if not common:
                return self._structure.find(patterns, exclude)
            try:
                resolved = common_names.resolve(self._structure, addressing.checked(patterns))
            except ValueError as error:
                raise ValueError(f"{type(self).__name__}: {error}") from error
            found = [info.name for info in resolved]
            return self._structure.find([f"[r]^{re.escape(name)}" for name in found], exclude) if found else []

        return find

    # --- inside: onto the model

    def _put_at(self, patterns: Sequence[str], common: bool = False) -> None:
        """Attaches to the modules that the patterns mean. If leaves have the name that it gave itself, it takes
        another."""
        edits = self._edits_at(patterns, common)
        if not self._is_named:
            self._warn_of_twin(edits)
        try:
            self._put(edits)
        except _NamedLikeALeaf:
            if self._is_named:
                raise
            self.name = self._free_name(None, but=self.name)
            self._put(self._edits_at(patterns, common))

    def _warn_of_twin(self, edits: Sequence[CallEdit]) -> None:
        """Warns if an attached delta is the same up to its values, however the patterns of its modules are written."""

        def what(config: DeltaConfig, edits: Sequence[CallEdit]) -> Any:
            arguments = config.to_dict()
            own = {key: arguments[key] for key in arguments if key not in _COMMON}
            return own, {edit.host for edit in edits}

        carried = [a for a in attachments_of(self._adapter.module) if a.active and a.config is not None]
        twins = [a.name for a in carried if edits and what(a.config, a.edits) == what(self.config, edits)]
        if twins:
            warnings.warn(
                f"{type(self).__name__}: delta {twins[0]!r} of the same arguments is attached to the same modules. The "
                f"new one, {self.name!r}, adds to what it does, and by default only {self.name!r} trains. If the same "
                "lines ran twice, call remove() or detach() on the first before they run again, or load the model "
                "afresh. If both are meant, give the new one a name: name=….",
                stacklevel=4,
            )

    def _put(self, edits: Sequence[CallEdit]) -> None:
        """Makes these the delta's edits. All that can fail comes first; then model and parameters change."""
        surgery.require_alive(self._adapter.params)
        draft, index, everything = self._tried(edits)
        edits, others = draft[index].edits, carried(self.backbone_model)
        known = {path for path in surgery.flatten(self._structure.params)}
        known.update(path for a in others if a.name != self.name for path in a.leaves)
        shapes = {p: leaf for p, leaf in surgery.flatten(surgery.parameters(everything)).items() if p not in known}
        self._check_names(shapes, others)
        draft[index], own = self._attachment_of(edits, shapes)
        self._require_room(own)

        module, params = self._adapter.module, self._adapter.params
        after = params
        if params is not None:
            have = surgery.flatten(params)
            fresh = [p for p in draft[index].leaves if (*surgery.root(params), *p) not in have]
            after = surgery.graft(params, self._initial_values(draft, fresh, params)) if fresh else params
        start = surgery.root(everything)
        try:
            self._adapter.module = instrument(module, draft)
            if params is not None:
                self._adapter.params = after
                self._kept = {p: _copy(leaf) for p, leaf in self._borrowed(after).items()} | self._kept
            if not draft[index].generated:
                self._adapter.cache["tree"] = (self._adapter.module, everything)
            self._mask_of(self._tree(None))
            self._warn_of_fixed(self._unfrozen, "unfrozen_modules")
        except Exception:
            self._adapter.module = module
            if params is not None:
                self._adapter.params = params
            raise
        self._shapes = surgery.unflatten({(*start, *path): shape for path, shape in own.items()})
        if params is not None and self._initial is not None:
            self._initial |= _digests(surgery.parameters(after), fresh)

    def _tried(self, edits: Sequence[CallEdit]) -> tuple[list[Attachment], int, Tree]:
        """What the model would carry with these edits, which of it they are, and its leaves' shapes.

        Nothing changes; raises what can be wrong with the edits.
        """
        edits = list({(e.host, e.where, e.leaf): e for e in edits}.values())  # a module meant twice is edited once
        others = carried(self.backbone_model)
        index = next((i for i, a in enumerate(others) if a.name == self.name), len(others))
        if index < len(others) and not others[index].active:
            raise RuntimeError(f"delta {self.name!r} is detached; call attach() before changing it.")
        self._check(edits, others)
        draft = [*others[:index], Attachment(self.name, tuple(edits)), *others[index + 1 :]]
        ran: set[CallEdit] = set()
        try:
            everything = jax.eval_shape(lambda key: self._run_init(draft, key, ran), self._rng)
        except Exception as error:  # flax has kinds of its own, and a layer may raise anything
            kind = next((k for k in (TypeError, ValueError, RuntimeError) if isinstance(error, k)), None)
            if kind is not None and _is_from_here(error):
                raise
            at = listing(list(dict.fromkeys(surgery.name_of(edit.host) for edit in edits)))
            raise (kind or ValueError)(
                f"{type(self).__name__}: the model does not run with these layers, at {at}: {error}"
            ) from error
        self._require_same_backbone(everything)
        for edit in edits:
            if edit.layer is not None and edit not in ran:
                raise ValueError(f"{surgery.name_of(edit.host)} was not called in the model's run on its pseudo input.")
        return draft, index, everything

    def _require_same_backbone(self, everything: Tree) -> None:
        """Raises `ValueError` if the backbone's own leaves would have other shapes with the edits."""
        now, before = (freezing.parameters_of(tree) for tree in (everything, self._structure.params))
        for path in now.keys() & before.keys():
            new, old = meta.unbox(now[path]), meta.unbox(before[path])
            if surgery.empty_node not in (new, old) and new.shape != old.shape:
                raise ValueError(
                    f"{type(self).__name__}: with these layers {surgery.name_of(path)} would have shape {new.shape}, "
                    f"and it has {old.shape}. A layer has to return the shape that the next module takes."
                )

    def _check(self, edits: Sequence[CallEdit], others: Sequence[Attachment]) -> None:
        spans = any(edit.span_input is not None for edit in edits)
        order = {info.path: i for i, info in enumerate(self._structure)} if spans else {}
        trains = any(edit.where == "train" for edit in edits)
        held = surgery.flatten(surgery.parameters(self._tree(None))) if trains else {}
        lent = {path: a.name for a in others if a.name != self.name for path in a.unfrozen_backbone}
        for edit in edits:
            host = self._structure[surgery.name_of(edit.host)]
            require_open(host)
            if edit.where == "train":
                if (*edit.host, *edit.leaf) in lent:
                    owner = lent[(*edit.host, *edit.leaf)]
                    raise ValueError(f"{host.name}.{surgery.name_of(edit.leaf)} is trained by delta {owner!r} already.")
                leaf = held.get((*edit.host, *edit.leaf))
                if dtypes.is_fixed(leaf):
                    raise TypeError(
                        f"{host.name}.{surgery.name_of(edit.leaf)} holds {meta.unbox(leaf).dtype}, and only floats of "
                        "16 bits and more train. Leave the module out with exclude_modules."
                    )
                continue
            if edit.where == "around" and not getattr(type(edit.layer).__call__, "nowrap", False):
                raise TypeError(f"{type(edit.layer).__name__} goes around modules: mark its __call__ with nn.nowrap.")
            if edit.span_input is not None and order[edit.span_input] > order[edit.host]:
                raise ValueError(
                    f"the span starts at {surgery.name_of(edit.span_input)}, which runs after {host.name}."
                )
            for side in {"before": "x", "after": "y", "parallel": "y"}.get(edit.where, ""):
                what = "takes" if side == "x" else "returns"
                try:
                    dtype = getattr(host, side).dtype
                except TypeError as error:
                    raise TypeError(f"{host.name} ({host.type.__name__}) cannot be a target: {error}") from error
                if not jnp.issubdtype(dtype, jnp.floating):
                    raise TypeError(
                        f"{host.name} ({host.type.__name__}) {what} an array of {dtype}; a layer needs floats."
                    )

    def _require_room(self, own: Mapping[Path, Any]) -> None:
        """Raises `ValueError` if the delta's leaves do not fit into memory, or are not those of the saved delta."""
        if self._saved is not None:
            found = self._saved.renamed(self.name)
            if odd := misfits(found, own, surgery.flatten(surgery.parameters(self._tree(None)))):
                raise ValueError(f"delta {found.name!r} cannot be loaded: {listing(odd)}.")
        held = jax.tree.leaves(self._adapter.params)
        values = bool(held) and not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in held)
        memory.require_room(f"{type(self).__name__}: the leaves of delta {self.name!r}", own.values(), values)

    def _check_names(self, leaves: Iterable[Path], others: Sequence[Attachment]) -> None:
        """Raises `ValueError` if parts of the delta's leaves are called like a delta."""
        named = {a.name for a in others if a.name != self.name}
        for path in leaves:
            if path.count(self.name) > 1:
                raise _NamedLikeALeaf(
                    f"a delta cannot be named {self.name!r}: it has the leaf {surgery.name_of(path)!r}. Choose another "
                    "name."
                )
            if taken := named.intersection(path):
                raise ValueError(
                    f"{type(self).__name__} has the leaf {surgery.name_of(path)!r}, and a delta of this model is named "
                    f"{min(taken)!r}. Take that one off, and give it another name."
                )

    def _attachment_of(
        self, edits: Sequence[CallEdit], shapes: Mapping[Path, Any]
    ) -> tuple[Attachment, dict[Path, Any]]:
        """The attachment of these edits, whose layers have leaves of these shapes; and the shapes of its own leaves."""
        source, own = self.shared(shapes), dict(shapes)
        made: tuple[Path, ...] = ()
        if source is not None:
            output, variables = jax.eval_shape(source.init_with_output, self._rng)
            made = tuple(path for path in shapes if path in output)
            own = {path: shape for path, shape in shapes.items() if path not in made}
            own |= {(self.name, *path): shape for path, shape in surgery.flatten(variables["params"]).items()}
        fixed = frozenset(path for path in own if self.frozen(path))
        return Attachment(self.name, tuple(edits), tuple(own), True, fixed, source, made, self.config), own

    def _run_init(self, attachments: Sequence[Attachment], rng: chex.PRNGKey, ran: set[CallEdit] | None = None) -> Tree:
        return self._adapter.init(instrument(self._adapter.module, attachments, ran), rng)

    def _initial_values(self, attachments: Sequence[Attachment], paths: Sequence[Path], params: Tree) -> Tree:
        """Values of new leaves; shapes, where the backbone's own are."""

        def new(rng: chex.PRNGKey) -> Tree:
            return _select(self._run_init(attachments, rng), paths)

        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
            return jax.eval_shape(new, self._rng)
        return self._started(jax.jit(new)(self._rng), params)

    def _started(self, own: Tree, params: Tree | None) -> Tree:
        """The delta's own leaves after `start`."""
        if type(self).start is Placed.start:
            return own
        surgery.require_alive(params)
        leaves = surgery.flatten(surgery.parameters(own))
        values = surgery.flatten(surgery.parameters(params)) if params is not None else {}
        if not values or any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in values.values()):
            raise ValueError(
                f"{type(self).__name__} starts from the backbone's values, which are elsewhere. Pass them: "
                "delta.init(rng, params)."
            )
        begin = surgery.root(own)
        started = self.start(leaves, values)
        return surgery.unflatten({(*begin, *path): leaf for path, leaf in started.items()}, like=own)

    # --- inside: while it is there

    @property
    def _attachment(self) -> Attachment:
        if self._removed is not None:
            raise RuntimeError(
                f"delta {self.name!r} was removed from its model. Attach a new one; AutoDeltaModel.from_finetuned "
                "attaches one that was saved."
            )
        found = [a for a in attachments_of(self._adapter.module) if a.name == self.name]
        if not found:
            raise RuntimeError(f"the model does not carry delta {self.name!r}: its module was replaced. Attach anew.")
        return found[0]

    def _active(self, verb: str) -> Attachment:
        """The attachment. Raises `RuntimeError` if it is off."""
        own = self._attachment
        if not own.active:
            state, remedy = ("merged", "unmerge") if self.merged else ("detached", "attach")
            raise RuntimeError(f"delta {self.name!r} is {state} and cannot be {verb}. Call {remedy}() first.")
        return own

    def _tree(self, params: Tree | None) -> Tree:
        return backbone.tree_of(self._adapter) if params is None else params

    def _values(self, params: Tree | None) -> Tree:
        """`_tree`, to be read. Raises `RuntimeError` if it was donated."""
        tree = self._tree(params)
        surgery.require_alive(tree)
        surgery.require_arrays(tree)
        return tree

    def _require_whole(self, tree: Tree, verb: str) -> None:
        """Raises `ValueError` unless the tree holds all leaves of the backbone and of this delta."""
        have = freezing.parameters_of(tree)
        for path in (*surgery.flatten(surgery.parameters(self._structure.params)), *self._attachment.leaves):
            if path not in have:
                raise ValueError(
                    f"{verb}: the tree lacks {surgery.name_of(path)!r}. Pass one of the grafted parameters' structure."
                )

    def _only_own(self, tree: Tree) -> Tree:
        return _select(tree, self._attachment.leaves)

    def _mask_of(self, params: Tree) -> Tree:
        return freezing.mask_of(params, self._trained(freezing.parameters_of(params)))

    def _trained(self, leaves: Mapping[Path, Any]) -> set[Path]:
        """The paths of what trains now among these leaves."""
        own, attachments = self._attachment, attachments_of(self._adapter.module)
        never = {path for a in attachments for path in a.frozen}
        held = surgery.flatten(surgery.parameters(self._tree(None)))
        fixed = {path for path, leaf in held.items() if dtypes.is_fixed(leaf)}
        if self._exclude is None:
            exclude: tuple[str, ...] = (freezing.DELTAS, *self._unfrozen)
            return freezing.trained_paths(leaves, exclude, own.trained if own.active else (), never, fixed)
        trained = {path for a in attachments if a.active for path in a.trained}
        return freezing.trained_paths(leaves, self._exclude, trained, never, fixed)

    def _trained_in_model(self, params: Tree) -> set[Path]:
        """The paths of what trains now in the model, and in a tree that may hold more, such as merged biases."""
        active = [path for a in attachments_of(self._adapter.module) if a.active for path in a.leaves]
        float_leaf = jax.ShapeDtypeStruct((), jnp.float32)
        leaves = freezing.parameters_of(params) | surgery.flatten(self._structure.params)
        return self._trained(leaves | dict.fromkeys(active, float_leaf))

    def _warn_of_fixed(self, patterns: Sequence[str], verb: str) -> None:
        """Warns if patterns of what trains mean leaves too that cannot be trained."""
        if passed := freezing.passed_over(self._tree(None), patterns):
            more = f" and {len(passed) - 3} more" if len(passed) > 3 else ""
            warnings.warn(
                f"{verb}: {', '.join(passed[:3])}{more} stay frozen: only floats of 16 bits and more train. Name the "
                "other leaves alone.",
                stacklevel=4,
            )

    def _is_untrained(self, params: Tree) -> bool:
        """Whether all of the delta that trains has the bits that it was initialised with.

        Not while a function is traced, of shapes, of values that were loaded, or where nothing of the delta trains. In
        a program of several processes all have to call this, and find the same.
        """
        if self._initial is None:
            return False
        leaves = freezing.parameters_of(params)
        trains = self._trained(leaves)
        own = [path for path in self._attachment.leaves if path in trains]
        borrowed = [path for path in self._attachment.unfrozen_backbone if path in trains]
        before = {path: _kept_value(self._kept, path) for path in borrowed}
        values = [meta.unbox(leaves[path]) for path in (*own, *borrowed)]
        if not values or not all(map(_has_value, [*values, *before.values()])):
            return False
        return all(fingerprint.digest(meta.unbox(leaves[path])) == self._initial.get(path) for path in own) and all(
            fingerprint.digest(meta.unbox(leaves[path])) == fingerprint.digest(before[path]) for path in borrowed
        )

    def _borrowed(self, params: Tree) -> dict[Path, Any]:
        """The backbone's own leaves that train with this delta."""
        flat, start = surgery.flatten(params), surgery.root(params)
        return {(*start, *path): flat[(*start, *path)] for path in self._attachment.unfrozen_backbone}

    def _switch(self, active: bool) -> None:
        own = self._attachment
        if self.merged:
            raise RuntimeError(f"delta {self.name!r} is merged into the weights. Call unmerge() first.")
        if own.active == active:
            raise RuntimeError(f"delta {self.name!r} is {'attached' if active else 'detached'} already.")
        attachments = [
            dataclasses.replace(a, active=active) if a.name == self.name else a for a in carried(self.backbone_model)
        ]
        params = self._adapter.params
        if params is not None:
            surgery.require_alive(params)
            flat, start = surgery.flatten(params), surgery.root(params)
            leaves = [(*start, *path) for path in own.leaves]
            keep = dict(self._borrowed(params))
            if not active:
                for path in leaves:
                    if path not in flat:
                        raise ValueError(
                            f"detach: model.params lacks {surgery.name_of(path)!r}. Set model.params to a tree "
                            "that holds the delta's leaves."
                        )
                keep.update({path: flat[path] for path in leaves})
                flat = {path: leaf for path, leaf in flat.items() if path not in set(leaves)}
            flat.update(self._kept)
            keep = {path: _copy(leaf) for path, leaf in keep.items()}
            self._adapter.params = surgery.unflatten(flat, like=params)
            self._kept = keep
        self._adapter.module = instrument(self._adapter.module, attachments)

    def _write_out(self, params: Tree | None, config: DeltaConfig) -> Tree:
        """Puts what the source makes into the tree in place of its parameters. `config` is then the delta's own."""
        own = self._attachment
        if own.generator is None or not own.active:
            raise ValueError(f"delta {self.name!r} {'is detached' if own.generator else 'has nothing to fold'}.")
        tree = self._values(params)
        untrained = self._is_untrained(tree)
        folded, written = self._written(tree)
        self._initial = _digests(surgery.parameters(folded), written.leaves) if untrained else None
        others = attachments_of(self._adapter.module)
        written = dataclasses.replace(written, config=config)
        self._adapter.module = instrument(self._adapter.module, [written if a.name == own.name else a for a in others])
        self.config = config
        self._shapes = surgery.shapes(_select(folded, written.leaves))
        if params is None and self._adapter.params is not None:
            self._adapter.params = folded
        return folded

    def _written(self, tree: Tree) -> tuple[Tree, Attachment]:
        """The tree with what the source makes in place of its parameters, and the attachment that goes with it."""
        own, start = self._attachment, surgery.root(tree)
        leaves = surgery.flatten(with_made({"params": surgery.parameters(tree)}, [own])["params"])
        leaves = {path: leaf for path, leaf in leaves.items() if path[0] != self.name}
        rest = {path: leaf for path, leaf in surgery.flatten(tree).items() if path[: len(start)] != start}
        written = surgery.unflatten(rest | {(*start, *path): leaf for path, leaf in leaves.items()}, like=tree)
        kept = tuple(path for path in own.leaves if path[0] != self.name)
        return written, dataclasses.replace(own, leaves=(*kept, *own.generated), generator=None, generated=())


def _changed_name(edit: CallEdit) -> str:
    """The name of the module that an edit changes: where its leaf trains, or its host."""
    return surgery.name_of((*edit.host, *edit.leaf)[:-1] if edit.where == "train" else edit.host)


def _select(tree: Tree, paths: Iterable[Path]) -> Tree:
    """The sub-tree of some leaves of the parameters."""
    flat, start = surgery.flatten(tree), surgery.root(tree)
    return surgery.unflatten({(*start, *path): flat[(*start, *path)] for path in paths})


def _digests(params: Tree, paths: Iterable[Path]) -> dict[Path, str]:
    """Path to digest of those leaves that hold values."""
    leaves = surgery.flatten(params)
    values = {path: meta.unbox(leaves[path]) for path in sorted(paths)}
    return {path: fingerprint.digest(value) for path, value in values.items() if _has_value(value)}


def _is_from_here(error: Exception) -> bool:
    """Whether code of jdelta raised it, whose messages name modules, and not the model's, a layer's or jax's."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]


def _has_value(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray)) and not isinstance(leaf, jax.core.Tracer)


def _kept_value(kept: Mapping[Path, Any], path: Path) -> Any:
    """The value that was kept of a leaf of the parameters, which may be in a tree of collections."""
    return meta.unbox(kept.get(path, kept.get(("params", *path))))


def _copy(leaf: Any) -> Any:
    """A copy that outlives the donation of the original."""
    return jax.tree.map(lambda a: jnp.array(a, copy=True) if isinstance(a, jax.Array) else a, leaf)
