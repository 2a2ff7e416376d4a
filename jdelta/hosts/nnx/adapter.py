"""An nnx module as a backbone: it is changed in place."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdelta.core import weights
from jdelta.core.arguments import is_array
from jdelta.core.edits import Attachment
from jdelta.core.generators import without_generated
from jdelta.core.host import Cache, Trial
from jdelta.core.structure import Structure
from jdelta.hosts.nnx import bridge, graph, placing
from jdelta.hosts.nnx.creating import Initialiser, Place, creating, key_at, over_layers
from jdelta.hosts.nnx.installing import put_on, share
from jdelta.hosts.nnx.recording import layers_at, record
from jdelta.hosts.nnx.running import trying
from jdelta.hosts.nnx.swapping import class_of, give, role_of
from jdelta.trees import surgery
from jdelta.trees.surgery import Path, Tree
from jdelta.trees.variables import DeltaParam

DummyInputs = Sequence[Any] | Mapping[str, Any]


class _Record:
    """What is known of a model besides what is on it: as long as the model lives."""

    def __init__(self) -> None:
        self.detached: tuple[Attachment, ...] = ()  # what it carries, while none of that is active
        self.dummy_inputs: DummyInputs | None = None
        self.dropouts: dict[Path, graph.Leaves] = {}  # see `put_on`


_records: dict[int, _Record] = {}  # by the identity of the model, which need not be hashable
# Held by adapters, as they hold the model: static attributes that a trace saw, such as bound methods, may refer to it.
_caches: weakref.WeakValueDictionary[int, Cache] = weakref.WeakValueDictionary()


def _record_of(model: nnx.Module, known: _Record | None = None) -> _Record:
    """The record of a model; if it has none, this one, or a new one."""
    if id(model) not in _records:
        _records[id(model)] = known or _Record()
        weakref.finalize(model, _records.pop, id(model), None)
    return _records[id(model)]


class NnxAdapter:
    """A `jdelta.core.host.HostAdapter` on an nnx module.

    What the model carries is in the role of its root; while nothing is active, beside the model, so that its graph is
    that of the bare one.

    Args:
      model: the module.
      dummy_inputs: arguments of one call, a tuple or a dict of keywords. Only shapes and dtypes count. Those that were
        given for the model before are remembered.

    Attributes:
      cache: what the newest traces found.

    Raises:
      TypeError: they are neither.
      ValueError: there are none, and none can be guessed; or the model carries LoRA of another library, or deltas of
        another model that it is a part of, or that are on a part of it.
    """

    source_repo: str = ""

    def __init__(self, model: nnx.Module, dummy_inputs: DummyInputs | None = None):
        self.model = model
        self._record, self.cache = _record_of(model), _caches.setdefault(id(model), Cache())
        if dummy_inputs is not None and not isinstance(dummy_inputs, (tuple, list, Mapping)):
            raise TypeError(
                f"dummy_inputs are the arguments of one call, a tuple or a dict, got {type(dummy_inputs).__name__}: "
                "write (x,)."
            )
        self._require_own()
        given, before = _shapes(dummy_inputs), self._record.dummy_inputs
        if given is not None and given != before:
            self.cache.pop("structure", None)
            self._record.dummy_inputs = given
            try:
                self.structure()
            except BaseException:
                self._record.dummy_inputs = before
                raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle, whose model is one too: others that are attached to that find the same record."""
        vars(self).update(state)
        self._record = _record_of(self.model, self._record)
        self.cache = _caches.setdefault(id(self.model), self.cache)

    # --- what it is

    @property
    def class_name(self) -> str:
        """The name of the model's class."""
        return class_of(self.model).__name__

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """See `HostAdapter`."""
        role = role_of(self.model)
        return self._record.detached if role is None else role.edits.attachments

    @property
    def params(self) -> Tree:
        """The values of all parameters, those of deltas too."""
        return graph.nested({path: leaf.get_raw_value() for path, leaf in graph.variables(self.model).items()})

    @params.setter
    def params(self, tree: Tree) -> None:
        self._require_level()
        have, modules = graph.variables(self.model), graph.modules(self.model)
        wanted = {path: leaf for path, leaf in surgery.flatten(tree).items() if leaf is not surgery.empty_node}
        names = {a.name for a in self.attachments}
        self._record.dropouts |= {at: held for at, held in graph.dropouts(modules).items() if at[-1] in names}
        gone = [path for path in have if path not in wanted]
        if lacking := next((path for path in gone if graph.is_of_model(have[path])), None):
            raise ValueError(f"the tree lacks {surgery.name_of(lacking)!r}, which {self.class_name} needs.")
        for path in gone:
            at = _place(path, modules)
            graph.take_out(modules[path[:at]], path[at:])
        new, metadata = set[Path](), placing.metadata_of_new(self.model)
        for path, value in wanted.items():
            if path in have:
                if (before := have[path].get_raw_value()) is not value:
                    have[path].set_raw_value(placing.as_before(value, before))
                continue
            at = _place(path, modules)
            if names.intersection(path[at:-1]):
                graph.put(modules[path[:at]], path[at:], value, **metadata)
                new.add(path)
            else:
                graph.add(modules[path[:at]], path[-1], value)
        if {path for path in have.keys() ^ wanted.keys() if not names.intersection(path)}:
            self.install(self.attachments)  # parameters of modules' own came or went
        share(self.model, self.attachments)
        if new:
            placing.place(self.model, self.attachments, self.structure(), new)

    def tree(self) -> Tree:
        """See `HostAdapter`."""
        return self.params

    def held_tree(self) -> Tree:
        """See `HostAdapter`."""
        return nnx.state(self.model)

    def remember_tree(self, tree: Tree) -> None:
        """See `HostAdapter`. The model has its tree itself."""

    # --- what it carries

    def install(self, attachments: Sequence[Attachment]) -> None:
        """See `HostAdapter`."""
        self._require_level()
        names = {a.name for a in attachments}
        dropouts = {path: held for path, held in self._record.dropouts.items() if path[-1] in names}
        put_on(self.model, attachments, self.structure() if attachments else None, dropouts)
        self._record.dropouts = dropouts
        self._record.detached = tuple(attachments)

    def uninstall(self) -> None:
        """See `HostAdapter`."""
        self.install(())

    def snapshot(self) -> Callable[[], None]:
        """See `HostAdapter`."""
        attachments, params = self.attachments, self.params

        def restore() -> None:
            self.install(attachments)
            self.params = params

        return restore

    # --- runs

    def structure(self) -> Structure:
        """See `HostAdapter`."""
        return self.cache.find("structure", self._record, self._recorded)

    def _recorded(self) -> Structure:
        bare = self._bare()
        params = graph.nested({path: _shape(leaf.get_raw_value()) for path, leaf in graph.variables(bare).items()})
        tried, problem = self._record.dummy_inputs, None
        for inputs in _GUESSED if tried is None else [tried]:
            try:
                recorder = record(bare, functools.partial(_call, inputs=inputs))
            except Exception as error:  # whatever the model's own code raises
                problem = problem or error
            else:
                self._record.dummy_inputs = inputs
                return recorder.structure(bare, params)
        if tried is None:
            raise ValueError(
                f"{self.class_name} takes neither the pseudo input [[0, 0, 0]] nor [0, 0, 0]. Say what it takes, for "
                "example dummy_inputs=(jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),)."
            ) from problem
        shapes = jax.tree.map(lambda a: a.shape if is_array(a) else a, tried)
        raise ValueError(f"the dummy inputs of shapes {shapes} do not fit {self.class_name}: {problem}") from problem

    def init(self, attachments: Sequence[Attachment], rng: chex.PRNGKey, trial: Trial | None = None) -> Tree:
        """See `HostAdapter`."""
        structure, held = self.structure(), graph.variables(self.model)
        backbone = {path: _as_array(held[path].get_raw_value()) for path in structure.leaves}
        own = {
            (*edit.own_path, name): leaf
            for attachment in attachments
            for edit in (attachment.weight_edits if attachment.active else ())
            if not edit.is_bias
            for name, leaf in weights.init(edit, rng, backbone[edit.leaf]).items()
        }
        for (host, leaf), initialise in self._initialisers(attachments, own).items():
            below = over_layers(initialise, *layers_at(structure, host))(key_at(rng, (*host, *leaf)))
            own |= {(*host, *leaf, *path): value for path, value in surgery.flatten(below).items()}
        everything = {"params": graph.nested(backbone | own)}
        tree: Tree = without_generated(everything, attachments, {"params": rng})["params"]
        if trial is not None:
            zeros = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in backbone.items()}
            graphdef, state = self._split()
            state = jax.tree.map(_zeros_for_shape, state)  # its statistics and keys may be shapes
            with trying(trial):
                trial.outputs.append(self._run(graphdef, state, attachments, surgery.flatten(tree) | zeros))
        return tree

    def _initialisers(self, attachments: Sequence[Attachment], own: Mapping[Path, Any]) -> dict[Place, Initialiser]:
        """How the leaves of the layers of attachments are made, by a run of the model."""
        if not any(a.active and any(edit.layer is not None for edit in a.call_edits) for a in attachments):
            return {}
        edits = tuple(edit for a in attachments if a.active for edit in a.edits)
        newest = self.cache.get("initialisers")
        if newest is not None and _are_same(newest[0], edits):
            return newest[1]
        shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in own.items()}
        drafts = [dataclasses.replace(a, leaves=(), generated=(), generator=None) for a in attachments]
        graphdef, state = self._split()
        with creating() as found:
            jax.eval_shape(lambda state, own: self._run(graphdef, state, drafts, own), state, shapes)
        self.cache["initialisers"] = (edits, found)
        return found

    @contextlib.contextmanager
    def variant(self, attachments: Sequence[Attachment]) -> Iterator[Callable[[Tree], tuple[Any, Callable[..., Any]]]]:
        """See `HostAdapter`."""
        graphdef, state = self._split()

        def made(params: Tree) -> tuple[Any, Callable[..., Any]]:
            copy = self._copy(graphdef, state, attachments, surgery.parameters_of(params))
            return copy, copy

        yield made

    def _run(
        self, graphdef: Any, state: nnx.State, attachments: Sequence[Attachment], leaves: Mapping[Path, Any]
    ) -> Any:
        """Runs such a copy on the model's pseudo input."""
        return _call(self._copy(graphdef, state, attachments, leaves), self._record.dummy_inputs)

    def _copy(
        self, graphdef: Any, state: nnx.State, attachments: Sequence[Attachment], leaves: Mapping[Path, Any]
    ) -> Any:
        """A copy of the model with attachments, and with other values of some leaves."""
        copy = nnx.merge(graphdef, state, copy=True)
        modules, have = graph.modules(copy), graph.variables(copy)
        for path, leaf in leaves.items():
            if path in have:
                have[path].set_raw_value(leaf)
            else:
                at = _place(path, modules)
                graph.put(modules[path[:at]], path[at:], leaf)
        put_on(copy, attachments, self.structure(), apart=True)
        return copy

    def _bare(self) -> nnx.Module:
        """A copy of the model without deltas, which has the same arrays."""
        copy = nnx.merge(*nnx.split(self.model))
        for module in graph.modules(copy).values():
            give(module, None)
            for path in bridge.deltas(module) if isinstance(module, bridge.Bridged) else ():
                graph.take_out(module, path)
            for name in [name for name, value in vars(module).items() if isinstance(value, graph.Leaves)]:
                graph.delete(module, name)
        return copy

    def _split(self) -> tuple[Any, nnx.State]:
        return nnx.split(self._bare())

    # --- what can be wrong

    def _require_own(self) -> None:
        """Raises `ValueError` if the model carries what this host does not run."""
        self._require_level()
        for path, variable in graph.variables(self.model).items():
            if isinstance(variable, nnx.LoRAParam) and not isinstance(variable, DeltaParam):
                raise ValueError(
                    f"{self.class_name} carries LoRA already, which is not jdelta's: {surgery.name_of(path)!r} is an "
                    f"nnx.{type(variable).__name__}, as nnx.LoRA and qwix make them. Build the model without it, or "
                    "merge it into the weights."
                )
        of_root = {path: role.edits.attachments for path, module in self._modules if (role := role_of(module))}
        if any(of_root.get((), ())):
            inside = [path for path, attachments in of_root.items() if path and attachments]
        else:
            inside = [path for path, attachments in of_root.items() if attachments]
            if of_root and not inside:
                raise ValueError(
                    f"this {self.class_name} is a part of a model that carries deltas, at "
                    f"{surgery.name_of(next(iter(of_root))) or 'itself'}. Attach to that model."
                )
        if inside:
            raise ValueError(
                f"{surgery.name_of(inside[0])!r} of this {self.class_name} carries deltas that were attached to it "
                "alone. Remove them, and attach to the whole model."
            )
        bare = self._bare()
        signature = nnx.graphdef(bare), tuple(v.get_raw_value().shape for v in graph.variables(bare).values())
        if self.cache.get("signature", signature) != signature:
            self.cache.clear()
        self.cache["signature"] = signature

    @property
    def _modules(self) -> Iterable[tuple[Path, nnx.Module]]:
        return graph.modules(self.model).items()

    def _require_level(self) -> None:
        """Raises `RuntimeError` while a function is traced, which runs a copy of the model."""
        state: Any = self.model._pytree__state  # private API of nnx; a test of attaching inside nnx.jit notices
        values = [leaf for v in graph.variables(self.model).values() for leaf in jax.tree.leaves(v.get_raw_value())]
        if not state.trace_state.is_valid() or any(isinstance(leaf, jax.core.Tracer) for leaf in values):
            raise RuntimeError(
                f"{self.class_name} is changed while a function is traced, as by nnx.jit or nnx.grad, which runs a "
                "copy of the model. Attach, detach and disable deltas, and load values, outside of it."
            )


# --- values


def _place(path: Path, modules: Mapping[Path, nnx.Module]) -> int:
    """How much of the path of a leaf is that of the innermost module around it."""
    return max(i for i in range(len(path)) if path[:i] in modules)


def _as_array(value: Any) -> Any:
    """A value, or an array of its shape that takes no memory."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return np.broadcast_to(np.zeros((), value.dtype), value.shape)
    return value


def _zeros_for_shape(value: Any) -> Any:
    """Zeros, or keys, in place of a shape; in a function that is traced without computing they take no memory."""
    if not isinstance(value, jax.ShapeDtypeStruct):
        return value
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), value.shape) if value.shape else jax.random.key(0)
    return jnp.zeros(value.shape, value.dtype)


def _shape(value: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def _shapes(inputs: DummyInputs | None) -> DummyInputs | None:
    """Shapes in place of arrays, which are not kept."""
    found: DummyInputs | None = jax.tree.map(lambda a: _shape(a) if is_array(a) else a, inputs)
    return found


def _call(model: nnx.Module, inputs: Any) -> Any:
    given = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype) if is_array(a) else a, inputs)
    call: Any = model
    return call(**given) if isinstance(given, Mapping) else call(*given)


def _are_same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


_GUESSED = ((jax.ShapeDtypeStruct((1, 3), jnp.int32),), (jax.ShapeDtypeStruct((3,), jnp.int32),))
