"""From a model to the host that runs deltas on it."""

from __future__ import annotations

import sys
from typing import Any

from flax import linen as nn

from jdelta.core.host import HostAdapter
from jdelta.hosts.linen.backbone import Backbone, described
from jdelta.hosts.transformers.model import PretrainedAdapter


def adapt(backbone_model: Any) -> HostAdapter:
    """The adapter of a backbone.

    Raises:
      TypeError: it is neither a Flax model of transformers nor a `jdelta.Backbone`.
    """
    if isinstance(backbone_model, Backbone):
        return backbone_model
    if _is_instance(backbone_model, "transformers.modeling_flax_utils", "FlaxPreTrainedModel"):
        return PretrainedAdapter(backbone_model)
    if isinstance(backbone_model, nn.Module):
        name = type(backbone_model).__name__
        raise TypeError(
            f"the linen module {name} holds no parameters. Wrap it: "
            f"jdelta.Backbone({name}(…), params, dummy_inputs=(x,))."
        )
    message = f"expected a Flax model of transformers or a jdelta.Backbone, got {described(backbone_model)}."
    if _is_instance(backbone_model, "torch.nn", "Module"):
        message += " It is a PyTorch model: load its Flax class, with from_pretrained(…, from_pt=True)."
    raise TypeError(message)


def _is_instance(value: Any, module: str, name: str) -> bool:
    """isinstance without importing: a class of a module that was never imported has no instances."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(value, cls)
