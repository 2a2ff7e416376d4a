"""The layer that the adapters share: down to a few dimensions, a non-linearity, and up again."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from jdelta.core import products
from jdelta.core.axes import Axes
from jdelta.core.structure import ModuleInfo
from jdelta.methods.parameter import in_float32

NON_LINEARITIES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda x: x,
}


def require_non_linearity(name: str) -> None:
    """Raises `ValueError` for a name that is not in `NON_LINEARITIES`."""
    if name not in NON_LINEARITIES:
        raise ValueError(f"non_linearity={name!r} is unknown. There are: {', '.join(NON_LINEARITIES)}.")


def reduced(d: int, reduction_factor: int) -> int:
    """`d // reduction_factor`; `ValueError` if that is nothing."""
    if d < reduction_factor:
        raise ValueError(f"reduction_factor={reduction_factor} leaves nothing of {d} dimensions: take at most {d}.")
    return d // reduction_factor


class Bottleneck(nn.Module):
    """`scale · up(act(down(x)))`.

    Attributes:
      bottleneck_dim: width in the middle.
      features: width of the output; `None` for that of the input.
      non_linearity: a key of `NON_LINEARITIES`.
      scale: factor of the output.
      zero_up: whether the kernel of `up` starts at zero, in place of N(0, 0.01²), as that of `down`. The biases are 0.
    """

    bottleneck_dim: int
    features: int | None = None
    non_linearity: str = "gelu_new"
    scale: float = 1.0
    zero_up: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From `(…, d_in)` to `(…, features)`; computes in the dtype of `x`."""
        zeros = in_float32(nn.initializers.zeros)
        dense = functools.partial(nn.Dense, dtype=x.dtype, bias_init=zeros)
        init = in_float32(nn.initializers.normal(0.01))
        up_init = zeros if self.zero_up else init
        down = dense(self.bottleneck_dim, kernel_init=init, dot_general=products.down, name="down")
        up = dense(self.features or x.shape[-1], kernel_init=up_init, dot_general=products.up, name="up")
        y = up(NON_LINEARITIES[self.non_linearity](down(x)))
        return y if self.scale == 1 else self.scale * y

    def sharding_axes(self, host: ModuleInfo, x: Axes, y: Axes) -> dict[str, Axes]:
        """Which axes of the backbone's weights the layer's own follow; those of the middle are whole."""
        down: dict[str, Axes] = {"down.kernel": (*x[-1:], None), "down.bias": (None,)}
        return down | {"up.kernel": (None, *y[-1:]), "up.bias": y[-1:]}
