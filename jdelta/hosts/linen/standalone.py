"""A linen module by itself: made again from its class and its fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from jdelta.core.arguments import shapes_of
from jdelta.core.standalone import FLAGS, Mode, Shapes


@dataclasses.dataclass(frozen=True)
class LinenStandalone:
    """A `jdelta.core.standalone.Standalone`.

    Attributes:
      type: the class of the module.
      fields: its fields.
      own: names of its own parameters.
    """

    type: type[nn.Module]
    fields: Mapping[str, Any]
    own: tuple[str, ...]

    @property
    def key(self) -> Hashable:
        """See `Standalone`: the fields say everything."""
        return None

    def shapes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Shapes:
        """See `Standalone`."""
        module, key = self._module(), jax.random.key(0)

        def init(key: jax.Array, *args: Any, **kwargs: Any) -> Any:
            output, variables = module.init_with_output({"params": key, "dropout": key}, *args, **kwargs)
            return output, meta.unbox(variables)

        output, variables = shapes_of(init, key, args, kwargs)
        params = variables.get("params", {})
        inside = {key: leaf for key, leaf in params.items() if key not in self.own}
        own = {key: leaf for key, leaf in params.items() if key in self.own}
        return Shapes(own, {**variables, "params": inside}, output)

    def run(
        self, own: Mapping[str, Any], rest: Any, args: Sequence[Any], kwargs: Mapping[str, Any], key: jax.Array
    ) -> Any:
        """See `Standalone`."""
        variables = {**rest, "params": {**rest["params"], **own}}
        return self._module().apply(variables, *args, **kwargs, rngs={"dropout": key})

    def is_complete(self, own: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """See `Standalone`."""
        module = self._module()

        def run(params: Any, *args: Any, **kwargs: Any) -> Any:
            return module.apply(params, *args, mutable=True, **kwargs)[1]

        kept = shapes_of(run, {"params": dict(own)}, args, kwargs)
        return not jax.tree.leaves({name: tree for name, tree in kept.items() if name != "params"})

    def modes(self, arguments: Collection[str]) -> list[Mode]:
        """See `Standalone`: linen modules take a flag as a field or as an argument, not both."""
        fields = [name for name in FLAGS if isinstance(self.fields.get(name), bool)]
        names = [name for name in FLAGS if name in arguments]
        if fields:
            flags = [dict.fromkeys(fields, flag) for flag in (False, True)]
            return [Mode(self._with(**given), given, {}) for given in flags]
        return [Mode(self, {}, dict.fromkeys(names, flag)) for flag in (False, True)[: len(names) + 1]]

    def in_float32(self) -> LinenStandalone:
        """See `Standalone`."""
        dtype = self.fields.get("dtype")
        try:
            is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
        except TypeError:
            is_float = False
        return self._with(dtype=jnp.float32) if is_float else self

    def resized(self, resize: Callable[[Any], Any]) -> LinenStandalone:
        """See `Standalone`."""
        return dataclasses.replace(self, fields=resize(dict(self.fields)))

    def _with(self, **fields: Any) -> LinenStandalone:
        return dataclasses.replace(self, fields={**self.fields, **fields})

    def _module(self) -> nn.Module:
        return self.type(**self.fields, parent=None)
