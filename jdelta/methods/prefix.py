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

from jdelta.core.arguments import arguments, main_input
from jdelta.core.axes import Axes, Axis, of_output
from jdelta.core.config import DeltaConfig, require_count, require_positive_int
from jdelta.core.edits import CallEdit
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.delta import DeltaModel
from jdelta.hosts import backbone
from jdelta.hosts.linen.calls import describe
from jdelta.hosts.linen.running import Host
from jdelta.hosts.transformers import attention
from jdelta.methods.parameter import kaiming_uniform, leaf
from jdelta.names import common_names
from jdelta.placed import Find
from jdelta.trees.surgery import Path, Tree, name_of


@dataclasses.dataclass(frozen=True)
class PrefixConfig(DeltaConfig):
    """Arguments of prefix tuning.

    Attributes:
      prefix_token_num: number of keys and values before the attention's own.
      reparameterize: whether a small network, one for all layers, makes the keys and values while they are trained.
      embed_dim: width of that network's input.
      mid_dim: width of its middle.
      shift_positions: whether the prefix has the first positions, and the tokens those after it, as in PyTorch PEFT.
        It needs a model that takes `position_ids`.
    """

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
        given = arguments(type(host.frame.module), args, kwargs).arguments
        prefix = attention.Prefix(describe(host.frame.module), self.pair, head_mask=given.get("layer_head_mask"))
        with prefix.active(host.frame.module), host.watched(prefix.join):
            output = host(*args, **kwargs)
        return prefix.finish(output)

    @nn.compact
    def pair(self, heads: int, width: int) -> tuple[jax.Array, jax.Array]:
        """The keys and the values, `(tokens, heads, width)` each."""
        groups = 1
        if self.key_width and self.key_width < heads * width and heads * width % self.key_width == 0:
            groups = heads * width // self.key_width
        shape = (self.tokens, heads // groups, width)
        keys, values = (leaf(self, name, nn.initializers.normal(1.0), shape) for name in ("keys", "values"))
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
        module = host.frame.module
        bound = arguments(type(module), args, kwargs)
        given: dict[str, Any] = bound.arguments
        ids, mask = main_input(type(module), args, kwargs)[1], given.get("attention_mask")  # this covers the cache
        length = ids.shape[1] if mask is None else mask.shape[1]
        if self.positions is not None and self.tokens + length > len(self.positions):
            raise ValueError(
                f"prefix at {describe(module)}: with shift_positions, {self.tokens} tokens of it and {length} of the "
                f"sequence make {self.tokens + length} positions, and the model has {len(self.positions)}. Shorten the "
                "sequence."
            )
        places = given.get("position_ids")
        places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape[:2]) if places is None else places
        given["position_ids"] = places + self.tokens
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


class PrefixModel(DeltaModel):
    """Trainable keys and values in attention modules.

        delta = jdelta.PrefixModel(model, prefix_token_num=6)

    A host is a module that computes one attention, such as BERT's `attention` or `crossattention`. Its leaves are
    `prefix/keys` and `prefix/values`, `(prefix_token_num, heads, width)`. With `reparameterize`, they are made in every
    run by one small network, whose leaves are below `prefix` at the root of the tree; `fold` writes them out.
    The output changes at once. Its own arguments are those of `PrefixConfig`, the common ones and errors those of
    `DeltaModel`; a host that computes no attention, or several, is a `TypeError`.
    """

    delta_type = "prefix"
    config_class = PrefixConfig
    default_modified_modules = ("attn",)

    def edits(self, host: ModuleInfo, structure: Structure) -> Iterable[CallEdit]:
        if not any(attention.computes_attention(info.type) for info in structure.below(host.path)):
            raise TypeError("it computes no attention that a prefix could join.")
        keys = [info for info in self._key_projections if info.path[: len(host.path)] == host.path][:1]
        key_width = keys[0].y.shape[-1] if keys else None
        key_axis = of_output(keys[0], structure)[0] if keys else None
        layer = PrefixLayer(self.config.prefix_token_num, key_width, key_axis)
        yield CallEdit(host.path, "around", layer, leaf=(self.name,))

    def place(self, structure: Structure, find: Find, patterns: Sequence[str]) -> Iterable[CallEdit]:
        edits = list(super().place(structure, find, patterns))
        yield from edits
        if self.config.shift_positions:
            taking = {edit.host: _taking_positions(structure, edit.host) for edit in edits}
            for info in {info.path: info for info in taking.values()}.values():
                layer = ShiftedPositions(self.config.prefix_token_num, backbone.positions(info))
                yield CallEdit(info.path, "around", layer, leaf=(self.name,), auxiliary=True)

    @functools.cached_property
    def _key_projections(self) -> list[ModuleInfo]:
        return common_names.known(self.structure, ["attn.k", "crossattn.k"])

    def fold(self, params: Tree | None = None) -> Tree:
        """Writes the keys and values out at their hosts, in place of the network that makes them.

        The model computes the same; the leaves are then those of `reparameterize=False`, the configuration says so,
        and training goes on with them.

        Args:
          params: the tree to take the values from; by default `model.params`.

        Returns:
          The new tree. Without `params`, it is also put into `model.params`.

        Raises:
          RuntimeError: the tree was donated.
          ValueError: there is no such network, or the delta is detached.
        """
        return self._write_out(params, self.folded())

    def folded(self) -> PrefixConfig:
        return dataclasses.replace(self.config, reparameterize=False)

    def shared(self, shapes: Mapping[Path, jax.ShapeDtypeStruct]) -> nn.Module | None:
        config: PrefixConfig = self.config
        if not config.reparameterize:
            return None
        leaves = tuple((path, shape.shape) for path, shape in shapes.items())
        return Reparameterization(config.prefix_token_num, config.embed_dim, config.mid_dim, leaves)


def _taking_positions(structure: Structure, host: Path) -> ModuleInfo:
    """The outermost module around an attention that takes its position ids."""
    name = name_of(host)
    for info in reversed(structure.callers(structure[name])):
        names = arguments(info.type, info.args, info.kwargs).signature.parameters
        if "position_ids" in names and "decoder_position_ids" not in names:  # with both, the former are an encoder's
            return info
    raise TypeError(
        f"PrefixModel: shift_positions needs a model that takes position_ids, and none of the modules around {name} "
        "does. Leave it out."
    )
