"""From a model to the host that runs deltas on it."""

from __future__ import annotations

import sys
from typing import Any

from flax import linen as nn
from flax import nnx

from jdelta.core.host import HostAdapter
from jdelta.hosts.linen.backbone import Backbone, described
from jdelta.hosts.nnx.adapter import DummyInputs, NnxAdapter
from jdelta.hosts.transformers.model import PretrainedAdapter


def adapt(backbone_model: Any, dummy_inputs: DummyInputs | None = None) -> HostAdapter:
    """The adapter of a backbone.

    Args:
      backbone_model: a Flax model of transformers, a `jdelta.Backbone`, or an nnx module.
      dummy_inputs: arguments of one call of an nnx module: a tuple, or a dict of keywords. Those that were given for
        the module before are remembered.

    Raises:
      TypeError: it is none of these, or one that knows its inputs.
      ValueError: the inputs do not fit, or the module carries what jdelta does not run.
    """
    if isinstance(backbone_model, nnx.Module):
        return NnxAdapter(backbone_model, dummy_inputs)
    if dummy_inputs is not None:
        raise TypeError(
            f"dummy_inputs belong to an nnx module, got {described(backbone_model)}. A linen module has them in "
            "jdelta.Backbone(module, params, dummy_inputs=…); a model of transformers knows its own."
        )
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
    message = (
        f"expected a Flax model of transformers, a jdelta.Backbone or an nnx module, got {described(backbone_model)}."
    )
    if _is_instance(backbone_model, "torch.nn", "Module"):
        message += " It is a PyTorch model: load its Flax class, with from_pretrained(…, from_pt=True)."
    raise TypeError(message)


def _is_instance(value: Any, module: str, name: str) -> bool:
    """isinstance without importing: a class of a module that was never imported has no instances."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(value, cls)
