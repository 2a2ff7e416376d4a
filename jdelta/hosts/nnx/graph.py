"""An nnx module as jdelta sees it: its modules and parameters by path, and where a delta's leaves are in it.

A path is a tuple of strings: what is number 0 of an `nnx.List` has the key `"0"`. What can be reached in several ways
has the path that comes first in `nnx.iter_graph`, which is that of `nnx.state`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from jdelta.core.edits import WeightEdit
from jdelta.hosts.nnx import bridge
from jdelta.trees import left_out
from jdelta.trees.surgery import Path
from jdelta.trees.variables import DeltaParam


class Leaves(nnx.Module):
    """What a delta has at one module: its leaves, and what its dropout needs.

    It is an attribute of the module, named like the delta. Where the delta has dropout, it has `deterministic`, which
    `model.train()`, `model.eval()` and `nnx.view` set, and a stream of keys, `rngs`.
    """

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` calls.

        Args:
          deterministic: whether the dropout of the delta is off.
        """
        if deterministic is not None and "deterministic" in vars(self):
            self.deterministic = deterministic

    @property
    def is_deterministic(self) -> bool:
        """Whether dropout is off."""
        return bool(vars(self).get("deterministic", True))

    def dropout_key(self) -> jax.Array | None:
        """The next key of its dropout; `None` if it has none."""
        stream = vars(self).get("rngs")
        return None if stream is None else stream()


_ADDED = "added_by_jdelta"  # of a variable
_OPTIONAL = "optional_by_jdelta"  # of a variable: there was `None`, as data or not, and it was switched off or not


def strings(path: tuple[Any, ...]) -> Path:
    """A path of nnx as one of jdelta's."""
    return tuple(map(str, path))


def modules(model: nnx.Module) -> dict[Path, nnx.Module]:
    """Path to module, outermost first, without what belongs to deltas."""
    found = {strings(path): module for path, module in nnx.iter_modules(model) if not isinstance(module, Leaves)}
    return dict(sorted(found.items(), key=lambda item: len(item[0])))


def variables(model: nnx.Module) -> dict[Path, nnx.Param]:
    """Path to variable of each parameter, those of deltas too."""
    return {strings(path): value for path, value in nnx.iter_graph(model) if isinstance(value, nnx.Param)}


def own_variables(module: nnx.Module) -> dict[str, nnx.Param]:
    """The parameters that are attributes of a module, without those of deltas, by name."""
    found = {name: value for name, value in vars(module).items() if isinstance(value, nnx.Param)}
    return {name: value for name, value in found.items() if not isinstance(value, DeltaParam)}


def own_leaves(module: nnx.Module) -> dict[str, Any]:
    """The values of `own_variables`."""
    return {name: variable.get_value() for name, variable in own_variables(module).items()}


def shared_variables(model: nnx.Module) -> dict[Path, list[Path]]:
    """The paths at which a parameter is besides its own, in modules: its own path to these."""
    own = {id(variable): path for path, variable in variables(model).items()}
    found: dict[Path, list[Path]] = {}
    for path, module in modules(model).items():
        for name, variable in own_variables(module).items():
            if own[id(variable)] != (*path, name):
                found.setdefault(own[id(variable)], []).append((*path, name))
    return found


def other_names(model: nnx.Module) -> dict[Path, Path]:
    """The paths at which a module is besides its own: path to its own."""
    own = {id(module): path for path, module in modules(model).items()}
    found: dict[Path, Path] = {}

    def walk(node: Any, path: Path, inside: tuple[int, ...]) -> None:
        for key, value in _items(node):
            here = (*path, str(key))
            if id(value) in inside or isinstance(value, Leaves):
                continue
            if isinstance(value, nnx.Module) and own.get(id(value), here) != here:
                found[here] = own[id(value)]
                continue
            walk(value, here, (*inside, id(value)))

    walk(model, (), (id(model),))
    return found


def _items(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, nnx.Module):
        yield from ((key, value) for key, value in vars(node).items() if not str(key).startswith("_pytree__"))
    elif isinstance(node, Mapping):
        yield from node.items()
    elif isinstance(node, (list, tuple)):
        yield from enumerate(node)


# --- the leaves of deltas


def leaves_of(module: nnx.Module, name: str) -> dict[Path, nnx.Param]:
    """The variables that a delta has at a module, by their path below the delta's name; none, if there are none."""
    holder = vars(module).get(name)
    return dict(_leaves_in(holder, ())) if isinstance(holder, Leaves) else {}


def _leaves_in(holder: Leaves, path: Path) -> Iterator[tuple[Path, nnx.Param]]:
    for key, value in vars(holder).items():
        if isinstance(value, Leaves):
            yield from _leaves_in(value, (*path, key))
        elif isinstance(value, nnx.Param):
            yield (*path, key), value


def dropouts(found: Mapping[Path, nnx.Module]) -> dict[Path, Leaves]:
    """What holds leaves and has dropout, by its path, of modules by theirs."""
    held = {(*path, name): value for path, module in found.items() for name, value in vars(module).items()}
    return {path: value for path, value in held.items() if isinstance(value, Leaves) and "rngs" in vars(value)}


def is_left_out(module: nnx.Module, name: str) -> bool:
    """Whether the state that a module was made of says that a delta is left out: see `jdelta.without`."""
    return any(map(left_out.is_marked, leaves_of(module, name).values()))


def put(module: nnx.Module, path: Path, value: Any, **metadata: Any) -> None:
    """Makes a leaf of a delta: `path` begins with the delta's name."""
    if isinstance(module, bridge.Bridged):
        bridge.put(module, path, DeltaParam(value))
        set_data(module, path[0], vars(module)[path[0]])
        return
    holder = module
    for key in path[:-1]:
        holder = holder_of(holder, key)
    set_data(holder, path[-1], DeltaParam(value, **metadata))


def holder_of(module: nnx.Module, name: str) -> Leaves:
    """What holds a delta's leaves at a module; it is made if there is none."""
    holder = vars(module).get(name)
    if holder is None:
        set_data(module, name, holder := Leaves())
    return holder


def share(model: nnx.Module, edit: WeightEdit) -> None:
    """Gives the leaves that an edit has at one owner of a parameter to all others that share the parameter."""
    found = modules(model)
    held = vars(found[edit.host]).get(edit.name)
    for key in edit.own:
        held = vars(held).get(key) if held is not None else None
    for other in shared_variables(model).get(edit.leaf, ()) if held is not None else ():
        holder, path = found[other[:-1]], (edit.name, *edit.own)
        for key in path[:-1]:
            holder = holder_of(holder, key)
        if vars(holder).get(path[-1]) is not held:
            set_data(holder, path[-1], held)


def take_out(module: nnx.Module, path: Path) -> None:
    """Removes a leaf of a delta, and what then holds no leaf any more."""
    if isinstance(module, bridge.Bridged):
        bridge.take_out(module, path)
        if path[0] not in vars(module):
            delete(module, path[0])
        return
    holders = [module]
    for key in path[:-1]:
        holders.append(vars(holders[-1])[key])
    remove(holders[-1], path[-1])
    for i in range(len(path) - 1, 0, -1):
        if not variables(holders[i]):
            delete(holders[i - 1], path[i - 1])


def add(module: nnx.Module, name: str, value: Any) -> None:
    """Gives a module a parameter of its own, which it may know of, as an optional bias, or not: see `is_added`."""
    if name not in vars(module):
        set_data(module, name, nnx.Param(value, **{_ADDED: True}))
        return
    is_data, switch = module._pytree__nodes[name], f"use_{name}"  # as nnx.Linear has use_bias
    switched = vars(module).get(switch) is False
    metadata: dict[str, Any] = {_OPTIONAL: (is_data, switched)}
    set_data(module, name, nnx.Param(value, **metadata))
    if switched:
        vars(module)[switch] = True


def remove(module: nnx.Module, name: str) -> None:
    """The inverse of `add`; removes any other data, too."""
    variable = vars(module)[name]
    optional = variable.get_metadata().get(_OPTIONAL) if isinstance(variable, nnx.Param) else None
    delete(module, name)
    if optional is not None:
        is_data, switched = optional
        set_data(module, name, None, is_data)
        if switched:
            vars(module)[f"use_{name}"] = False


def is_of_model(variable: nnx.Param) -> bool:
    """Whether a parameter is the model's own: of no delta, and not from `add`."""
    return not (isinstance(variable, DeltaParam) or {_ADDED, _OPTIONAL} & variable.get_metadata().keys())


def is_added(module: nnx.Module, name: str) -> bool:
    """Whether a module has a parameter that it knows nothing of."""
    variable = vars(module).get(name)
    return isinstance(variable, nnx.Param) and bool(variable.get_metadata().get(_ADDED))


def set_data(module: nnx.Module, name: str, value: Any, is_data: bool = True) -> None:
    """Sets an attribute that is data, also while a transformation is traced that the module is not in.

    Private API of nnx: `_pytree__nodes` says which attributes are data. A test of states and graphs notices if not.
    """
    object.__setattr__(module, "_pytree__nodes", module._pytree__nodes.update({name: is_data}))
    vars(module)[name] = value


def delete(module: nnx.Module, name: str) -> None:
    """The inverse of `set_data`."""
    nodes = {key: data for key, data in module._pytree__nodes.items() if key != name}
    object.__setattr__(module, "_pytree__nodes", type(module._pytree__nodes)(nodes))
    vars(module).pop(name, None)


def nested(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """A nested dict of leaves by path."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        below = tree
        for key in path[:-1]:
            below = below.setdefault(key, {})
        below[path[-1]] = value
    return tree
