"""IA3: features are scaled by trained vectors (Liu et al. 2022, arXiv 2205.05638).

`y ⊙ l` of what a module computes, its bias included; in the feed-forward `x ⊙ l` of what it gets. Numbers agree with
PyTorch PEFT's for the same weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from jdelta.core.edits import Edit
from jdelta.core.linear import linear_map, weight_edits
from jdelta.core.linear_maps import ConvMap
from jdelta.core.method import Method
from jdelta.core.rules import Leaves, Side
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.names import common_names
from jdelta.trees import addressing


@dataclasses.dataclass(frozen=True)
class IA3Rule:
    """`z ⊙ l`, of a module's input or output.

    Attributes:
      side: of which features.
      random: whether `l` starts at N(0, 1), and not at 1.
    """

    side: Side
    random: bool = False

    @property
    def axes(self) -> Mapping[str, tuple[Side | None, ...]]:
        """That of the features, which have an entry of `l` each."""
        return {"l": (self.side,)}

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        return {"l": _start(key, weight.shape[self.side == "out"], self.random)}

    def transform(self, z: jax.Array, own: Leaves) -> jax.Array:
        return z * own["l"].astype(z.dtype)


@dataclasses.dataclass(frozen=True)
class IA3ChannelRule:
    """`x ⊙ l` of a convolution's input, with an entry of `l` for each channel: `ΔW = W ⊙ (l − 1)`.

    Attributes:
      channels: of the input.
      groups: of channels, each of which meets columns of the weight of its own.
      random: as that of `IA3Rule`.
    """

    channels: int
    groups: int = 1
    random: bool = False

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        return {"l": _start(key, self.channels, self.random)}

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        by_group = weight.reshape(-1, self.channels // self.groups, self.groups, weight.shape[1] // self.groups)
        scale = own["l"].reshape(self.groups, -1).T[:, :, None]
        return (by_group * (scale - 1)).reshape(weight.shape)


def _start(key: jax.Array, size: int, random: bool) -> jax.Array:
    return jax.random.normal(key, (size,)) if random else jnp.ones(size)


@dataclasses.dataclass(frozen=True)
class IA3Config(Method):
    """Arguments of IA3.

        config = jdelta.IA3Config(modified_modules=["key", "output.dense"], feedforward_modules=["output.dense"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      feedforward_modules: patterns of those of the changed modules whose input is scaled, and not the output. `None`:
        those with the common name `ff.w2`.
      init_ia3_weights: whether the scales start at 1. Otherwise they start at N(0, 1), and the output changes at once.
    """

    delta_type = "ia3"
    default_modified_modules = ("attn.k", "attn.v", "crossattn.k", "crossattn.v", "ff.w2")

    pattern_fields: ClassVar[tuple[str, ...]] = ("feedforward_modules",)

    feedforward_modules: tuple[str, ...] | None = None
    init_ia3_weights: bool = True

    def edits(self, host: ModuleInfo, structure: Structure) -> Iterable[Edit]:
        rule = self.rule(host.name)
        if self.feedforward_modules is None and common_names.means(structure, "ff.w2", host):
            rule = IA3Rule("in", rule.random)
        if rule.side == "in" and isinstance(linear := linear_map(host), ConvMap):
            channels = linear.groups * host.params[linear.weights].shape[-2]
            return weight_edits(host, IA3ChannelRule(channels, linear.groups, rule.random))
        return weight_edits(host, rule)

    def rule(self, name: str) -> IA3Rule:
        scales_input = any(addressing.matches(name, pattern) for pattern in self.feedforward_modules or ())
        return IA3Rule("in" if scales_input else "out", random=not self.init_ia3_weights)
