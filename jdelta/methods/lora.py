"""LoRA: a low-rank matrix beside a linear module (Hu et al. 2021, arXiv 2106.09685).

`y + (alpha / r) · dropout(x) a b`. Numbers agree with PyTorch PEFT's for the same weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from jdelta import addressing
from jdelta.axes import Axes, Axis, is_transposed
from jdelta.config import DeltaConfig, require_positive_int, require_probability
from jdelta.delta import DeltaModel
from jdelta.interception import Edit
from jdelta.methods import products
from jdelta.methods.leaf import kaiming_uniform, leaf
from jdelta.methods.products import folded, folding_is_cheaper, rows
from jdelta.structure import ModuleInfo, Structure


@dataclasses.dataclass(frozen=True)
class LoraConfig(DeltaConfig):
    """Arguments of LoRA.

    Attributes:
      lora_r: the rank.
      lora_alpha: the update is scaled by `lora_alpha / lora_r`.
      lora_dropout: rate of dropout on the input of `a`.
      rank_pattern: patterns of modules to their own rank, in place of `lora_r`; the first that matches counts.
      alpha_pattern: likewise, in place of `lora_alpha`.
      use_rslora: scale by `lora_alpha / sqrt(lora_r)` (Kalajdzievski 2023, arXiv 2312.03732).
    """

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


class Lora(nn.Module):
    """The update of a module that is linear in the `axis` of its input, such as `nn.Dense` and `nn.DenseGeneral`.

    Attributes:
      rank: rank of the update.
      scale: factor of the update.
      features: shape of the output's new axes, `(d_out,)` for `nn.Dense`.
      axis: the input's axes that are contracted.
      dropout: rate of dropout on the input.
    """

    rank: int
    scale: float
    features: tuple[int, ...]
    axis: tuple[int, ...] = (-1,)
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """From `(…, *d_in)` to `(…, *features)`; computes in the dtype of `x`."""
        x = self.dropped(x, deterministic)
        a = leaf(self, "a", kaiming_uniform, (*(x.shape[i] for i in self.axis), self.rank))
        b = leaf(self, "b", nn.initializers.zeros, (self.rank, *self.features))
        return _changed(self.clone(parent=None, name=None), x, {"a": a, "b": b})

    @nn.nowrap
    def change(self, x: jax.Array, own: Mapping[str, jax.Array]) -> jax.Array:
        """The same, with the leaves `a` and `b` as an argument."""
        n = len(self.axis)
        if self.axis != (-1,):
            x = jnp.moveaxis(x, self.axis, range(-n, 0))
        a = own["a"].reshape(-1, self.rank).astype(x.dtype)
        z = products.down(x.reshape(*rows(x.shape[:-n]), len(a)), a)
        return self.up(z, own["b"]).reshape(*x.shape[:-n], *self.features)

    @nn.nowrap
    def joined(self, host: nn.Module, x: jax.Array, deterministic: bool = True) -> jax.Array | None:
        """What a bound host and the layer compute together, where that is cheaper than one beside the other.

        Only in float32: in less, a small update would be lost in the rounding of the weights.
        """
        shape = tuple(x.shape[i] for i in self.axis)
        d_in, d_out = math.prod(shape), math.prod(self.features)
        if (self.dropout and not deterministic) or not folding_is_cheaper(x.size // d_in, d_in, d_out):
            return None
        own, weights = _own_leaves(self), _own_leaves(host)
        shapes = {"a": (*shape, self.rank), "b": (self.rank, *self.features)}
        if {key: leaf.shape for key, leaf in own.items()} != shapes or "kernel" not in weights:
            return None  # not made yet, or an error that `__call__` reports
        transposed = False if isinstance(host, (nn.Dense, nn.DenseGeneral)) else _is_transposed(weights["kernel"], own)
        leaves = (x, *weights.values(), *own.values())
        dtypes = [getattr(host, "dtype", None) or "float32", *(leaf.dtype for leaf in leaves)]
        if transposed is None or any(jnp.dtype(dtype) != jnp.float32 for dtype in dtypes):
            return None

        # Without what differs between equal layers: the pair is traced once for all of them.
        plain = {field.name: nn.initializers.zeros for field in dataclasses.fields(host) if field.name[-5:] == "_init"}
        pair = _Pair(host.clone(parent=None, name=None, **plain), self.clone(parent=None, name=None), transposed)
        try:
            hash(pair)
        except TypeError:  # a list in a field of the host
            return None
        return folded(pair, x, weights, own)

    def fold(
        self, host: ModuleInfo, weights: Mapping[str, jax.Array], own: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """The host's weights with the update added, computed in float32."""
        key = "embedding" if "embedding" in weights else "kernel"
        change = self.update(own)
        if key == "kernel" and len(change.shape) == 2 and is_transposed(host):
            change = change.T
        return {key: (weights[key] + change).astype(weights[key].dtype)}

    @nn.nowrap
    def update(self, own: Mapping[str, jax.Array]) -> jax.Array:
        """What `a` and `b` add to the weights, `(*d_in, *features)`, in float32."""
        return self.scale * jnp.tensordot(own["a"].astype(jnp.float32), own["b"].astype(jnp.float32), 1)

    def follows(self, host: ModuleInfo, x: Axes, y: Axes) -> dict[str, Axes]:
        """Which axes of the backbone's weights those of `a` and `b` follow."""
        return {"a": (*x, None), "b": (None, *y)}

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
    transposed: bool

    def run(self, x: jax.Array, weights: Mapping[str, jax.Array]) -> jax.Array:
        return self.host.apply({"params": weights}, x)

    def fold(self, weights: Mapping[str, jax.Array], own: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        change = self.lora.update(own)
        return {**weights, "kernel": weights["kernel"] + (change.T if self.transposed else change)}

    def change(self, x: jax.Array, own: Mapping[str, jax.Array]) -> jax.Array:
        return self.lora.change(x, own)


class LoraConv(Lora):
    """The update of an `nn.Conv`: a convolution to `rank` channels, then a 1×1 convolution.

    Attributes:
      conv: the hyperparameters of the host that say where its windows lie.
      groups: of channels, in the host; each has its own columns of `b`, and `a` is the same for all.
    """

    conv: tuple[tuple[str, Any], ...] = ()
    groups: int = 1
    joined = None

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        x = self.dropped(x, deterministic)
        hyper = {"use_bias": False, "dtype": x.dtype, "feature_group_count": self.groups, **dict(self.conv)}
        down = nn.Conv(self.groups * self.rank, **hyper, parent=None)
        window = down.kernel_size
        window = (window,) if isinstance(window, int) else tuple(window)
        a = leaf(self, "a", kaiming_uniform, (*window, x.shape[-1] // self.groups, self.rank))
        z = down.apply({"params": {"kernel": jnp.tile(a, self.groups)}}, x)
        b = leaf(self, "b", nn.initializers.zeros, (self.rank, *self.features)).astype(z.dtype)
        if self.groups == 1:
            return self.up(z.reshape(*rows(z.shape[:-1]), self.rank), b).reshape(*z.shape[:-1], *self.features)
        z, b = z.reshape(*z.shape[:-1], self.groups, -1), b.reshape(self.rank, self.groups, -1)
        return self.scale * jnp.einsum("...gr,rgo->...go", z, b).reshape(*z.shape[:-2], *self.features)

    def follows(self, host: ModuleInfo, x: Axes, y: Axes) -> dict[str, Axes]:
        window = len(host.params["kernel"].shape) - 2
        return {"a": (*[None] * window, *x, None), "b": (None, *y)}


class LoraEmbed(Lora):
    """The update of an `nn.Embed`: rows of `a` in place of a product. As in PEFT, here `a` is 0 and `b` N(0, 1).

    Attributes:
      num_embeddings: number of rows.
      dtype: to compute in.
    """

    num_embeddings: int = 0
    dtype: Any = jnp.float32
    joined = None

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        a = leaf(self, "a", nn.initializers.zeros, (self.num_embeddings, self.rank))
        b = leaf(self, "b", nn.initializers.normal(1.0), (self.rank, *self.features))
        z = jnp.take(a, ids.reshape(rows(ids.shape)), axis=0).astype(self.dtype)
        return self.up(z, b).reshape(*ids.shape, *self.features)


class LoraEinsum(Lora):
    """The update of a module that computes `einsum(equation, x, weights)`, such as `nn.Einsum` and Gemma's layers.

    Axes that weights, input and output share, of experts for example, stand first in both `a` and `b`.

    Attributes:
      equation: of the host.
      weights: their name in the host.
      sizes: of the weights' axes.
    """

    equation: str = ""
    weights: str = "kernel"
    sizes: tuple[int, ...] = ()
    joined = None

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        x_axes, w_axes, y_axes = _operands(self.equation)
        a_axes, b_axes = self._factors()
        size = dict(zip(w_axes, self.sizes, strict=True)) | {_RANK: self.rank}
        a = leaf(self, "a", kaiming_uniform, tuple(size[axis] for axis in a_axes))
        b = leaf(self, "b", nn.initializers.zeros, tuple(size[axis] for axis in b_axes))
        middle = "".join(axis for axis in x_axes if axis not in w_axes or axis in y_axes) + _RANK
        z = jnp.einsum(f"{x_axes},{a_axes}->{middle}", self.dropped(x, deterministic), a.astype(x.dtype))
        return jnp.einsum(f"{middle},{b_axes}->{y_axes}", z, b.astype(x.dtype)) * self.scale

    def fold(
        self, host: ModuleInfo, weights: Mapping[str, jax.Array], own: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        a_axes, b_axes = self._factors()
        equation = f"{a_axes},{b_axes}->{_operands(self.equation)[1]}"
        change = self.scale * jnp.einsum(equation, own["a"].astype(jnp.float32), own["b"].astype(jnp.float32))
        return {self.weights: (weights[self.weights] + change).astype(weights[self.weights].dtype)}

    def follows(self, host: ModuleInfo, x: Axes, y: Axes) -> dict[str, Axes]:
        path, w_axes = (*host.path, self.weights), _operands(self.equation)[1]
        own = {name: Axis(path, i) for i, name in enumerate(w_axes)}
        a_axes, b_axes = self._factors()
        return {"a": tuple(map(own.get, a_axes)), "b": tuple(map(own.get, b_axes))}

    def _factors(self) -> tuple[str, str]:
        """The axes of `a` and of `b`."""
        x_axes, w_axes, y_axes = _operands(self.equation)
        shared = "".join(axis for axis in w_axes if axis in x_axes and axis in y_axes)
        summed = "".join(axis for axis in w_axes if axis not in y_axes)
        new = "".join(axis for axis in w_axes if axis not in x_axes)
        return shared + summed + _RANK, shared + _RANK + new


class LoraModel(DeltaModel):
    """LoRA on linear modules: Dense, DenseGeneral, Conv, Embed, Einsum, and whatever else has a 2-D kernel.

        delta = jdelta.LoraModel(model, modified_modules=["query", "value"], lora_r=8)

    By default it sits on query and value, or in a model without attention on the convolutions of its blocks.
    The leaves are `lora/a`, `(*d_in, r)`, and `lora/b`, `(r, *d_out)`. The output is unchanged at initialisation.
    Its own arguments are those of `LoraConfig`, the common ones and errors those of `DeltaModel`.
    """

    delta_type = "lora"
    config_class = LoraConfig
    default_modified_modules = ("attn.q", "attn.v", "conv")  # conv: of ResNet and its like

    def edits(self, host: ModuleInfo, structure: Structure) -> Iterable[Edit]:
        yield Edit(host.path, "parallel", self._layer(host), leaf=(self.name,))

    def _layer(self, host: ModuleInfo) -> Lora:
        config: LoraConfig = self.config
        rank = config.rank_of(host.name)
        common: dict[str, Any] = {"rank": rank, "scale": config.scale_of(host.name)}
        if issubclass(host.type, nn.Embed):
            rows, width = host.params["embedding"].shape
            _check_rank(rank, rows, width)
            return LoraEmbed(**common, features=(width,), num_embeddings=rows, dtype=host.y.dtype)
        common["dropout"] = config.lora_dropout
        if (equation := _equation(host)) is not None:
            w_axes = _operands(equation)[1]
            key = next(key for key, weights in host.params.items() if len(weights.shape) == len(w_axes))
            sizes = host.params[key].shape
            layer = LoraEinsum(**common, features=(), equation=equation, weights=key, sizes=sizes)
            a_axes, b_axes = layer._factors()
            widths = (math.prod(sizes[w_axes.index(i)] for i in axes if i != _RANK) for axes in (a_axes, b_axes))
            _check_rank(rank, *widths)
            return layer
        kernel = host.params.get("kernel")
        if kernel is None:
            raise TypeError("LoRA needs a linear module; this one has no kernel of its own. Name a Dense inside it.")
        if not jnp.issubdtype(host.x.dtype, jnp.floating):
            raise TypeError(f"LoRA needs floats; this module takes an array of {host.x.dtype}.")
        if issubclass(host.type, nn.Conv):
            if host.fields["mask"] is not None:
                raise TypeError("LoRA does not take masked convolutions: its update would not be masked.")
            _check_rank(rank, math.prod(kernel.shape[:-1]), kernel.shape[-1])
            keys = ("kernel_size", "strides", "padding", "input_dilation", "kernel_dilation")
            conv = tuple((key, _hashable(host.fields[key])) for key in keys)
            return LoraConv(
                **common, features=(kernel.shape[-1],), conv=conv, groups=host.fields["feature_group_count"]
            )
        if issubclass(host.type, nn.DenseGeneral):
            if host.fields["batch_dims"]:
                raise TypeError("LoRA does not take a DenseGeneral with batch_dims.")
            # The kernel has the axes in the order of the input, however they are given.
            axis = tuple(sorted(_tuple(host.fields["axis"]), key=lambda i: i % len(host.x.shape)))
            features = _tuple(host.fields["features"])
        elif {host.x.shape[-1], host.y.shape[-1]} == set(kernel.shape) and len(kernel.shape) == 2:
            axis, features = (-1,), (host.y.shape[-1],)
        else:
            raise TypeError(f"LoRA does not know how this module uses its kernel of shape {kernel.shape}.")
        _check_rank(rank, math.prod(host.x.shape[i] for i in axis), math.prod(features))
        return Lora(**common, features=features, axis=axis)


def _own_leaves(module: nn.Module) -> dict[str, jax.Array]:
    """The parameters of a bound module, without those of modules and deltas inside it."""
    leaves = module.variables.get("params", {})
    return {key: meta.unbox(leaf) for key, leaf in leaves.items() if not isinstance(leaf, Mapping)}


def _is_transposed(kernel: jax.Array, own: Mapping[str, jax.Array]) -> bool | None:
    """Whether a kernel stores the output's axis first; `None` if its shape does not say."""
    shape = (*own["a"].shape[:-1], *own["b"].shape[1:])
    return None if shape == shape[::-1] or kernel.shape not in (shape, shape[::-1]) else kernel.shape != shape


def _check_rank(rank: int, d_in: int, d_out: int) -> None:
    if rank > min(d_in, d_out):
        raise ValueError(
            f"lora_r={rank} is above the width of this module, {d_in} -> {d_out}: take at most {min(d_in, d_out)}, "
            "or leave it out with exclude_modules."
        )


_RANK = "ρ"  # einsum takes any letter, and nobody uses this one


def _equation(host: ModuleInfo) -> str | None:
    """The equation of a module that computes `einsum(equation, x, weights)`: its field, or an argument of the call."""
    for text in (host.fields.get("einsum_str"), *host.args, *host.kwargs.values()):
        if isinstance(text, str) and re.fullmatch(r"[\w.\s]+,[\w\s]+->[\w.\s]+", text):
            x_axes, w_axes, y_axes = _operands(text)
            used = all(axis in x_axes + y_axes for axis in w_axes) and len({*w_axes}) == len(w_axes)
            if used and any(len(weights.shape) == len(w_axes) for weights in host.params.values()):
                return text
    return None


def _operands(equation: str) -> tuple[str, str, str]:
    """The axes of input, weights and output."""
    operands, y_axes = equation.replace(" ", "").split("->")
    x_axes, w_axes = operands.split(",")
    return x_axes, w_axes, y_axes


def _first_match(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """What the first pattern that means this name stands for."""
    return next((value for pattern, value in patterns.items() if addressing.matches(name, pattern)), otherwise)


def _tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _hashable(value: Any) -> Any:
    return tuple(_hashable(v) for v in value) if isinstance(value, (list, tuple)) else value
