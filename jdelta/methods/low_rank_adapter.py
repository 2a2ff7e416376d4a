"""Low-rank adapter: an adapter whose two weights are products (a baseline of Mahabadi et al. 2021, arXiv 2106.04647).

`y + up(act(down(y)))`, where `down` and `up` are `x left right + bias`. Initialised like OpenDelta's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

import jax
from flax import linen as nn

from jdelta.core import products
from jdelta.core.axes import Axes
from jdelta.core.config import require_positive_int
from jdelta.core.edits import CallEdit
from jdelta.core.method import Method
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.methods.bottleneck import NON_LINEARITIES, reduced, require_non_linearity
from jdelta.methods.parameter import param

# Glorot with gain √2
INITIALIZERS: dict[str, nn.initializers.Initializer] = {
    "glorot-uniform": nn.initializers.variance_scaling(2, "fan_avg", "uniform"),
    "glorot-normal": nn.initializers.variance_scaling(2, "fan_avg", "normal"),
}


@dataclasses.dataclass(frozen=True)
class LowRankAdapterConfig(Method):
    """Arguments of LowRankAdapter.

        config = jdelta.LowRankAdapterConfig(low_rank_rank=1)
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      reduction_factor: the width in the middle is `d // reduction_factor`.
      non_linearity: gelu_new, gelu, relu, silu, tanh, …
      low_rank_rank: rank of each of the two weights.
      low_rank_w_init: distribution of `left` and `right`.
      zero_up: start `up/right` at 0, so that the output is unchanged at initialisation. The gradient then reaches
        `up/right` and `up/bias` in the first step, and everything from the second on. By default all are Glorot,
        and the output is changed.
    """

    delta_type = "low_rank_adapter"
    default_modified_modules = ("attn.proj", "ff.w2", "block")  # block: of ResNet and its like

    reduction_factor: int = 32
    non_linearity: str = "gelu_new"
    low_rank_rank: int = 1
    low_rank_w_init: Literal["glorot-uniform", "glorot-normal"] = "glorot-uniform"
    zero_up: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("reduction_factor", self.reduction_factor)
        require_positive_int("low_rank_rank", self.low_rank_rank)
        require_non_linearity(self.non_linearity)

    def edits(self, host: ModuleInfo, structure: Structure) -> Iterable[CallEdit]:
        width = reduced(host.y.shape[-1], self.reduction_factor)
        yield CallEdit(host.path, "after", LowRankAdapter(width, self))


class LowRankDense(nn.Module):
    """`x left right + bias`.

    Attributes:
      features: width of the output.
      rank: rank of the weight.
      left_init: initialiser of `left`, `(d_in, rank)`.
      right_init: initialiser of `right`, `(rank, features)`; the bias is 0.
    """

    features: int
    rank: int
    left_init: nn.initializers.Initializer
    right_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From `(…, d_in)` to `(…, features)`; computes in the dtype of `x`."""
        left = param(self, "left", self.left_init, (x.shape[-1], self.rank))
        right = param(self, "right", self.right_init, (self.rank, self.features))
        bias = param(self, "bias", nn.initializers.zeros, (self.features,))
        return products.up(products.down(x, left.astype(x.dtype)), right.astype(x.dtype)) + bias.astype(x.dtype)


class LowRankAdapter(nn.Module):
    """`y + up(act(down(y)))`.

    Attributes:
      bottleneck_dim: width in the middle.
      config: the other arguments.
    """

    bottleneck_dim: int
    config: LowRankAdapterConfig

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        """From `(…, d)` to `(…, d)`."""
        rank, init = self.config.low_rank_rank, INITIALIZERS[self.config.low_rank_w_init]
        last = nn.initializers.zeros if self.config.zero_up else init
        down = LowRankDense(self.bottleneck_dim, rank, init, init, name="down")
        up = LowRankDense(y.shape[-1], rank, init, last, name="up")
        z = NON_LINEARITIES[self.config.non_linearity](down(y))
        return y + up(z)

    def sharding_axes(self, host: ModuleInfo, x: Axes, y: Axes) -> dict[str, Axes]:
        """`left` of `down`, and `right` and the bias of `up`, follow the axis of the host's output."""
        return {"down.left": (*x[-1:], None), "up.right": (None, *y[-1:]), "up.bias": y[-1:]}
