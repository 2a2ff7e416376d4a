"""The class of a transformers model with deltas: the model's own, but for `save_pretrained` and `generate`."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from jdelta.hosts.linen.instrument import attachments_of
from jdelta.hosts.transformers import generation
from jdelta.trees import surgery

_ORIGINAL = "_jdelta_original"


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
