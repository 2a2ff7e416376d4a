"""LoRA: a low-rank matrix beside a linear module (Hu et al. 2021, arXiv 2106.09685).

`y + (alpha / r) · dropout(x) a b`. Numbers agree with PyTorch PEFT's for the same weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from jdelta.core.axes import Axes, Axis
from jdelta.core.config import require_positive_int, require_probability
from jdelta.core.edits import CallEdit
from jdelta.core.linear import (
    ConvMap,
    EinsumMap,
    LinearMap,
    LookupMap,
    MatrixMap,
    is_initializer,
    linear_map,
    operands,
    runs_alone,
)
from jdelta.core.method import Method
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.methods import products
from jdelta.methods.parameter import kaiming_uniform, param
from jdelta.methods.products import folded, folding_is_cheaper, rows
from jdelta.trees import addressing
from jdelta.trees.dtypes import takes_steps


@dataclasses.dataclass(frozen=True)
class LoraConfig(Method):
    """Arguments of LoRA.

        config = jdelta.LoraConfig(lora_r=8, modified_modules=["query", "value"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      lora_r: the rank.
      lora_alpha: the update is scaled by `lora_alpha / lora_r`.
      lora_dropout: rate of dropout on the input of `a`.
      rank_pattern: patterns of modules to their own rank, in place of `lora_r`; the first that matches counts.
      alpha_pattern: likewise, in place of `lora_alpha`.
      use_rslora: scale by `lora_alpha / sqrt(lora_r)` (Kalajdzievski 2023, arXiv 2312.03732).
    """

    delta_type = "lora"
    default_modified_modules = ("attn.q", "attn.v", "conv")  # conv: of ResNet and its like

    pattern_fields: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")

    lora_r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    rank_pattern: dict[str, int] | None = dataclasses.field(default=None, hash=False)
    alpha_pattern: dict[str, float] | None = dataclasses.field(default=None, hash=False)
    use_rslora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("lora_r", self.lora_r)
        require_probability("lora_dropout", self.lora_dropout)
        for pattern, rank in (self.rank_pattern or {}).items():
            require_positive_int(f"rank_pattern[{pattern!r}]", rank)

    def rank_of(self, host: str) -> int:
        """The rank at the module of this name."""
        return _first_match(self.rank_pattern or {}, host, self.lora_r)

    def alpha_of(self, host: str) -> float:
        """The `lora_alpha` at the module of this name."""
        return _first_match(self.alpha_pattern or {}, host, self.lora_alpha)

    def scale_of(self, host: str) -> float:
        """The factor of the update of the module of this name."""
        rank = self.rank_of(host)
        return self.alpha_of(host) / (math.sqrt(rank) if self.use_rslora else rank)

    def edits(self, host: ModuleInfo, structure: Structure) -> Iterable[CallEdit]:
        try:
            layer = self._layer(host)
        except TypeError as error:
            raise TypeError(f"{error}{_instead(host, structure)}") from error
        yield CallEdit(host.path, "parallel", layer)

    def _layer(self, host: ModuleInfo) -> Lora:
        try:
            linear = linear_map(host)
        except TypeError as error:
            raise TypeError(f"LoRA needs a linear module; {error}") from error
        rank, shape = self.rank_of(host.name), host.params[linear.weights].shape
        common: dict[str, Any] = {"rank": rank, "scale": self.scale_of(host.name), "linear": linear}
        if isinstance(linear, LookupMap):
            _warn_of_rank(host, rank, *shape)
            return LoraEmbed(**common, features=shape[1:], num_embeddings=shape[0], dtype=host.y.dtype)
        common["dropout"] = self.lora_dropout
        if isinstance(linear, EinsumMap):
            layer = LoraEinsum(**common, features=(), sizes=shape)
            size = dict(zip(operands(linear.equation)[1], shape, strict=True)) | {_RANK: 1}
            _warn_of_rank(host, rank, *(math.prod(size[axis] for axis in axes) for axes in layer._factors()))
            return layer
        if isinstance(linear, ConvMap):
            _warn_of_rank(host, rank, math.prod(shape[:-1]), shape[-1])
            return LoraConv(**common, features=shape[-1:])
        n = len(linear.axis)
        d_in, features = (shape[1:], shape[:1]) if linear.transposed else (shape[:n], shape[n:])
        _warn_of_rank(host, rank, math.prod(d_in), math.prod(features))
        return Lora(**common, features=features, runs_alone=runs_alone(host))


class Lora(nn.Module):
    """The update of a module that multiplies some axes of its input with a matrix, such as `nn.Dense`.

    Attributes:
      rank: rank of the update.
      scale: factor of the update.
      features: shape of the output's new axes, `(d_out,)` for `nn.Dense`.
      linear: how the host is linear: in which of its leaves, and along which axes.
      dropout: rate of dropout on the input.
      runs_alone: whether the host can be run on its own parameters and one array.
    """

    rank: int
    scale: float
    features: tuple[int, ...]
    linear: LinearMap = MatrixMap()
    dropout: float = 0.0
    runs_alone: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """From `(…, *d_in)` to `(…, *features)`; computes in the dtype of `x`."""
        x = self.dropped(x, deterministic)
        a = param(self, "a", kaiming_uniform, (*(x.shape[i] for i in self._axis), self.rank))
        b = param(self, "b", nn.initializers.zeros, (self.rank, *self.features))
        return _changed(self.clone(parent=None, name=None), x, {"a": a, "b": b})

    @nn.nowrap
    def change(self, x: jax.Array, own: Mapping[str, jax.Array]) -> jax.Array:
        """The same, with the leaves `a` and `b` as an argument."""
        n = len(self._axis)
        if self._axis != (-1,):
            x = jnp.moveaxis(x, self._axis, range(-n, 0))
        a = own["a"].reshape(-1, self.rank).astype(x.dtype)
        z = products.down(x.reshape(*rows(x.shape[:-n]), len(a)), a)
        return self.up(z, own["b"]).reshape(*x.shape[:-n], *self.features)

    @nn.nowrap
    def fused_with_host(self, host: nn.Module, x: jax.Array, deterministic: bool = True) -> jax.Array | None:
        """What a bound host and the layer compute together, where that is cheaper than one beside the other.

        Only in float32: in less, a small update would be lost in the rounding of the weights.
        """
        shape = tuple(x.shape[i] for i in self._axis)
        d_in, d_out = math.prod(shape), math.prod(self.features)
        if not self.runs_alone or (self.dropout and not deterministic):
            return None
        if not folding_is_cheaper(x.size // d_in, d_in, d_out):
            return None
        own, weights = _own_leaves(self), _own_leaves(host)
        shapes = {"a": (*shape, self.rank), "b": (self.rank, *self.features)}
        if {key: leaf.shape for key, leaf in own.items()} != shapes or self.linear.weights not in weights:
            return None  # not made yet, or an error that `__call__` reports
        leaves = (x, *weights.values(), *own.values())
        dtypes = [getattr(host, "dtype", None) or "float32", *(leaf.dtype for leaf in leaves)]
        if any(jnp.dtype(dtype) != jnp.float32 for dtype in dtypes):
            return None

        # Without what differs between equal layers: the pair is traced once for all of them.
        fields = {field.name: getattr(host, field.name) for field in dataclasses.fields(host)}
        plain = {key: nn.initializers.zeros for key, value in fields.items() if is_initializer(key, value)}
        pair = _Pair(host.clone(parent=None, name=None, **plain), self.clone(parent=None, name=None))
        try:
            hash(pair)
        except TypeError:  # a list in a field of the host
            return None
        return folded(pair, x, weights, own)

    def fold(
        self, host: ModuleInfo, weights: Mapping[str, jax.Array], own: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """The host's weights with the update added, computed in float32."""
        return {self.linear.weights: self.added(weights[self.linear.weights], own)}

    @nn.nowrap
    def added(self, weights: jax.Array, own: Mapping[str, jax.Array]) -> jax.Array:
        """The host's leaf with the update added."""
        change = self.update(own)
        if isinstance(self.linear, MatrixMap):
            change = self.linear.stored(change)
        wide = jnp.promote_types(weights.dtype, jnp.float32) if takes_steps(weights.dtype) else jnp.float32
        return (weights.astype(wide) + change).astype(weights.dtype)

    @nn.nowrap
    def update(self, own: Mapping[str, jax.Array]) -> jax.Array:
        """What `a` and `b` add to the weights, `(*d_in, *features)`, in float32."""
        return self.scale * jnp.tensordot(own["a"].astype(jnp.float32), own["b"].astype(jnp.float32), 1)

    def sharding_axes(self, host: ModuleInfo, x: Axes, y: Axes) -> dict[str, Axes]:
        """Which axes of the backbone's weights those of `a` and `b` follow."""
        return {"a": (*x, None), "b": (None, *y)}

    @property
    def _axis(self) -> tuple[int, ...]:
        return getattr(self.linear, "axis", (-1,))

    def dropped(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """The input after dropout."""
        return nn.Dropout(self.dropout)(x, deterministic) if self.dropout else x

    @nn.nowrap
    def up(self, z: jax.Array, b: jax.Array) -> jax.Array:
        """From `(…, rank)` to `(…, features)`, all features in one axis."""
        return products.up(z, (self.scale * b.reshape(self.rank, -1)).astype(z.dtype))


@functools.partial(jax.jit, static_argnums=0)  # traced once for all layers that are alike
def _changed(lora: Lora, x: jax.Array, own: Mapping[str, jax.Array]) -> jax.Array:
    return lora.change(x, own)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A host and its update, neither of them bound."""

    host: nn.Module
    lora: Lora

    def run(self, x: jax.Array, weights: Mapping[str, jax.Array]) -> jax.Array:
        return self.host.apply({"params": weights}, x)

    def fold(self, weights: Mapping[str, jax.Array], own: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        key = self.lora.linear.weights
        return {**weights, key: self.lora.added(weights[key], own)}

    def change(self, x: jax.Array, own: Mapping[str, jax.Array]) -> jax.Array:
        return self.lora.change(x, own)


class LoraConv(Lora):
    """The update of an `nn.Conv`: a convolution to `rank` channels, then a 1×1 convolution.

    Of channels in groups, each group has its own columns of `b`, and `a` is the same for all.
    """

    linear: ConvMap = ConvMap()
    fused_with_host = None

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        x, groups = self.dropped(x, deterministic), self.linear.groups
        window = dict(self.linear.conv)["kernel_size"]
        a = param(self, "a", kaiming_uniform, (*window, x.shape[-1] // groups, self.rank))
        z = self.linear.product(x, jnp.tile(a, groups).astype(x.dtype))
        b = param(self, "b", nn.initializers.zeros, (self.rank, *self.features)).astype(z.dtype)
        if groups == 1:
            return self.up(z.reshape(*rows(z.shape[:-1]), self.rank), b).reshape(*z.shape[:-1], *self.features)
        z, b = z.reshape(*z.shape[:-1], groups, -1), b.reshape(self.rank, groups, -1)
        return self.scale * jnp.einsum("...gr,rgo->...go", z, b).reshape(*z.shape[:-2], *self.features)

    def sharding_axes(self, host: ModuleInfo, x: Axes, y: Axes) -> dict[str, Axes]:
        window = len(host.params[self.linear.weights].shape) - 2
        return {"a": (*[None] * window, *x, None), "b": (None, *y)}


class LoraEmbed(Lora):
    """The update of an `nn.Embed`: rows of `a` in place of a product. As in PEFT, here `a` is 0 and `b` N(0, 1).

    Attributes:
      num_embeddings: number of rows.
      dtype: to compute in.
    """

    num_embeddings: int = 0
    dtype: Any = jnp.float32
    fused_with_host = None

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        a = param(self, "a", nn.initializers.zeros, (self.num_embeddings, self.rank))
        b = param(self, "b", nn.initializers.normal(1.0), (self.rank, *self.features))
        z = jnp.take(a, ids.reshape(rows(ids.shape)), axis=0).astype(self.dtype)
        return self.up(z, b).reshape(*ids.shape, *self.features)


class LoraEinsum(Lora):
    """The update of a module that computes `einsum(equation, x, weights)`, such as `nn.Einsum` and Gemma's layers.

    Axes that weights, input and output share, of experts for example, stand first in both `a` and `b`.

    Attributes:
      sizes: of the weights' axes.
    """

    linear: EinsumMap = EinsumMap()
    sizes: tuple[int, ...] = ()
    fused_with_host = None

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        x_axes, w_axes, y_axes = operands(self.linear.equation)
        a_axes, b_axes = self._factors()
        size = dict(zip(w_axes, self.sizes, strict=True)) | {_RANK: self.rank}
        a = param(self, "a", kaiming_uniform, tuple(size[axis] for axis in a_axes))
        b = param(self, "b", nn.initializers.zeros, tuple(size[axis] for axis in b_axes))
        middle = "".join(axis for axis in x_axes if axis not in w_axes or axis in y_axes) + _RANK
        z = jnp.einsum(f"{x_axes},{a_axes}->{middle}", self.dropped(x, deterministic), a.astype(x.dtype))
        return jnp.einsum(f"{middle},{b_axes}->{y_axes}", z, b.astype(x.dtype)) * self.scale

    @nn.nowrap
    def update(self, own: Mapping[str, jax.Array]) -> jax.Array:
        a_axes, b_axes = self._factors()
        equation = f"{a_axes},{b_axes}->{operands(self.linear.equation)[1]}"
        return self.scale * jnp.einsum(equation, own["a"].astype(jnp.float32), own["b"].astype(jnp.float32))

    def sharding_axes(self, host: ModuleInfo, x: Axes, y: Axes) -> dict[str, Axes]:
        path, w_axes = (*host.path, self.linear.weights), operands(self.linear.equation)[1]
        own = {name: Axis(path, i) for i, name in enumerate(w_axes)}
        a_axes, b_axes = self._factors()
        return {"a": tuple(map(own.get, a_axes)), "b": tuple(map(own.get, b_axes))}

    def _factors(self) -> tuple[str, str]:
        """The axes of `a` and of `b`."""
        x_axes, w_axes, y_axes = operands(self.linear.equation)
        summed = "".join(axis for axis in w_axes if axis not in y_axes)
        new = "".join(axis for axis in w_axes if axis not in x_axes)
        shared = self.linear.shared
        return shared + summed + _RANK, shared + _RANK + new


def _instead(host: ModuleInfo, structure: Structure) -> str:
    """What can be done where a module has no kernel of its own."""
    if "kernel" in host.params:
        return ""
    weighted = (
        info for info in structure.below(host.path) if any(len(leaf.shape) > 1 for leaf in info.params.values())
    )
    inside = [info.name for info in weighted if info is not host and not info.sharing]
    if inside:
        return f" Name a linear module inside it, such as {inside[0]!r}."
    ways = f" An adapter goes after any module; its parameters can train, with unfrozen_modules=[{host.name!r}]."
    if host.sharing:
        classes = ", ".join(cls.__name__ for cls in host.sharing.values())
        return (
            f" It holds the weights of modules in its scope (nn.share_scope: {classes}), which cannot be named.{ways}"
        )
    return ways if host.params else ""


def _own_leaves(module: nn.Module) -> dict[str, jax.Array]:
    """The parameters of a bound module, without those of modules and deltas inside it."""
    leaves = module.variables.get("params", {})
    return {key: meta.unbox(leaf) for key, leaf in leaves.items() if not isinstance(leaf, Mapping)}


def _warn_of_rank(host: ModuleInfo, rank: int, d_in: int, d_out: int) -> None:
    """Such ranks are valid, and PEFT's `all-linear` makes them where a classifier has few outputs."""
    if rank > min(d_in, d_out):
        warnings.warn(
            f"LoraModel at {host.name}: lora_r={rank} is above the width of this module, {d_in} -> {d_out}, whose "
            f"changes have rank {min(d_in, d_out)} at most. With that in rank_pattern, less is trained and stored.",
            stacklevel=2,
        )


_RANK = "ρ"  # einsum takes any letter, and nobody uses this one


def _first_match(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """What the first pattern that means this name stands for."""
    return next((value for pattern, value in patterns.items() if addressing.matches(name, pattern)), otherwise)
