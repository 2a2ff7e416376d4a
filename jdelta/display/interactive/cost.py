"""What a method would add at each module of a model: exact for every selection, without attaching anything."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from jdelta.core import attaching, placement, weights
from jdelta.core.arguments import is_array
from jdelta.core.edits import Attachment, CallEdit, Edit, WeightEdit
from jdelta.core.method import Method
from jdelta.core.state import DeltaState
from jdelta.core.structural_key import structural_key
from jdelta.core.structure import ModuleInfo
from jdelta.hosts.linen.instrument import instrument
from jdelta.trees import addressing, dtypes, surgery
from jdelta.trees.surgery import Path

Shapes = dict[Path, tuple[int, ...]]

# A source's leaves are taken to be constant or to grow with the hosts, as so many hosts of different shapes show it.
SAMPLE = 6


@dataclasses.dataclass(frozen=True)
class Costs:
    """Parameters that selections cost. A selection costs the union of its modules' items: what two modules share
    (a bias below both, a rule of all adapters) is one item.

    Attributes:
      items: for each item, how many parameters train, and how many are new.
      modules: name to the numbers of its items, of every module that can take the delta.
      reasons: name to the reason, of every other module.
      always: parameters that train whatever is chosen.
      total: parameters of the model as it is.
      exact: whether the sums are known to be exact.
    """

    items: Sequence[tuple[int, int]]
    modules: Mapping[str, Sequence[int]]
    reasons: Mapping[str, str]
    always: int
    total: int
    exact: bool = True

    def of(self, names: Iterable[str]) -> tuple[int, int]:
        """How many parameters train, and how many the model has, with the delta on these modules."""
        items = [self.items[i] for i in {i for name in names for i in self.modules[name]}]
        return self.always + sum(t for t, _ in items), self.total + sum(new for _, new in items)


def costs(state: DeltaState, exclude: Sequence[str] = ()) -> Costs:
    """What each module would cost.

    Args:
      state: a delta that is on no module yet; the `edits` of its method say what a module gets.
      exclude: patterns of modules that are left out.
    """
    structure, method = state.structure, state.method
    tree = surgery.flatten(surgery.parameters(state.host.tree()))
    sizes = {path: math.prod(meta.unbox(leaf).shape) for path, leaf in tree.items() if leaf is not surgery.empty_node}
    patterns = [p for p in method.unfrozen_modules or () if p != "deltas"]
    able = {p for p in sizes if not dtypes.is_fixed(tree[p])}
    unfrozen = {p for p in able if any(addressing.matches_at_or_above(surgery.name_of(p), q) for q in patterns)}

    others = state.host.attachments
    measure = _Measure(state)
    leaves: dict[str, Shapes] = {}
    borrowed: dict[str, list[Path]] = {}
    reasons: dict[str, str] = {}
    for info in structure:
        if not info.name:
            reasons[info.name] = "The whole model has no name to choose it by."
        elif any(addressing.matches_at_or_above(info.name, pattern) for pattern in exclude):
            reasons[info.name] = "It is left out by exclude_modules."
        else:
            try:
                wanted = {attaching.place(edit): edit for edit in _edits_at(state, info)}
                if not wanted:
                    raise TypeError(f"It holds nothing that {state.label} changes.")
                if not (edits := placement.without_excluded(state, wanted.values())):
                    raise TypeError("All that would change in it is left out by exclude_modules.")
                attaching.check(state, edits, others)
                leaves[info.name] = measure(info, edits)
                borrowed[info.name] = [
                    (*edit.host, *edit.leaf) for edit in edits if isinstance(edit, CallEdit) and edit.where == "train"
                ]
            except (TypeError, ValueError) as error:
                reasons[info.name] = _sentence(str(error))

    table = _Table()
    source, exact = _source_items(state, leaves)
    for name, own in leaves.items():
        made = source[name].made if name in source else frozenset()
        for path, shape in own.items():
            if path not in made:
                table.add(name, path, 0 if method.frozen(path) else math.prod(shape), math.prod(shape))
        for key, path, size in source[name].items if name in source else ():
            table.add(name, key, 0 if method.frozen(path) else size, size)
        for path in borrowed[name]:
            table.add(name, path, 0 if path in unfrozen else sizes[path], 0)
    always = sum(sizes[path] for path in unfrozen)
    return Costs(table.items, table.modules, reasons, always, sum(sizes.values()), exact)


def _edits_at(state: DeltaState, info: ModuleInfo) -> list[Edit]:
    return [placement.named(edit, state.name, state.structure) for edit in state.method.edits(info, state.structure)]


class _Table:
    """Numbers the items."""

    def __init__(self) -> None:
        self.items: list[tuple[int, int]] = []
        self.modules: dict[str, list[int]] = {}
        self._numbers: dict[Any, int] = {}

    def add(self, name: str, key: Any, trains: int, new: int) -> None:
        if key not in self._numbers:
            self._numbers[key] = len(self.items)
            self.items.append((trains, new))
        self.modules.setdefault(name, []).append(self._numbers[key])


# --- the leaves of one module's layers


class _Measure:
    """Shapes of the leaves that edits at a host make, by an abstract run of the layers; once for equal ones."""

    def __init__(self, state: DeltaState):
        self._state = state
        self._known: dict[Any, list[Shapes] | Exception] = {}
        self._alive: list[Any] = []  # keys can hold ids of parts of these

    def __call__(self, info: ModuleInfo, edits: Sequence[Edit]) -> Shapes:
        self._alive.append(edits)
        found = self._of_layers(info, [edit for edit in edits if isinstance(edit, CallEdit)])
        for edit in edits:
            if isinstance(edit, WeightEdit) and not edit.is_bias:
                leaf = self._leaves[edit.leaf]
                key = (structural_key(edit.rule), edit.linear, edit.shape, leaf.shape)
                (row,) = self._once(key, functools.partial(_rule_shapes, edit, leaf))
                found |= {(*edit.own_path, *path): shape for path, shape in row.items()}
        return found

    @functools.cached_property
    def _leaves(self) -> dict[Path, Any]:
        return surgery.flatten(meta.unbox(surgery.parameters(self._state.structure.params)))

    def _of_layers(self, info: ModuleInfo, edits: Sequence[CallEdit]) -> Shapes:
        found: Shapes = {}
        outside = [edit for edit in edits if edit.layer is not None and edit.where in ("around", "replace")]
        if outside:
            rows = self._once(
                (structural_key(info), *(structural_key(e, info.path) for e in edits)), lambda: self._run(info, edits)
            )
            for edit, row in zip(edits, rows, strict=True):
                found |= {(*edit.host, *edit.leaf, *path): self._with_axes(edit, shape) for path, shape in row.items()}
            return found
        for edit in edits:
            if edit.layer is None:
                continue
            host = self._state.structure.modules[surgery.name_of(edit.host)]
            start = self._state.structure.modules[
                surgery.name_of(edit.host if edit.span_input is None else edit.span_input)
            ]
            x, y = (start.x if edit.where in ("before", "parallel") else host.y), host.y
            wanted = x.shape if edit.where == "before" else y.shape
            key = (structural_key(edit.layer), x.shape, x.dtype, wanted)
            (row,) = self._once(key, functools.partial(_layer_shapes, edit.layer, x, wanted))
            found |= {(*edit.host, *edit.leaf, *path): self._with_axes(edit, shape) for path, shape in row.items()}
        return found

    def _once(self, key: Any, make: Callable[[], list[Shapes]]) -> list[Shapes]:
        if key not in self._known:
            try:
                self._known[key] = make()
            except (TypeError, ValueError) as error:
                self._known[key] = error
        known = self._known[key]
        if isinstance(known, Exception):
            raise known
        return known

    def _run(self, info: ModuleInfo, edits: Sequence[CallEdit]) -> list[Shapes]:
        """The host is run by itself; if it cannot be, in its model."""
        start = info.path if all(edit.host[: len(info.path)] == info.path for edit in edits) else ()
        try:
            tree = _host_alone(info, [_moved(edit, start) for edit in edits], self._state.name)
            axes: dict[Path, tuple[int, ...]] = {}
        except Exception:
            start, axes = (), self._axes
            tree = self._in_model(edits)
        leaves = surgery.flatten(surgery.parameters(tree))
        rows = []
        for edit in edits:
            at = (*edit.host[len(start) :], *edit.leaf)
            skip = len(axes.get(edit.host, ()))
            own = {p: leaf for p, leaf in leaves.items() if p[: len(at)] == at and edit.layer is not None}
            rows.append({p[len(at) :]: tuple(leaf.shape[skip:]) for p, leaf in own.items()})
        return rows

    def _in_model(self, edits: Sequence[CallEdit]) -> Any:
        others = [a for a in self._state.host.attachments if a.active]
        mine = Attachment(self._state.name, tuple(edits))
        try:
            return jax.eval_shape(lambda key: self._state.host.init([*others, mine], key), jax.random.key(0))
        except Exception as error:  # whatever the model's own code says to such a layer is the reason
            raise ValueError(str(error)) from error

    def _with_axes(self, edit: CallEdit, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*self._axes.get(edit.host, ()), *shape)

    @functools.cached_property
    def _axes(self) -> dict[Path, tuple[int, ...]]:
        """Axes that lifted transforms (`nn.scan`) put before the leaves of the modules inside them."""
        structure = self._state.structure
        leaves = surgery.flatten(meta.unbox(surgery.parameters(structure.params)))
        if all(leaves[(*i.path, key)].shape == leaf.shape for i in structure for key, leaf in i.params.items()):
            return {}
        edits = tuple(CallEdit(info.path, "around", _Mark(), leaf=(self._state.name,)) for info in structure)
        mine = Attachment(self._state.name, edits)
        tree = jax.eval_shape(lambda key: self._state.host.init([mine], key), jax.random.key(0))
        marks = surgery.flatten(surgery.parameters(tree))
        return {path[:-2]: leaf.shape for path, leaf in marks.items() if path[-2:] == (self._state.name, "mark")}


class _Mark(nn.Module):
    """A scalar parameter at a host."""

    @nn.nowrap
    def __call__(self, host: Callable, *args: Any, **kwargs: Any) -> Any:
        self.mark()
        return host(*args, **kwargs)

    @nn.compact
    def mark(self) -> None:
        self.param("mark", nn.initializers.zeros, ())


def _layer_shapes(layer: nn.Module, x: jax.ShapeDtypeStruct, wanted: tuple[int, ...]) -> list[Shapes]:
    names = inspect.signature(type(layer).__call__).parameters
    mode: dict[str, Any] = (
        {"deterministic": True} if "deterministic" in names else {"train": False} if "train" in names else {}
    )
    y, variables = jax.eval_shape(lambda x: layer.init_with_output(_rngs(), x, **mode), x)
    if y.shape != wanted:
        raise ValueError(f"its layer {type(layer).__name__} gives shape {y.shape} where {wanted} is needed.")
    return [{path: leaf.shape for path, leaf in surgery.flatten(variables.get("params", {})).items()}]


def _rule_shapes(edit: WeightEdit, leaf: jax.ShapeDtypeStruct) -> list[Shapes]:
    own = jax.eval_shape(lambda key, leaf: weights.init(edit, key, leaf), jax.random.key(0), leaf)
    return [{(name,): value.shape for name, value in own.items()}]


def _host_alone(info: ModuleInfo, edits: Sequence[CallEdit], name: str) -> Any:
    module = instrument(info.type(**info.fields, parent=None), [Attachment(name, tuple(edits))])
    leaves, treedef = jax.tree.flatten((info.args, info.kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if is_array(leaf)}

    def run(arrays: dict[int, jax.Array]) -> Any:
        args, kwargs = jax.tree.unflatten(treedef, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        return module.init(_rngs(), *args, **kwargs)

    return jax.eval_shape(run, arrays)


def _moved(edit: CallEdit, start: Path) -> CallEdit:
    return dataclasses.replace(edit, host=edit.host[len(start) :])


def _rngs() -> dict[str, jax.Array]:
    return {"params": jax.random.key(0), "dropout": jax.random.key(1)}


# --- what hosts share


@dataclasses.dataclass(frozen=True)
class _Source:
    """A host's part in what `shared` makes: `(key, leaf, size)` of each item, and the leaves that are made of it."""

    items: list[tuple[Any, Path, int]]
    made: frozenset[Path]


def _source_items(state: DeltaState, leaves: Mapping[str, Shapes]) -> tuple[dict[str, _Source], bool]:
    """Of each host that has one, and whether the sums are exact."""
    method = state.method
    if type(method).generator is Method.generator:
        return {}, True
    alone: dict[str, dict[Path, int]] = {}
    made: dict[str, frozenset[Path]] = {}
    known: dict[Any, tuple[dict[Path, int], list[int]]] = {}
    for name, shapes in leaves.items():
        depth = name.count(".") + 1
        kind = tuple((path[depth:], shape) for path, shape in shapes.items())
        if kind not in known:
            sizes, paths = _source_sizes(method, shapes)
            known[kind] = sizes, [i for i, path in enumerate(shapes) if path in paths]
        if known[kind][0]:
            order = list(shapes)
            alone[name], made[name] = known[kind][0], frozenset(order[i] for i in known[kind][1])
    sample = list({tuple(sorted(alone[name].items())): name for name in alone}.values())
    sample = [*sample, *(name for name in alone if name not in sample)][:SAMPLE]
    together, _ = _source_sizes(method, {p: s for name in sample for p, s in leaves[name].items()})
    grows, exact = set(), True
    for path, size in together.items():
        parts = [alone[name][path] for name in sample if path in alone[name]]
        if len(parts) > 1 and sum(parts) == size:
            grows.add(path)
        elif not parts or set(parts) != {size}:
            exact = False
            grows.add(path)
    found = {
        name: _Source(
            [((state.name, *p, name) if p in grows else (state.name, *p), (state.name, *p), n) for p, n in own.items()],
            made[name],
        )
        for name, own in alone.items()
    }
    return found, exact


def _source_sizes(method: Method, shapes: Shapes) -> tuple[dict[Path, int], set[Path]]:
    """Sizes of the source's own parameters for these leaves, and which of them it makes."""
    source = method.generator({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()})
    if source is None:
        return {}, set()
    output, variables = jax.eval_shape(source.init_with_output, jax.random.key(0))
    sizes = {path: math.prod(leaf.shape) for path, leaf in surgery.flatten(variables["params"]).items()}
    return sizes, set(output)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def format_arguments(method: Method) -> str:
    """The method's own arguments that differ from their defaults: `'lora_r=4'`."""
    common = {"modified_modules", "exclude_modules", "common_structure"}
    fields = [f for f in dataclasses.fields(method) if f.name not in common]
    given = [(f.name, getattr(method, f.name)) for f in fields if getattr(method, f.name) != f.default]
    return ", ".join(itertools.starmap("{}={!r}".format, given))
