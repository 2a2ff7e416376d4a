"""Prefix tuning: trainable keys and values before the attention's own (Li and Liang 2021, arXiv 2101.00190).

A prefix is never masked. By default it does not shift positions; with `shift_positions` it does, and numbers agree with
those of PyTorch PEFT for the same prefix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from jdelta.core.arguments import arguments, is_array, main_input
from jdelta.core.axes import Axes, Axis, of_output
from jdelta.core.config import require_count, require_positive_int
from jdelta.core.edits import CallEdit, Edit
from jdelta.core.method import Method, Site
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.hosts import attention
from jdelta.hosts.attention_parts import Prefix, taking_part
from jdelta.hosts.call_edits import POSITIONS, Host
from jdelta.hosts.transformers.positions import positions
from jdelta.methods.parameter import kaiming_uniform, param
from jdelta.names import common_names
from jdelta.trees.surgery import Path, name_of


@dataclasses.dataclass(frozen=True)
class PrefixConfig(Method):
    """Arguments of prefix tuning.

        config = jdelta.PrefixConfig(prefix_token_num=6)
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      prefix_token_num: number of keys and values before the attention's own.
      reparameterize: whether a small network, one for all layers, makes the keys and values while they are trained.
      embed_dim: width of that network's input.
      mid_dim: width of its middle.
      shift_positions: whether the prefix has the first positions, and the tokens those after it, as in PyTorch PEFT.
        It needs a model that takes `position_ids`, or `positions`.
    """

    delta_type = "prefix"
    default_modified_modules = ("attn",)

    prefix_token_num: int = 6
    reparameterize: bool = True
    embed_dim: int = 512
    mid_dim: int = 512
    shift_positions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("prefix_token_num", self.prefix_token_num)
        for name in ("embed_dim", "mid_dim"):
            require_positive_int(name, getattr(self, name))

    def edits(self, host: ModuleInfo, structure: Structure) -> Iterable[CallEdit]:
        if not any(attention.may_compute_attention(info.type) for info in structure.below(host.path)):
            raise TypeError("it computes no attention that a prefix could join.")
        keys = [info for info in _key_projections(structure) if info.path[: len(host.path)] == host.path][:1]
        key_width = math.prod(keys[0].y.shape[keys[0].x.ndim - 1 :]) if keys else None
        key_axis = of_output(keys[0], structure)[0] if keys else None
        layer = PrefixLayer(self.prefix_token_num, key_width, key_axis)
        yield CallEdit(host.path, "around", layer)

    def place(self, site: Site, patterns: Sequence[str]) -> Iterable[Edit]:
        edits = list(super().place(site, patterns))
        yield from edits
        if self.shift_positions:
            taking = {edit.host: _taking_positions(site.structure, edit.host) for edit in edits}
            for info in {info.path: info for info in taking.values()}.values():
                layer = ShiftedPositions(self.prefix_token_num, positions(info))
                yield CallEdit(info.path, "around", layer, auxiliary=True)

    def materialised(self) -> PrefixConfig:
        return dataclasses.replace(self, reparameterize=False)

    def generator(self, shapes: Mapping[Path, jax.ShapeDtypeStruct]) -> nn.Module | None:
        if not self.reparameterize:
            return None
        leaves = tuple((path, shape.shape) for path, shape in shapes.items())
        return Reparameterization(self.prefix_token_num, self.embed_dim, self.mid_dim, leaves)


class PrefixLayer(nn.Module):
    """Runs an attention module with keys and values before its own.

    Attributes:
      tokens: how many.
      key_width: width of what the host projects keys to, if it is known: where queries share keys, in fewer heads.
      key_axis: the axis of the weights that project keys, if it is known.
    """

    tokens: int
    key_width: int | None = None
    key_axis: Axis | None = None

    @nn.nowrap
    def __call__(self, host: Host, *args: Any, **kwargs: Any) -> Any:
        given = arguments(host.module_type, args, kwargs).arguments
        prefix = Prefix(host.describe(), self.pair, head_mask=given.get("layer_head_mask"))
        with taking_part(prefix), host.watched(functools.partial(attention.joined, prefix)):
            output = attention.heard(host.this, host)(*args, **kwargs)
        return prefix.finish(output)

    @nn.compact
    def pair(self, heads: int, width: int) -> tuple[jax.Array, jax.Array]:
        """The keys and the values, `(tokens, heads, width)` each."""
        groups = 1
        if self.key_width and self.key_width < heads * width and heads * width % self.key_width == 0:
            groups = heads * width // self.key_width
        shape = (self.tokens, heads // groups, width)
        keys, values = (param(self, name, nn.initializers.normal(1.0), shape) for name in ("keys", "values"))
        return jnp.repeat(keys, groups, axis=1), jnp.repeat(values, groups, axis=1)

    def sharding_axes(self, host: ModuleInfo, x: Axes, y: Axes) -> dict[str, Axes]:
        """Keys and values are split by heads, as far as the weights that project keys are."""
        return dict.fromkeys(("keys", "values"), (None, self.key_axis, None))


class ShiftedPositions(nn.Module):
    """Gives a module position ids that begin after a prefix; in every call, also of a sequence that a cache continues.

    Attributes:
      tokens: how many positions the prefix has.
      positions: those that the module has, if they are limited.
    """

    tokens: int
    positions: range | None

    @nn.nowrap
    def __call__(self, host: Host, *args: Any, **kwargs: Any) -> Any:
        bound = arguments(host.module_type, args, kwargs)
        given: dict[str, Any] = bound.arguments
        ids, mask = main_input(host.module_type, args, kwargs)[1], given.get("attention_mask")  # this covers the cache
        length = ids.shape[1] if mask is None else mask.shape[-1]
        if self.positions is not None and self.tokens + length > len(self.positions):
            raise ValueError(
                f"prefix at {host.describe()}: with shift_positions, {self.tokens} tokens of it and {length} of the "
                f"sequence make {self.tokens + length} positions, and the model has {len(self.positions)}. Shorten the "
                "sequence."
            )
        name = next(name for name in POSITIONS if name in bound.signature.parameters)
        places = given.get(name)
        places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape[:2]) if places is None else places
        given[name] = places + self.tokens
        return host(*bound.args[1:], **bound.kwargs)


class Reparameterization(nn.Module):
    """The keys and values of all layers: an embedding, a dense layer with tanh, and another dense layer.

    Attributes:
      tokens: how many keys and values.
      embed_dim: width of the embedding.
      mid_dim: width of the first dense layer.
      leaves: path and shape of everything to be made, `(…, tokens, heads, width)`.
    """

    tokens: int
    embed_dim: int
    mid_dim: int
    leaves: tuple[tuple[Path, tuple[int, ...]], ...]

    @nn.compact
    def __call__(self) -> dict[Path, jax.Array]:
        sizes = [math.prod(shape) // self.tokens for _, shape in self.leaves]
        embed = nn.Embed(self.tokens, self.embed_dim, embedding_init=nn.initializers.normal(1.0), name="embed")
        hidden = jnp.tanh(
            nn.Dense(self.mid_dim, kernel_init=kaiming_uniform, name="down")(embed(jnp.arange(self.tokens)))
        )
        rows = nn.Dense(sum(sizes), kernel_init=kaiming_uniform, name="up")(hidden)
        made, start = {}, 0
        for (path, shape), size in zip(self.leaves, sizes, strict=True):
            part = rows[:, start : start + size].reshape(self.tokens, *shape[:-3], *shape[-2:])
            made[path] = jnp.moveaxis(part, 0, -3)
            start += size
        return made


def _key_projections(structure: Structure) -> list[ModuleInfo]:
    if "key projections" not in structure.derived:
        structure.derived["key projections"] = common_names.known(structure, ["attn.k", "crossattn.k"])
    return structure.derived["key projections"]


def _taking_positions(structure: Structure, host: Path) -> ModuleInfo:
    """The outermost module around an attention that takes its position ids."""
    name, fields = name_of(host), structure[name_of(host)].fields
    if fields.get("sliding_window_size") is not None and issubclass(structure[name].type, nnx.Module):
        raise TypeError(
            f"PrefixModel: {name} has a sliding window, which may count positions; with shift_positions it would see "
            "other tokens. Leave it out."
        )
    for info in reversed(structure.callers(structure[name])):
        bound = arguments(info.type, info.args, info.kwargs)
        names, places = bound.signature.parameters, bound.arguments.get("positions")
        if "position_ids" in names and "decoder_position_ids" not in names:  # with both, the former are an encoder's
            return info
        if (
            places is not None
            and is_array(places)
            and len(places.shape) == 2
            and jnp.issubdtype(places.dtype, jnp.integer)
        ):
            return info
    raise TypeError(
        f"PrefixModel: shift_positions needs a model that takes position_ids or positions, and none of the modules "
        f"around {name} does. Leave it out."
    )
