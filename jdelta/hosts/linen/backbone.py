"""A linen module with its parameters, as a backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from jdelta.core.pickling import packed, unpacked
from jdelta.hosts.linen.adapter import LinenAdapter
from jdelta.trees import surgery
from jdelta.trees.surgery import Tree


class Backbone(LinenAdapter):
    """A `flax.linen` module together with its parameters and a dummy input.

        backbone = jdelta.Backbone(module, params, dummy_inputs=(jnp.ones((1, 28, 28, 1)),))
        delta = jdelta.LoraModel(backbone, modified_modules=["Dense_0"])
        y = backbone(x)

    Args:
      module: an unbound linen module.
      params: its parameters; or the whole dict of collections, `{'params': …, 'batch_stats': …}`; or a tree of
        `jax.ShapeDtypeStruct`s, if the values live elsewhere; or `None`, which stands for the shapes that
        `module.init` gives.
      dummy_inputs: positional arguments of one call. Only shapes and dtypes count: `jax.ShapeDtypeStruct`s will do.
        Without them, an int32 `[[0, 0, 0]]` and then `[0, 0, 0]` is tried.
      dummy_kwargs: keyword arguments of that call.
      rngs: keys of the rng streams that the call needs besides `params` and `dropout`.

    Raises:
      RuntimeError: the parameters were donated.
      TypeError: `module` is no linen module, or `params` no tree.
      ValueError: the dummy inputs do not fit the module, or the parameters do not.
    """

    source_repo: str = ""

    def __init__(
        self,
        module: nn.Module,
        params: Tree | None = None,
        dummy_inputs: tuple | None = None,
        dummy_kwargs: Mapping[str, Any] | None = None,
        rngs: Mapping[str, jax.Array] | None = None,
    ):
        if not isinstance(module, nn.Module):
            raise TypeError(f"Backbone: expected a flax.linen module, got {described(module)}.")
        if params is not None and not isinstance(params, Mapping):
            raise TypeError(f"Backbone: expected a tree of parameters, got {described(params)}.")
        if dummy_inputs is not None and not isinstance(dummy_inputs, (tuple, list)):
            raise TypeError(
                f"Backbone: dummy_inputs is a tuple of arguments, got {described(dummy_inputs)}: write (x,)."
            )
        surgery.require_alive(params)
        for name, given in (("dummy_kwargs", dummy_kwargs), ("rngs", rngs)):
            if given is not None and not isinstance(given, Mapping):
                raise TypeError(f"Backbone: {name} is a dict, got {described(given)}.")
        self.module = module
        self._rngs = dict(rngs or {})
        self._kwargs = dict(dummy_kwargs or {})
        self._whole = params is not None and bool(surgery.root(params))
        self._inputs, initial = self._fitting(dummy_inputs)
        if params is None:
            params = initial
        else:
            _check_fit(surgery.parameters(params), surgery.parameters(initial), type(module).__name__)
        self.params: Tree = params

    def __copy__(self) -> Backbone:
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "module": packed(self.module)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, module=unpacked(state["module"]))

    @property
    def class_name(self) -> str:
        """The name of the module's class."""
        return type(self.module).__name__

    def __call__(self, *args: Any, params: Tree | None = None, rngs: Any = None, **kwargs: Any) -> Any:
        """`module.apply` with `params`, or with the backbone's own. Other keywords of `apply` pass through.

        Raises:
          RuntimeError: the parameters were donated.
          ValueError: there are only shapes of parameters.
        """
        tree = self.params if params is None else params
        surgery.require_alive(tree)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
            raise ValueError(
                f"this backbone of {self.class_name} holds the shapes of its parameters and no values. Pass the tree "
                "that holds them, params=…, or set its params; module.init makes random ones."
            )
        variables = tree if surgery.root(tree) else {"params": tree}
        return self.module.apply(variables, *args, rngs=rngs, **kwargs)

    def run_call(self, *args: Any, params: Tree, **kwargs: Any) -> Any:
        """The same, for tools that know all backbones by one name.

        Args:
          *args, **kwargs: of the call.
          params: the parameters.
        """
        return self(*args, params=params, **kwargs)

    def run_init(self, module: nn.Module, rng: chex.PRNGKey) -> Tree:
        """Initialises a variant of the module on the dummy inputs.

        Args:
          module: the variant, such as the module with its deltas.
          rng: a key.

        Returns:
          A tree like `params`.
        """
        return self._init(module, rng, self._inputs)

    def _init(self, module: nn.Module, rng: chex.PRNGKey, inputs: tuple) -> Tree:
        streams = dict(zip(("params", "dropout"), jax.random.split(rng), strict=True))
        args, kwargs = jax.tree.map(_zeros_for_shape, (tuple(inputs), self._kwargs))
        variables = module.init({**streams, **self._rngs}, *args, **kwargs)
        params = variables.get("params", {})
        return {**variables, "params": params} if self._whole else params

    def _fitting(self, dummy_inputs: tuple | None) -> tuple[tuple, Tree]:
        """Dummy inputs that the module takes, and the shapes of the parameters that it makes from them."""
        tried = [dummy_inputs] if dummy_inputs is not None else [(_token_ids(1, 3),), (_token_ids(3),)]
        problem: Exception | None = None
        for inputs in tried:
            try:
                return tuple(inputs), jax.eval_shape(lambda key, i=inputs: self._init(self.module, key, i), _key())
            except Exception as error:
                problem = problem or error
        name = type(self.module).__name__
        if dummy_inputs is None:
            message = (
                f"Backbone: {name} takes neither the pseudo input [[0, 0, 0]] nor [0, 0, 0]. Say what it takes, "
                "for example dummy_inputs=(jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),)."
            )
        else:
            shapes = jax.tree.map(lambda a: a.shape if hasattr(a, "shape") else a, tuple(dummy_inputs))
            message = f"Backbone: the dummy inputs of shapes {shapes} do not fit {name}: {problem}"
        raise ValueError(message) from problem


def _check_fit(given: Tree, wanted: Tree, name: str) -> None:
    """Raises `ValueError` unless the given parameters are those that the module makes, up to dtype."""
    have, want = surgery.flatten(given), surgery.flatten(wanted)
    for path, leaf in want.items():
        if path not in have:
            raise ValueError(f"Backbone: the parameters lack {surgery.name_of(path)!r}, which {name} needs.")
        if getattr(leaf, "shape", ()) != getattr(have[path], "shape", ()):
            raise ValueError(
                f"Backbone: {surgery.name_of(path)!r} has shape {have[path].shape}, but {name} needs {leaf.shape}."
            )


def described(value: Any) -> str:
    """What an object is, for messages."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"


def _zeros_for_shape(leaf: Any) -> Any:
    return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _token_ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _key() -> jax.Array:
    return jax.random.key(0)
