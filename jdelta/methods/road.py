"""RoAd: rotations of pairs of output features (Liao and Monz 2024, arXiv 2409.00119).

`y = (x W + bias) R`, where `R` turns the features two by two, and scales them. Numbers agree with PyTorch PEFT's for
the same weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jdelta.core.config import require_positive_int
from jdelta.core.edits import Edit
from jdelta.core.linear import linear_map
from jdelta.core.linear_maps import ConvMap
from jdelta.core.method import Method
from jdelta.core.rules import Leaves, Side
from jdelta.core.structure import ModuleInfo, Structure


@dataclasses.dataclass(frozen=True)
class RoadRule:
    """The features `(z_i, z_j)` become `(a_i cos θ_i z_i − a_i sin θ_i z_j, a_j sin θ_j z_i + a_j cos θ_j z_j)`.

    `j` is `i + group_size / 2`, where `i` is in the first half of a group of features.

    Attributes:
      variant: `"road_1"`: `θ` and `a` are the same for `i` and `j`; `"road_2"`: they are not; `"road_4"`: those of the
        sine and the cosine are not the same either.
      group_size: features in a group.
    """

    side: ClassVar[Side] = "out"

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64

    @property
    def axes(self) -> Mapping[str, tuple[Side | None, ...]]:
        """One number for each feature that comes out follows that axis; half as many or twice as many do not."""
        return dict.fromkeys(("theta", "alpha"), ("out" if self.variant == "road_2" else None,))

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        d_out = weight.shape[1]
        if d_out % self.group_size:
            raise ValueError(f"group_size={self.group_size} does not divide the number of output features, {d_out}.")
        size = {"road_1": d_out // 2, "road_2": d_out, "road_4": 2 * d_out}[self.variant]
        return {"theta": jnp.zeros(size), "alpha": jnp.ones(size)}

    def transform(self, z: jax.Array, own: Leaves) -> jax.Array:
        half = self.group_size // 2
        groups = z.shape[-1] // self.group_size
        theta, alpha = (own[key].reshape(groups, -1, half) for key in ("theta", "alpha"))  # -1: 1, 2 or 4
        cosine, sine = jnp.cos(theta[:, :2]) * alpha[:, :2], jnp.sin(theta[:, -2:]) * alpha[:, -2:]
        pairs = z.reshape(*z.shape[:-1], groups, 2, half)
        turned = jnp.stack([-pairs[..., 1, :], pairs[..., 0, :]], axis=-2)
        return (pairs * cosine + turned * sine).reshape(z.shape)


@dataclasses.dataclass(frozen=True)
class RoadConfig(Method):
    """Arguments of RoAd.

        config = jdelta.RoadConfig(variant="road_2", group_size=32, modified_modules=["query", "value"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      variant: `"road_1"`: an angle and a scale for each pair of features; `"road_2"`: for each feature; `"road_4"`: two
        of each for each feature, one for the cosine and one for the sine.
      group_size: the features are cut into groups of this size, in which those of the first half are paired with those
        of the second. It is even, and divides the number of a module's output features.
    """

    delta_type = "road"
    default_modified_modules = ("attn.q", "attn.v", "conv")

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("group_size", self.group_size)
        if self.group_size % 2:
            raise ValueError(f"group_size is even, since it holds pairs of features, got {self.group_size}.")

    def rule(self, name: str) -> RoadRule:
        return RoadRule(self.variant, self.group_size)

    def edits(self, host: ModuleInfo, structure: Structure) -> Iterable[Edit]:
        """Those of the weight and the bias. Groups of channels have weights of their own, which cannot be mixed."""
        edits = list(super().edits(host, structure))
        linear = linear_map(host)
        if isinstance(linear, ConvMap) and linear.groups > 1:
            channels = host.params[linear.weights].shape[-1] // linear.groups
            if channels % self.group_size:
                raise ValueError(
                    f"group_size={self.group_size} pairs features of different groups of this convolution, which have "
                    f"{channels} channels each. A group_size that divides {channels} does not."
                )
        return edits
