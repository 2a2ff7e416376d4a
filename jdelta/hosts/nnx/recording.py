"""Records one abstract run of an nnx model: its modules as the tensors flow through them."""

from __future__ import annotations

import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import tracers

from jdelta.core.arguments import is_array
from jdelta.core.linear_maps import scanned_axes
from jdelta.core.standalone import Standalone
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.hosts.nnx import bridge, graph
from jdelta.hosts.nnx.standalone import standalone
from jdelta.hosts.nnx.swapping import class_of, give
from jdelta.trees import surgery
from jdelta.trees.surgery import Path, Tree

_NOT_CALLED = (
    "no call of it was seen. It only holds parameters or other modules, or it is run by other methods than __call__."
)

_LAYERS = "axes of layers"

_recorder: contextvars.ContextVar[Recorder] = contextvars.ContextVar("recorder")


def record(model: nnx.Module, run: Callable[[nnx.Module], Any]) -> Recorder:
    """Records a run of a bare model: nothing is computed, no array is allocated.

    Args:
      model: it does not change.
      run: calls it on its pseudo input.
    """
    graphdef, state = nnx.split(model)
    recorder = Recorder()

    def recorded(state: Any) -> None:
        copy = nnx.merge(graphdef, state, copy=True)
        for path, module in graph.modules(copy).items():
            give(module, _Recorded(path))
        run(copy)

    token = _recorder.set(recorder)
    try:
        jax.eval_shape(recorded, state)
    finally:
        _recorder.reset(token)
    return recorder


class Layers(NamedTuple):
    """Axes that the leaves of a module have and it does not see, since it runs in a scan; outermost last."""

    axes: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


def layers_at(structure: Structure, path: Path) -> Layers:
    """The axes of layers that a leaf at a module has."""
    found: Layers = structure.derived[_LAYERS].get(path, Layers())
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Recorded:
    """The role of a module in a recorded run. It is equal to itself alone, so that no trace is shared."""

    path: Path
    reads: bool = True

    def run(self, module: nnx.Module, name: str, call: Callable, args: tuple, kwargs: dict) -> Any:
        return _recorder.get().run(self.path, module, name, call, args, kwargs)

    def read(self, module: nnx.Module, name: str, variable: nnx.Variable) -> nnx.Variable:
        _recorder.get().note_read(self.path, variable)
        return variable


class Recorder:
    """What was seen."""

    def __init__(self) -> None:
        self._seen: dict[Path, ModuleInfo | None] = {}
        self._by_method: dict[tuple[Path, str], ModuleInfo] = {}
        self._methods: dict[Path, dict[str, Path | None]] = {}  # of what was run by others than __call__: by whom
        self._stack: list[tuple[Path, str]] = []  # the functions in progress
        self._read: set[Path] = set()  # modules whose parameters others read
        self._traces: dict[Path, tracers.TraceState] = {}  # in which a module was called
        self._bridged: dict[Path, tuple[Structure, dict[Path, Any]]] = {}  # what ran in an nnx.bridge.ToNNX

    def run(self, path: Path, module: nnx.Module, name: str, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Runs a function of a module, and notes what it took and returned."""
        outer = self._stack[-1][0] if self._stack else None
        inside = any(path == other for other, _ in self._stack)  # super().__call__, or a helper of its own
        self._stack.append((path, name))
        try:
            if name == "__call__" and not inside:
                self._seen.setdefault(path, None)  # the order is that of entering
                self._traces.setdefault(path, tracers.TraceState())
            if name == "__call__" and not inside and isinstance(module, bridge.Bridged):
                output, found = bridge.record(module, call, args, kwargs)
                shapes = {p: _abstract(v.get_raw_value()) for p, v in graph.variables(module).items()}
                self._bridged[path] = found, shapes
            else:
                output = call(*args, **kwargs)
        finally:
            self._stack.pop()
        if name == "__call__" and not inside:
            caller = self._caller(outer)
            self._seen[path] = info = self._info(path, module, args, kwargs, output, self._seen[path], caller)
            for each in self._bridged[path][0] if path in self._bridged else ():
                inner = bridge.below(path, each, caller)
                self._seen[inner.path] = dataclasses.replace(inner, calls=inner.calls * info.calls)
        elif not inside:
            self._methods.setdefault(path, {})[name] = outer
            self._traces.setdefault(path, tracers.TraceState())
            self._by_method[path, name] = self._info(path, module, args, kwargs, output, None, outer)
        return output

    def note_read(self, path: Path, variable: nnx.Variable) -> None:
        """Notes that a parameter of a module was read."""
        if isinstance(variable, nnx.Param) and self._stack and self._stack[-1][0] != path:
            self._read.add(path)

    def _is_bridged(self, path: Path) -> bool:
        """Whether this is a linen module of an nnx.bridge.ToNNX, or that itself."""
        return any(path[: len(begin)] == begin for begin in self._bridged)

    def _caller(self, outer: Path | None) -> Path | None:
        """The module in whose call the newest function is: a module that is run by another method has no call."""
        calls = [path for path, name in self._stack if name == "__call__"]
        return calls[-1] if calls else outer

    def _info(
        self,
        path: Path,
        module: nnx.Module,
        args: tuple,
        kwargs: dict,
        output: Any,
        known: ModuleInfo | None,
        caller: Path | None,
    ) -> ModuleInfo:
        return ModuleInfo(
            path=path,
            type=class_of(module),
            fields=_fields(module),
            args=_abstract(args),
            kwargs=_abstract(kwargs),
            output=_abstract(output),
            params={key: _abstract(variable.get_raw_value()) for key, variable in graph.own_variables(module).items()},
            calls=known.calls + 1 if known is not None else 1,
            caller=known.caller if known is not None else caller,
            standalone=known.standalone if known is not None else _standalone(module),
        )

    # --- what it comes to

    def structure(self, model: nnx.Module, params: Tree) -> Structure:
        """The modules in the order of execution, and why others are none."""
        leaves, shared = surgery.flatten(params), graph.shared_variables(model)
        modules = {info.name: info for info in self._modules(leaves)}
        if "" not in modules:
            raise ValueError(f"{class_of(model).__name__} has no __call__, by which deltas would run.")
        held = graph.modules(model)
        inner_tied = {_joined(path, name) for path, (inner, _) in self._bridged.items() for name in inner.tied}
        tied = [
            info.name
            for info in modules.values()
            if any((*info.path, key) in shared for key in info.params)
            or info.name in inner_tied
            or (info.params and (info.path in self._methods or info.path in self._read))
        ]
        by_method = {(surgery.name_of(path), method): info for (path, method), info in self._by_method.items()}
        for path, (found, _) in self._bridged.items():
            for (name, method), info in found.by_method.items():
                by_method[_joined(path, name), method] = bridge.below(path, info, path)
        structure = Structure(
            modules,
            {name: why for name, why in self._reasons(model, held, modules).items() if name not in modules},
            params,
            frozenset(tied),
            by_method,
            reserved=frozenset(n for module in held.values() for n in (*dir(type(module)), *map(str, vars(module)))),
        )
        structure.derived[_LAYERS] = self._layers(structure)
        return structure

    def _layers(self, structure: Structure) -> dict[Path, Layers]:
        """The axes of layers that the leaves of each module have, or would have."""
        leaves, found = structure.leaves, dict[Path, Layers]()
        infos = [*structure, *(info for info in structure.by_method.values() if info.name not in structure.modules)]
        for path, (_, seen) in self._bridged.items():
            found[path] = _layers_of([leaves[(*path, *p)].shape for p in seen], [leaf.shape for leaf in seen.values()])
        infos = [info for info in infos if not self._is_bridged(info.path)]
        for info in infos:
            if info.params:
                stored = [leaves[(*info.path, key)].shape for key in info.params]
                found[info.path] = _layers_of(stored, [leaf.shape for leaf in info.params.values()])
        for info in infos:
            if info.path not in found:  # as whatever has parameters and runs in the same body of a transformation
                beside = (p for p in found if self._traces[p] == self._traces[info.path])
                around = next(beside, info.caller)
                found[info.path] = found.get(around, Layers()) if around is not None else Layers()
        return found

    def _modules(self, leaves: Mapping[Path, Any]) -> Iterator[ModuleInfo]:
        """What was seen. A scan traces its body and runs it once a layer: calls are counted accordingly."""
        found = [_with_own(info, leaves) for info in self._seen.values() if info is not None]
        factor: dict[Path, float] = {}  # outermost module in a scan -> layers for each time that it was traced
        plain = [info for info in found if not self._is_bridged(info.path)]
        sized = {(*info.path, key): leaf for info in plain for key, leaf in info.params.items()}
        sized |= {(*path, *p): v for path, (_, shapes) in self._bridged.items() for p, v in shapes.items()}
        for info in (info for info in found if info.path in self._traces):
            below = {path: leaf for path, leaf in sized.items() if path[: len(info.path)] == info.path}
            inside = [leaves[path].size // max(leaf.size, 1) for path, leaf in below.items()]
            copies = min(inside, default=0)
            if copies > 1 and not any(info.path[: len(path)] == path for path in factor):
                factor[info.path] = copies / info.calls
        for info in found:
            times = math.prod(n for path, n in factor.items() if info.path[: len(path)] == path)
            yield dataclasses.replace(info, calls=max(round(info.calls * times), 1))

    def _reasons(
        self, model: nnx.Module, held: Mapping[Path, nnx.Module], modules: Mapping[str, ModuleInfo]
    ) -> dict[str, str]:
        """Name to the reason why it is none of the modules."""
        found: dict[str, str] = {}
        for path, module in held.items():
            if path in self._methods:
                found[surgery.name_of(path)] = self._run_by(path, held, modules)
            elif isinstance(module, (nnx.List, nnx.Dict)):
                inside = [surgery.name_of(p) for p in held if p[:-1] == path]
                kind, etc = class_of(module).__name__, ", …" if len(inside) > 2 else ""
                found[surgery.name_of(path)] = (
                    f"it is a {kind} of modules, and nothing calls that. Name what is in it: "
                    f"{', '.join(inside[:2]) or 'it is empty'}{etc}."
                )
            else:
                found[surgery.name_of(path)] = _NOT_CALLED
        for path, (inner, _) in self._bridged.items():
            found |= {_joined(path, name): why for name, why in inner.uncalled.items()}
        for other, path in graph.other_names(model).items():
            for part in (p for p in held if p[: len(path)] == path):
                name = surgery.name_of(part)
                found[surgery.name_of((*other, *part[len(path) :]))] = (
                    f"it is the same object as {name!r}, under another name. Name {name!r}."
                )
        return found

    def _run_by(self, path: Path, held: Mapping[Path, nnx.Module], modules: Mapping[str, ModuleInfo]) -> str:
        names, ways = self._methods[path], list[str]()
        if inside := [name for name in modules if name.startswith(f"{surgery.name_of(path)}.")]:
            ways.append(f"Its parts can, such as {inside[0]!r}.")
        if (caller := next(iter(names.values()))) is not None and surgery.name_of(caller):
            ways.append(f"So can {surgery.name_of(caller)!r}, which runs it.")
        return (
            f"{class_of(held[path]).__name__} is run by its methods {', '.join(names)}, and what a delta adds is run "
            "around calls, by __call__, unless its edit names the method: jdelta.CallEdit(…, method=…). "
            f"{' '.join(ways)}"
        )


def _with_own(info: ModuleInfo, leaves: Mapping[Path, Any]) -> ModuleInfo:
    """Without parameters that are another module's, with which it shares them."""
    own = {key: leaf for key, leaf in info.params.items() if (*info.path, key) in leaves}
    return dataclasses.replace(info, params=own)


def _joined(path: Path, name: str) -> str:
    return ".".join(filter(None, (surgery.name_of(path), name)))


def _layers_of(stored: Sequence[tuple[int, ...]], seen: Sequence[tuple[int, ...]]) -> Layers:
    """The axes that leaves of these shapes have besides those of the shapes that are seen."""
    if not stored:
        return Layers()
    axes, shape, sizes = scanned_axes(stored, seen), list(stored[0]), list[int]()
    for axis in reversed(axes):
        sizes.insert(0, shape.pop(axis))
    return Layers(tuple(axes), tuple(sizes))


def _standalone(module: nnx.Module) -> Standalone | None:
    """The module by itself, if it has parameters of its own."""
    if not graph.own_variables(module):
        return None
    copy = nnx.merge(*nnx.split(module), copy=True)
    for inside in graph.modules(copy).values():
        give(inside, None)
    return standalone(copy)


def _fields(module: nnx.Module) -> dict[str, Any]:
    """The static attributes of a module."""
    nodes: Mapping[str, bool] = module._pytree__nodes  # a test notices if nnx names it otherwise
    return {k: v for k, v in vars(module).items() if k[:1] != "_" and not (nodes.get(k) or _is_data(v))}


def _is_data(value: Any) -> bool:
    return any(isinstance(leaf, (nnx.Variable, nnx.Pytree)) or is_array(leaf) for leaf in _leaves(value))


def _leaves(value: Any) -> list[Any]:
    return jax.tree.leaves(value, is_leaf=lambda v: isinstance(v, (nnx.Variable, nnx.Pytree)))


def _abstract(tree: Any) -> Any:
    """Shapes in place of arrays, and classes in place of modules."""

    def leaf(value: Any) -> Any:
        if isinstance(value, nnx.Pytree):
            return class_of(value)
        return jax.ShapeDtypeStruct(jnp.shape(value), value.dtype) if is_array(value) else value

    return jax.tree.map(leaf, tree, is_leaf=lambda value: isinstance(value, nnx.Pytree))
