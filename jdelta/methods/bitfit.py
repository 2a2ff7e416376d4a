"""BitFit: only biases train (Ben Zaken et al. 2021, arXiv 2106.10199).

As in OpenDelta, a linear or normalisation module without a bias gets one, of zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import jax
from flax import linen as nn

from jdelta.core.axes import Axes
from jdelta.core.edits import CallEdit
from jdelta.core.method import Method
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.methods.parameter import param


@dataclasses.dataclass(frozen=True)
class BitFitConfig(Method):
    """Arguments of BitFit: those that every method has.

        config = jdelta.BitFitConfig(exclude_modules=["pooler"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    It adds none of its own.
    """

    delta_type = "bitfit"
    default_modified_modules = ("attn", "crossattn", "ff", "layer_norm", "lm_head.proj", "block")

    def edits(self, host: ModuleInfo, structure: Structure) -> Iterable[CallEdit]:
        for info in structure.below(host.path):
            if "bias" in info.params:
                yield CallEdit(info.path, "train", leaf=("bias",))
            elif info.params.keys() & {"kernel", "scale", "weight"} or info.closed:  # closed: an error that says why
                yield CallEdit(info.path, "after", Bias())


class Bias(nn.Module):
    """`y + bias` over the last axis."""

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        return y + param(self, "bias", nn.initializers.zeros, (y.shape[-1],)).astype(y.dtype)

    def merged(
        self, host: ModuleInfo, weights: Mapping[str, jax.Array], own: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """The host's bias, or the one that it would need, with this one added."""
        bias = weights.get("bias")
        return dict(own) if bias is None else {"bias": (bias + own["bias"]).astype(bias.dtype)}

    @nn.nowrap
    def after_merge(self) -> tuple[str, nn.Module]:
        """The leaf that a host may have got by merging, and the layer that runs it."""
        return "bias", HostBias()

    def sharding_axes(self, host: ModuleInfo, x: Axes, y: Axes) -> dict[str, Axes]:
        """The bias follows the axis of the host's output."""
        return {"bias": y[-1:]}


class HostBias(nn.Module):
    """`y + bias`, with a leaf of the host that its own code does not know."""

    def __call__(self, y: jax.Array) -> jax.Array:
        return y + param(self, "bias", nn.initializers.zeros, (y.shape[-1],)).astype(y.dtype)
