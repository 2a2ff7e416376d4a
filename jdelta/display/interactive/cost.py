"""What a method would add at each module of a model: exact for every selection, without attaching anything."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from jdelta.core import attaching, placement, weights
from jdelta.core.arguments import is_array, main_output
from jdelta.core.edits import Attachment, CallEdit, Edit, WeightEdit
from jdelta.core.host import Trial
from jdelta.core.method import Method
from jdelta.core.state import DeltaState
from jdelta.core.structure import ModuleInfo
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
    made_at: dict[str, list[Edit]] = {}
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
                if not (edits := placement.without_excluded(state.method, state.structure, wanted.values())):
                    raise TypeError("All that would change in it is left out by exclude_modules.")
                attaching.check(state, edits, others)
                made_at[info.name] = edits
                borrowed[info.name] = [
                    (*edit.host, *edit.leaf) for edit in edits if isinstance(edit, CallEdit) and edit.where == "train"
                ]
            except (TypeError, ValueError) as error:
                reasons[info.name] = _sentence(str(error))

    leaves, failed = _measured(state, made_at)
    reasons |= {name: _sentence(reason) for name, reason in failed.items()}
    table = _Table()
    exact = _add_own(table, state, leaves)
    for name in leaves:
        for path in borrowed[name]:
            table.add(name, path, 0 if path in unfrozen else sizes[path], 0)
    always = sum(sizes[path] for path in unfrozen)
    return Costs(table.items, table.modules, reasons, always, sum(sizes.values()), exact)


def parameter_costs(state: DeltaState, exclude: Sequence[str] = ()) -> Costs:
    """What each parameter would cost, by its name.

    Args:
      state: a delta that is on no module yet; the `parameter_edits` of its method say what a parameter gets.
      exclude: patterns of modules and parameters that are left out.
    """
    structure, method, leaves = state.structure, state.method, state.structure.leaves
    table, reasons, own = _Table(), {}, {}
    for parameter in structure.parameters:
        try:
            if any(addressing.matches_at_or_above(parameter.name, pattern) for pattern in exclude):
                raise ValueError("It is left out by exclude_modules.")
            made = [placement.named(e, state.name, structure) for e in method.parameter_edits(parameter, structure)]
            attaching.check(state, made, state.host.attachments)
            shapes: Shapes = {}
            for edit in made:
                if isinstance(edit, WeightEdit) and not edit.is_bias:
                    init = functools.partial(weights.init, edit)
                    for name, leaf in jax.eval_shape(init, jax.random.key(0), meta.unbox(leaves[edit.leaf])).items():
                        shapes[*edit.own_path, name] = leaf.shape
            own[parameter.name] = shapes
        except (TypeError, ValueError) as error:
            reasons[parameter.name] = _sentence(str(error))
    exact = _add_own(table, state, own)
    total = sum(math.prod(meta.unbox(leaf).shape) for leaf in leaves.values() if leaf is not surgery.empty_node)
    return Costs(table.items, table.modules, reasons, 0, total, exact)


def _add_own(table: _Table, state: DeltaState, leaves: Mapping[str, Shapes]) -> bool:
    """Adds the delta's own leaves at each module, or parameter; returns whether the sums are exact."""
    method = state.method
    source, exact = _source_items(state, leaves)
    for name, own in leaves.items():
        made = source[name].made if name in source else frozenset()
        items = [(path, path, math.prod(shape)) for path, shape in own.items() if path not in made]
        for key, path, size in [*items, *(source[name].items if name in source else ())]:
            never = method.frozen(path) or method.regenerated(path)
            table.add(name, key, 0 if never else size, size)
    return exact


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


# --- the leaves that edits make


def _measured(state: DeltaState, wanted: Mapping[str, Sequence[Edit]]) -> tuple[dict[str, Shapes], dict[str, str]]:
    """Shapes of the leaves that the edits at each module make; and name to the reason, where the model does not run.

    One abstract run of the model with the edits of all modules tells the shapes. Where it fails, halves of them are
    run, down to the modules that it fails with; others of the same class and shapes then have the same reason.
    """
    found: dict[str, Shapes] = {}
    reasons: dict[str, str] = {}
    alike: dict[Any, str] = {}
    pending = [list(wanted)]
    while pending:
        names = []
        for name in pending.pop():
            reason = alike.get(_kind(state.structure[name])) if alike else None
            names += [] if reason else [name]
            reasons |= {name: reason} if reason else {}
        try:
            leaves = _run(state, [edit for name in names for edit in wanted[name]]) if names else {}
        except Exception as error:  # whatever the model's own code says to such a layer is the reason
            if len(names) > 1:
                pending += [names[len(names) // 2 :], names[: len(names) // 2]]
            else:
                reasons[names[0]] = alike[_kind(state.structure[names[0]])] = str(error)
        else:
            found |= {name: _leaves_of(wanted[name], leaves) for name in names}
    return {name: found[name] for name in wanted if name in found}, reasons


def _run(state: DeltaState, edits: Sequence[Edit]) -> dict[Path, Any]:
    """Path to shape of all leaves, by an abstract run of the model with these edits."""
    mine = Attachment(state.name, tuple({attaching.place(edit): edit for edit in edits}.values()))
    attachments, trial = [*(a for a in state.host.attachments if a.active), mine], Trial()
    tree = jax.eval_shape(lambda key: state.host.init(attachments, key, trial), jax.random.key(0))
    attaching.require_same_backbone(state, tree)
    now, before = map(_output_shape, (trial.outputs[0], state.structure[""].output))
    if now != before:
        raise ValueError(f"with its layer the model's output has shape {now}, where {before} is needed.")
    return surgery.flatten(meta.unbox(surgery.parameters(tree)))


def _output_shape(output: Any) -> Any:
    try:
        return tuple(main_output(output).shape)
    except TypeError:  # none of several arrays is the output
        return [tuple(leaf.shape) for leaf in jax.tree.leaves(output) if is_array(leaf)]


def _leaves_of(edits: Sequence[Edit], leaves: Mapping[Path, Any]) -> Shapes:
    """The leaves of some edits, below the places where theirs lie."""
    found: Shapes = {}
    for edit in edits:
        if isinstance(edit, CallEdit) and edit.layer is None:
            continue
        at = edit.own_path if isinstance(edit, WeightEdit) else (*edit.host, *edit.leaf)
        found |= {path: tuple(leaf.shape) for path, leaf in leaves.items() if path[: len(at)] == at}
    return found


def _kind(info: ModuleInfo) -> Any:
    """What modules have in common that take a layer alike."""
    return info.type, tuple(leaf.shape for leaf in info.params.values()), *(_shape(info, side) for side in "xy")


def _shape(info: ModuleInfo, side: str) -> Any:
    try:
        return getattr(info, side).shape
    except TypeError:
        return None


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
