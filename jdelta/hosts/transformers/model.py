"""A Flax model of transformers as a host, and the class that it has while it carries deltas: the model's own, but for
`save_pretrained` and `generate`."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import chex
from flax import linen as nn

from jdelta.core.edits import Attachment
from jdelta.core.host import Cache
from jdelta.hosts.linen.adapter import LinenAdapter
from jdelta.hosts.linen.instrument import attachments_of, instrument
from jdelta.hosts.transformers import generation
from jdelta.trees import surgery
from jdelta.trees.surgery import Tree

_ORIGINAL = "_jdelta_original"


class PretrainedAdapter(LinenAdapter):
    """A `transformers.FlaxPreTrainedModel` as a host."""

    def __init__(self, model: Any):
        self._model = model

    @property
    def module(self) -> nn.Module:
        """The linen module."""
        return self._model.module

    @module.setter
    def module(self, module: nn.Module) -> None:
        self._model._module = module
        self._model.__class__ = class_for(self._model)
        vars(self._model).pop("module_class", None)
        if carried := attachments_of(module):  # enable_gradient_checkpointing makes the module anew, from this
            self._model.module_class = functools.partial(_made, self._model.module_class, carried)

    @property
    def params(self) -> Tree | None:
        """The tree of parameters; `None` if the model was made without."""
        return self._model.params if self._model._is_initialized else None

    @params.setter
    def params(self, params: Tree) -> None:
        self._model.params = params

    @property
    def cache(self) -> Cache:
        """What the newest traces found."""
        return vars(self._model).setdefault("_jdelta_cache", Cache())

    @property
    def class_name(self) -> str:
        """See `HostAdapter`."""
        return type(self._model).__name__

    @property
    def source_repo(self) -> str:
        """See `HostAdapter`."""
        return getattr(self._model.config, "_name_or_path", "") or ""

    def run_call(self, *args: Any, params: Tree, **kwargs: Any) -> Any:
        """Calls the model with these parameters."""
        return self._model(*args, params=params, **kwargs)

    def run_init(self, module: nn.Module, rng: chex.PRNGKey) -> Tree:
        """Initialises `module`, a variant of the model's, on its own pseudo input."""
        probe = copy.copy(self._model)
        probe._module = module
        return probe.init_weights(rng, probe.input_shape)


def _made(module_class: type[nn.Module], attachments: Sequence[Attachment], *args: Any, **kwargs: Any) -> nn.Module:
    return instrument(module_class(*args, **kwargs), attachments)


def class_for(model: Any) -> type:
    """The class that a model is to have: its own, unless its module runs deltas."""
    original = vars(type(model)).get(_ORIGINAL, type(model))
    prompted = bool(generation.prompt_ids(model.module))
    return _with_deltas(original, prompted) if any(a.active for a in attachments_of(model.module)) else original


def _with_deltas(original: Any, prompted: bool) -> type:
    @functools.wraps(original.save_pretrained)
    def save_pretrained(self: Any, save_directory: Any, params: Any = None, *args: Any, **kwargs: Any) -> Any:
        tree = self.params if params is None else params
        surgery.require_alive(tree)
        held = surgery.flatten(surgery.parameters(tree))
        lost = [a.name for a in attachments_of(self.module) if held.keys() & {*a.leaves}]
        if lost:
            warnings.warn(
                f"save_pretrained writes the leaves of delta {lost[0]!r} among the model's, and from_pretrained passes "
                "them over: the delta is lost there. Save it with delta.save_finetuned(folder), which from_finetuned "
                "attaches; or, where it can be merged, call delta.merge() first.",
                stacklevel=2,
            )
        return original.save_pretrained(self, save_directory, params, *args, **kwargs)

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return _without_attributes, (original, prompted), vars(self)

    namespace = {
        "save_pretrained": save_pretrained,
        "__reduce__": __reduce__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        _ORIGINAL: original,
    }
    if prompted:
        namespace["generate"] = generation.with_prompts(original)
    return type(original.__name__, (original,), namespace)


def _without_attributes(original: Any, prompted: bool) -> Any:
    return object.__new__(_with_deltas(original, prompted))
