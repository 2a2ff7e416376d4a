"""Compacter: an adapter with hypercomplex weights (Mahabadi et al. 2021, arXiv 2106.04647).

`y + up(act(down(y)))`, where the weights of `down` and `up` are `Σ_i phm_rule_i ⊗ W_i`: sums of Kronecker products, by
Zhang et al. 2021 (openreview rcQdycl0zyk). Initialised like OpenDelta's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jdelta.core import products
from jdelta.core.axes import Axes
from jdelta.core.config import require_positive, require_positive_int
from jdelta.core.edits import CallEdit
from jdelta.core.method import Method
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.methods.bottleneck import NON_LINEARITIES, reduced, require_non_linearity
from jdelta.methods.parameter import param
from jdelta.trees.surgery import Path


@dataclasses.dataclass(frozen=True)
class CompacterConfig(Method):
    """Arguments of Compacter; `n` is `hypercomplex_division`.

        config = jdelta.CompacterConfig(hypercomplex_division=4)
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      reduction_factor: the width in the middle is `d // reduction_factor`.
      non_linearity: gelu_new, gelu, relu, silu, tanh, …
      hypercomplex_division: number of Kronecker products in a weight; divides `d` and the width in the middle.
      phm_c_init: distribution of the rules, N(0, 0.01²) or U(±0.01).
      hypercomplex_nonlinearity: distribution of each `W_i` or of its two factors, Glorot with gain √2 or
        N(0, phm_init_range²).
      learn_phm: whether the rules train; if not, they stay as they were drawn.
      factorized_phm: `W_i = W_left_i W_right_i`, of rank `phm_rank`.
      factorized_phm_rule: `phm_rule_i = phm_rule_left_i phm_rule_right_i`, of rank 1.
      shared_phm_rule: one rule for all weights of the model.
      shared_W_phm: one `W` for every `down` of the same shape in the model, and one for every `up`.
      phm_rank: rank of each `W_i`.
      phm_init_range: standard deviation for `hypercomplex_nonlinearity="normal"`.
      use_bias_up_sampler: whether `up` has a bias.
      use_bias_down_sampler: whether `down` has a bias.
      zero_up: start the `W` of `up` at 0 (`W_right`, if it is factorised), so that the output is unchanged at
        initialisation. The gradient then reaches that leaf and `up/bias` in the first step, and everything from the
        second on. By default the output is changed a little.
    """

    delta_type = "compacter"
    default_modified_modules = ("attn.proj", "ff.w2", "block")  # block: of ResNet and its like

    reduction_factor: int = 16
    non_linearity: str = "gelu_new"
    hypercomplex_division: int = 4
    phm_c_init: Literal["normal", "uniform"] = "normal"
    hypercomplex_nonlinearity: Literal["glorot-uniform", "glorot-normal", "normal"] = "glorot-uniform"
    learn_phm: bool = True
    factorized_phm: bool = True
    factorized_phm_rule: bool = False
    shared_phm_rule: bool = False
    shared_W_phm: bool = False
    phm_rank: int = 1
    phm_init_range: float = 1e-4
    use_bias_up_sampler: bool = True
    use_bias_down_sampler: bool = True
    zero_up: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reduction_factor", "hypercomplex_division", "phm_rank"):
            require_positive_int(name, getattr(self, name))
        require_positive("phm_init_range", self.phm_init_range)
        require_non_linearity(self.non_linearity)

    def edits(self, host: ModuleInfo, structure: Structure) -> Iterable[CallEdit]:
        d, n = host.y.shape[-1], self.hypercomplex_division
        width = reduced(d, self.reduction_factor)
        if d % n or width % n:
            common = math.gcd(d, width)
            divisors = ", ".join(str(i) for i in range(1, common + 1) if common % i == 0)
            raise ValueError(
                f"hypercomplex_division={n} has to divide the hidden size {d} and the bottleneck {width} = {d} // "
                f"reduction_factor {self.reduction_factor}. Take one of {divisors}, or another reduction_factor."
            )
        yield CallEdit(host.path, "after", Compacter(width, self))

    def generator(self, shapes: Mapping[Path, jax.ShapeDtypeStruct]) -> nn.Module | None:
        wanted = {"phm_rule": self.shared_phm_rule, "W": self.shared_W_phm}
        kinds = tuple(kind for kind in wanted if wanted[kind])
        weights = {path: s.shape for path, s in shapes.items() if path[-2] in ("down", "up")}
        own = {path: shape for path, shape in weights.items() if path[-1].startswith(kinds)}
        return SharedLeaves(self, tuple(own.items())) if own else None

    def frozen(self, leaf: Path) -> bool:
        return not self.learn_phm and leaf[-1].startswith("phm_rule")


class HypercomplexDense(nn.Module):
    """`x (Σ_i phm_rule_i ⊗ W_i) + bias`.

    Attributes:
      features: width of the output.
      config: how the weight is made up.
      use_bias: whether there is a bias.
      zero: start at 0.
    """

    features: int
    config: CompacterConfig
    use_bias: bool = True
    zero: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From `(…, d_in)` to `(…, features)`; computes in the dtype of `x`."""
        n, rank = self.config.hypercomplex_division, self.config.phm_rank
        p, q = x.shape[-1] // n, self.features // n
        if self.config.factorized_phm_rule:
            rule = self._leaf("phm_rule_left", n, n, 1) @ self._leaf("phm_rule_right", n, 1, n)
        else:
            rule = self._leaf("phm_rule", n, n, n)
        if self.config.factorized_phm:
            w = self._leaf("W_left", n, p, rank) @ self._leaf("W_right", n, rank, q)
        else:
            w = self._leaf("W", n, p, q)
        kernel = jnp.einsum("iac,ikl->akcl", rule, w).reshape(n * p, n * q)
        y = (products.down if self.features < x.shape[-1] else products.up)(x, kernel.astype(x.dtype))
        if self.use_bias:
            y += param(self, "bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y

    def _leaf(self, name: str, *shape: int) -> jax.Array:
        return param(self, name, initializer(name, self.config, self.zero), shape)


class Compacter(nn.Module):
    """`y + up(act(down(y)))`.

    Attributes:
      bottleneck_dim: width in the middle.
      config: the other arguments.
    """

    bottleneck_dim: int
    config: CompacterConfig

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        """From `(…, d)` to `(…, d)`."""
        c = self.config
        down = HypercomplexDense(self.bottleneck_dim, c, c.use_bias_down_sampler, name="down")
        up = HypercomplexDense(y.shape[-1], c, c.use_bias_up_sampler, c.zero_up, name="up")
        z = NON_LINEARITIES[c.non_linearity](down(y))
        return y + up(z)

    def sharding_axes(self, host: ModuleInfo, x: Axes, y: Axes) -> dict[str, Axes]:
        """The bias of `up` follows the axis of the host's output. The rules and factors of the weights are whole: they
        are small, and each goes into all of the weight."""
        return {"up.bias": y[-1:]}


class SharedLeaves(nn.Module):
    """Leaves of many adapters, made of one leaf for each kind and shape.

    Attributes:
      config: how they start.
      leaves: path and shape of each; a leaf inside `nn.scan` has an axis of layers before its own three.
    """

    config: CompacterConfig
    leaves: tuple[tuple[Path, tuple[int, ...]], ...]

    @nn.compact
    def __call__(self) -> dict[Path, jax.Array]:
        made = {}
        for path, shape in self.leaves:
            (side, kind), own = path[-2:], shape[-3:]
            name = kind if kind.startswith("phm_rule") else f"{side}_{kind}_{own[1]}x{own[2]}"
            init = initializer(kind, self.config, zero=self.config.zero_up and side == "up")
            made[path] = jnp.broadcast_to(param(self, name, init, own), shape)
        return made


def initializer(kind: str, config: CompacterConfig, zero: bool) -> nn.initializers.Initializer:
    """The initialiser of a leaf of this kind; the leading axis `n` counts matrices."""
    if kind.startswith("phm_rule"):
        return nn.initializers.normal(0.01) if config.phm_c_init == "normal" else _uniform
    if zero and kind in ("W", "W_right"):
        return nn.initializers.zeros
    if config.hypercomplex_nonlinearity == "normal":
        return nn.initializers.normal(config.phm_init_range)
    distribution: Any = config.hypercomplex_nonlinearity.removeprefix("glorot-")
    return nn.initializers.variance_scaling(2, "fan_avg", distribution, batch_axis=0)  # Glorot with gain √2


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -0.01, 0.01)
