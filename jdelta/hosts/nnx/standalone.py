"""An nnx module by itself: its graph, and the shapes of its state."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdelta.core.arguments import is_array, shapes_of
from jdelta.core.linear_types import is_initializer
from jdelta.core.standalone import FLAGS, Mode, Shapes
from jdelta.core.structural_key import structural_key

_FLAGS = (*FLAGS, "use_running_average")
_DTYPES = ("dtype", "preferred_element_type")  # in which modules compute


def standalone(module: nnx.Module) -> NnxStandalone:
    """A module without its values, which may be tracers or shapes.

    Args:
      module: it stays as it is.
    """
    graphdef, state = nnx.split(module)
    held = {path: jax.tree.map(_shape, leaf) for path, leaf in nnx.to_flat_state(state)}
    return NnxStandalone(graphdef, held)


@dataclasses.dataclass(frozen=True, eq=False)
class NnxStandalone:
    """A `jdelta.core.standalone.Standalone`. Own parameters are the `nnx.Param`s that are attributes of the module.

    Attributes:
      graphdef: of the module.
      held: path to what is there in its state, with shapes in place of arrays.
    """

    graphdef: Any
    held: Mapping[tuple[Any, ...], Any]

    @functools.cached_property
    def key(self) -> Hashable:
        """See `Standalone`: all static attributes, of modules inside it too."""
        found = []
        for path, value in nnx.iter_graph(self._module(self.held)):
            name = str(path[-1]) if path else ""
            if not name.startswith("_pytree__") and not is_initializer(name, value):
                found.append((path, type(value) if _is_node(value) else structural_key(value)))
        return (*found, *((path, structural_key(_value(leaf))) for path, leaf in self.held.items()))

    def shapes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Shapes:
        """See `Standalone`."""
        own = {path[0]: _value(self.held[path]) for path in self._own}
        rest = [_value(self.held[path]) for path in self._rest]
        key = jax.random.key(0)
        given = own, rest, key

        def run(given: Any, *args: Any, **kwargs: Any) -> Any:
            own, rest, key = given
            return self.run(own, rest, args, kwargs, key)

        return Shapes(own, rest, shapes_of(run, given, args, kwargs))

    def run(
        self, own: Mapping[str, Any], rest: Any, args: Sequence[Any], kwargs: Mapping[str, Any], key: jax.Array
    ) -> Any:
        """See `Standalone`."""
        return self._with_values(own, rest, key)(*args, **kwargs)

    def is_complete(self, own: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """See `Standalone`."""
        if len(self._own) != len(self.held):
            return False
        unchanged = []

        def run(own: Any, *args: Any, **kwargs: Any) -> None:
            module = self._with_values(own, [], jax.random.key(0))
            module(*args, **kwargs)
            graphdef, state = nnx.split(module)
            left = {path[0]: _value(leaf) for path, leaf in nnx.to_flat_state(state)}
            unchanged.append(graphdef == self.graphdef and all(left[name] is own[name] for name in own))

        shapes_of(run, dict(own), args, kwargs)
        return all(unchanged)

    def modes(self, arguments: Collection[str]) -> list[Mode]:
        """See `Standalone`: attributes, of modules inside it too, and arguments."""
        module = self._module(self.held)
        names = [name for name in _FLAGS if name in arguments]
        fields = {key: 0 for _, key, value in _static(module) if key in _FLAGS and isinstance(value, bool)}
        found = []
        for flag in (False, True) if fields or names else ():
            for owner, key, value in _static(module):
                if key in fields and isinstance(value, bool):
                    vars(owner)[key] = flag
            found.append(Mode(standalone(module), dict.fromkeys(fields, flag), dict.fromkeys(names, flag)))
        return found or [Mode(self, {}, {})]

    def in_float32(self) -> NnxStandalone:
        """See `Standalone`."""
        module = self._module(self.held)
        for owner, key, value in _static(module):
            if key in _DTYPES and _is_float(value):
                vars(owner)[key] = jnp.float32
        return standalone(module)

    def resized(self, resize: Callable[[Any], Any]) -> NnxStandalone:
        """See `Standalone`: static attributes, and the shapes of variables."""
        module = self._module({path: jax.tree.map(resize, leaf) for path, leaf in self.held.items()})
        for owner, key, value in _static(module):
            vars(owner)[key] = resize(value)
        return standalone(module)

    @functools.cached_property
    def _own(self) -> list[tuple[Any, ...]]:
        return [path for path, leaf in self.held.items() if len(path) == 1 and isinstance(leaf, nnx.Param)]

    @functools.cached_property
    def _rest(self) -> list[tuple[Any, ...]]:
        return [p for p, leaf in self.held.items() if p not in self._own and not isinstance(leaf, nnx.RngState)]

    def _with_values(self, own: Mapping[str, Any], rest: Any, key: jax.Array) -> Any:
        """The module with these arrays, and with its streams of random numbers begun from a key."""
        values = {(name,): value for name, value in own.items()} | dict(zip(self._rest, rest, strict=True))
        for i, (path, leaf) in enumerate(self.held.items()):
            if isinstance(leaf, nnx.RngKey):
                shape = _value(leaf).shape
                fold = jax.random.fold_in(key, i)
                values[path] = jax.random.split(fold, shape) if shape else fold
            elif isinstance(leaf, nnx.RngState):
                values[path] = jnp.zeros(_value(leaf).shape, _value(leaf).dtype)
        return self._module({path: _with_value(leaf, values[path]) for path, leaf in self.held.items()})

    def _module(self, held: Mapping[tuple[Any, ...], Any]) -> Any:
        return nnx.merge(self.graphdef, nnx.from_flat_state(list(held.items())), copy=True)


def _static(module: nnx.Module) -> Iterator[tuple[nnx.Module, str, Any]]:
    """The static attributes of a module and of those inside it: each with the module that it is of."""
    for _, owner in nnx.iter_modules(module):
        nodes: Mapping[str, bool] = owner._pytree__nodes
        for key, value in list(vars(owner).items()):
            if not key.startswith("_pytree__") and not nodes.get(key):
                yield owner, key, value


def _is_node(value: Any) -> bool:
    return isinstance(value, (nnx.Variable, nnx.Pytree, list, tuple, Mapping))


def _value(leaf: Any) -> Any:
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf


def _with_value(leaf: Any, value: Any) -> Any:
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf


def _is_float(dtype: Any) -> bool:
    try:
        return dtype is not None and bool(jnp.issubdtype(dtype, jnp.floating))
    except TypeError:
        return False
