"""One adapter for every model that a delta can be put on: its module, its parameters, and an abstract run."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from jdelta.core.edits import Attachment
from jdelta.core.pickling import packed, unpacked
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.hosts.linen.instrument import attachments_of, bare, instrument
from jdelta.hosts.linen.trace import trace as trace_of
from jdelta.hosts.transformers import model as pretrained
from jdelta.trees import surgery
from jdelta.trees.surgery import Tree


class HostAdapter(Protocol):
    """What the rest of jdelta asks of a backbone."""

    module: nn.Module
    params: Tree | None  # None: the user holds them elsewhere

    @property
    def cache(self) -> Cache:
        """What the newest traces found."""
        ...

    @property
    def class_name(self) -> str:
        """The name of its class."""
        ...

    @property
    def source_repo(self) -> str:
        """Where it was loaded from, a folder or a repository of the Hub; `""` if nobody knows."""
        ...

    def init(self, module: nn.Module, rng: chex.PRNGKey) -> Tree:
        """Initialises `module`, a variant of this backbone's, on the pseudo input; the tree is laid out as `params`."""
        ...


class Cache(dict[str, tuple[nn.Module, Any]]):
    """What the newest traces found, by what it is, and of which module. A copy or a pickle is empty."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, ()


class Backbone:
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
            raise TypeError(f"Backbone: expected a flax.linen module, got {_kind(module)}.")
        if params is not None and not isinstance(params, Mapping):
            raise TypeError(f"Backbone: expected a tree of parameters, got {_kind(params)}.")
        if dummy_inputs is not None and not isinstance(dummy_inputs, (tuple, list)):
            raise TypeError(f"Backbone: dummy_inputs is a tuple of arguments, got {_kind(dummy_inputs)}: write (x,).")
        surgery.require_alive(params)
        for name, given in (("dummy_kwargs", dummy_kwargs), ("rngs", rngs)):
            if given is not None and not isinstance(given, Mapping):
                raise TypeError(f"Backbone: {name} is a dict, got {_kind(given)}.")
        self.module = module
        self.cache = Cache()
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

    def init(self, module: nn.Module, rng: chex.PRNGKey) -> Tree:
        """Initialises `module`, a variant of this backbone's, on the dummy input; laid out as `params`."""
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


class _PretrainedAdapter:
    """A `transformers.FlaxPreTrainedModel` seen as a `HostAdapter`."""

    def __init__(self, model: Any):
        self._model = model

    @property
    def module(self) -> nn.Module:
        return self._model.module

    @module.setter
    def module(self, module: nn.Module) -> None:
        self._model._module = module
        self._model.__class__ = pretrained.class_for(self._model)
        vars(self._model).pop("module_class", None)
        if carried := attachments_of(module):  # enable_gradient_checkpointing makes the module anew, from this
            self._model.module_class = functools.partial(_made, self._model.module_class, carried)

    @property
    def params(self) -> Tree | None:
        return self._model.params if self._model._is_initialized else None

    @params.setter
    def params(self, params: Tree) -> None:
        self._model.params = params

    @property
    def cache(self) -> Cache:
        return vars(self._model).setdefault("_jdelta_cache", Cache())

    @property
    def class_name(self) -> str:
        return type(self._model).__name__

    @property
    def source_repo(self) -> str:
        return getattr(self._model.config, "_name_or_path", "") or ""

    def init(self, module: nn.Module, rng: chex.PRNGKey) -> Tree:
        probe = copy.copy(self._model)
        probe._module = module
        return probe.init_weights(rng, probe.input_shape)


def _made(module_class: type[nn.Module], attachments: Sequence[Attachment], *args: Any, **kwargs: Any) -> nn.Module:
    return instrument(module_class(*args, **kwargs), attachments)


def adapt(backbone_model: Any) -> HostAdapter:
    """The adapter of a backbone.

    Raises:
      TypeError: it is neither a Flax model of transformers nor a `jdelta.Backbone`.
    """
    if isinstance(backbone_model, Backbone):
        return backbone_model
    if _is_instance(backbone_model, "transformers.modeling_flax_utils", "FlaxPreTrainedModel"):
        return _PretrainedAdapter(backbone_model)
    if isinstance(backbone_model, nn.Module):
        name = type(backbone_model).__name__
        raise TypeError(
            f"the linen module {name} holds no parameters. Wrap it: "
            f"jdelta.Backbone({name}(…), params, dummy_inputs=(x,))."
        )
    message = f"expected a Flax model of transformers or a jdelta.Backbone, got {_kind(backbone_model)}."
    if _is_instance(backbone_model, "torch.nn", "Module"):
        message += " It is a PyTorch model: load its Flax class, with from_pretrained(…, from_pt=True)."
    raise TypeError(message)


def trace(adapter: HostAdapter) -> Structure:
    """The structure of the backbone alone, without the deltas that it carries."""
    module = bare(adapter.module)
    return _cached(adapter, "structure", module, lambda: trace_of(lambda: adapter.init(module, _key()), type(module)))


def tree_of(adapter: HostAdapter) -> Tree:
    """The backbone's parameters with those of the attached deltas; their shapes, where the user holds the values."""
    if adapter.params is not None:
        return adapter.params
    module = adapter.module
    return _cached(adapter, "tree", module, lambda: jax.eval_shape(lambda: adapter.init(module, _key())))


def _cached(adapter: HostAdapter, what: str, module: nn.Module, find: Callable[[], Any]) -> Any:
    of, found = adapter.cache.get(what, (None, None))
    if of is not module:
        found = find()
        adapter.cache[what] = (module, found)
    return found


def positions(info: ModuleInfo) -> range | None:
    """The positions that a module's configuration says that it has; `None` if it says nothing."""
    config: Any = info.fields.get("config")
    limit = getattr(config, "max_position_embeddings", None)
    first = config.pad_token_id + 1 if "roberta" in getattr(config, "model_type", "") else 0
    return None if limit is None else range(first, limit)


@contextlib.contextmanager
def unchanged_on_error(adapter: HostAdapter) -> Iterator[None]:
    """Whatever is raised inside, the backbone has the module and the parameters that it had."""
    module, params = adapter.module, adapter.params
    try:
        yield
    except BaseException:
        adapter.module = module
        if params is not None:
            adapter.params = params
        raise


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


def _is_instance(value: Any, module: str, name: str) -> bool:
    """isinstance without importing: a class of a module that was never imported has no instances."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(value, cls)


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"


def _zeros_for_shape(leaf: Any) -> Any:
    return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _token_ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _key() -> jax.Array:
    return jax.random.key(0)
