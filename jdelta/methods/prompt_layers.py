"""What runs with a soft prompt: the table of its vectors, and layers around modules that make room for its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from jdelta.core.arguments import arguments, is_array, main_input, main_output, with_main_input
from jdelta.core.axes import Axes
from jdelta.core.structure import ModuleInfo
from jdelta.hosts.call_edits import POSITIONS, Host, ModuleCall
from jdelta.hosts.transformers import generation
from jdelta.methods.parameter import param
from jdelta.trees.surgery import Path


class PromptTable(nn.Module):
    """Embeds the prompt's ids; around a word embedding.

    Attributes:
      prompt_ids: the prompt's ids.
      features: width of an embedding.
      init_range: the vectors start at U(±init_range).
    """

    prompt_ids: range
    features: int
    init_range: float

    @nn.nowrap
    def __call__(self, host: Host, ids: jax.Array) -> jax.Array:
        """From `(…)` ids, the prompt's among them, to `(…, features)`."""
        table = self.table()
        row = ids - self.prompt_ids.start
        mine = (row >= 0) & (row < len(table))
        embedded = host(jnp.where(mine, 0, ids))
        return jnp.where(mine[..., None], jnp.take(table, row, axis=0, mode="clip").astype(embedded.dtype), embedded)

    @nn.compact
    def table(self) -> jax.Array:
        """The prompt, `(tokens, features)`."""
        return param(self, "embedding", self._uniform, (len(self.prompt_ids), self.features))

    def sharding_axes(self, host: ModuleInfo, x: Axes, y: Axes) -> dict[str, Axes]:
        """The prompt is split by features, as the word embedding is."""
        return {"embedding": (None, *y[-1:])}

    @nn.nowrap
    def _uniform(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -self.init_range, self.init_range)


class Prompted(nn.Module):
    """Runs layers on the prompt and the input; around the module that embeds tokens and calls the layers.

    Attributes:
      prompt_ids: the prompt's ids.
      entry: path of the module, the host or one inside it, that takes the ids to be embedded.
      exit: path of the module, the host or one inside it, whose output loses the prompt; `None` if the prompt stays.
      positions: the positions that the host has, if they are limited.
    """

    prompt_ids: range
    entry: Path
    exit: Path | None
    positions: range | None

    @nn.nowrap
    def __call__(self, host: Host, *args: Any, **kwargs: Any) -> Any:
        n = len(self.prompt_ids)
        ids = main_input(host.module_type, args, kwargs)[1]
        given: dict[str, Any] = arguments(host.module_type, args, kwargs).arguments
        mask = given.get("attention_mask")  # covers the cache, and other prompts
        length = ids.shape[1] if mask is None else mask.shape[-1]
        if generation.prompt_is_in():
            self._check_length(host, 0, length)
            return host(*args, **kwargs)
        if host.has_cache():
            raise ValueError(
                f"soft prompt at {host.describe()}: in a call with a cache, the prompt would be put in again and "
                "again. Use model.generate, which puts it in once, or call the model without a cache."
            )
        self._check_length(host, n, length)
        if issubclass(host.module_type, nnx.Module):
            self._check_arrays(host, given, ids)
        args, kwargs = self._grown(host.module_type, args, kwargs, ids)

        def watch(this: ModuleCall, call: Callable) -> Callable:
            def watched(*args: Any, **kwargs: Any) -> Any:
                if this.path == self.entry:
                    args, kwargs = self._prompted(this.module_type, args, kwargs)
                output = call(*args, **kwargs)
                return _cut(output, _length(this, output, args, kwargs), n) if this.path == self.exit else output

            return watched

        if self.entry == host.path:
            args, kwargs = self._prompted(host.module_type, args, kwargs)
        with host.watched(watch):
            output = host(*args, **kwargs)
        return _cut(output, ids.shape[1] + n, n) if self.exit == host.path else output

    @nn.nowrap
    def _check_length(self, host: Host, prompt: int, length: int) -> None:
        if self.positions is not None and prompt + length > (limit := len(self.positions)):
            tokens = f"a prompt of {prompt} tokens and an input of {length}" if prompt else "prompt, input and output"
            raise ValueError(
                f"soft prompt at {host.describe()}: {tokens} make {prompt + length} positions, and the model has "
                f"{limit}: {prompt + length - limit} too many. Shorten the input, or take a lower "
                "soft_token_num."
            )

    @nn.nowrap
    def _check_arrays(self, host: Host, given: Mapping[str, Any], ids: jax.Array) -> None:
        """Raises `TypeError` if the model is given something else for each token."""
        known = ("attention_mask", "token_type_ids", *POSITIONS)
        of_ids = next((name for name, value in given.items() if value is ids), "")
        for name, value in given.items():
            if name not in (of_ids, *known) and is_array(value) and value.shape[1:2] == ids.shape[1:2]:
                raise TypeError(
                    f"soft prompt at {host.describe()}: it is given {name} of shape {value.shape}, in which a prompt "
                    f"has no place: that is known of {', '.join(known)}. Leave {name} out."
                )

    @nn.nowrap
    def _prompted(self, module_type: type, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments with the prompt's ids before the others."""
        key, ids = main_input(module_type, args, kwargs)
        prompt = jnp.arange(self.prompt_ids.start, self.prompt_ids.stop, dtype=jnp.int32)
        prompt = jnp.broadcast_to(prompt, (*ids.shape[:-1], len(prompt)))
        return with_main_input(args, kwargs, key, jnp.concatenate([prompt, ids], axis=-1))

    @nn.nowrap
    def _grown(self, module_type: type, args: tuple, kwargs: dict, ids: jax.Array) -> tuple[tuple, dict]:
        """The arguments with mask, token types and positions for the prompt too."""
        bound, n = arguments(module_type, args, kwargs), len(self.prompt_ids)
        given: dict[str, Any] = bound.arguments
        mask, types, places = (given.get(name) for name in ("attention_mask", "token_type_ids", "position_ids"))
        if mask is not None:
            new = jnp.ones((len(mask), n), mask.dtype)
            given["attention_mask"] = _before(mask, new) if mask.ndim == 2 else _causally_before(mask, ids.shape[1], n)
        if "token_type_ids" in bound.signature.parameters:
            types = jnp.zeros_like(ids) if types is None else types
            given["token_type_ids"] = _before(types, jnp.zeros((len(types), n), types.dtype))
        if "position_ids" in bound.signature.parameters and places is None:
            given["position_ids"] = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        for name in POSITIONS:
            places = given.get(name)
            if places is not None and is_array(places) and places.ndim == 2:
                first = jnp.maximum(places[:, :1], self.positions.start if self.positions else 0)  # after padding
                given[name] = _before(places + n, first + jnp.arange(n))
        return bound.args[1:], bound.kwargs


class PromptPooled(nn.Module):
    """Takes the prompt off, but for the poolers; around the whole model.

    Attributes:
      tokens: how many the prompt has.
      exit: path of the module whose output loses the prompt.
      poolers: paths of the modules that get that output with the prompt.
    """

    tokens: int
    exit: Path
    poolers: tuple[Path, ...]

    @nn.nowrap
    def __call__(self, host: Host, *args: Any, **kwargs: Any) -> Any:
        whole: list[jax.Array] = []

        def watch(this: ModuleCall, call: Callable) -> Callable:
            def watched(*args: Any, **kwargs: Any) -> Any:
                if this.path in self.poolers and whole:
                    key, x = main_input(this.module_type, args, kwargs)
                    args, kwargs = with_main_input(args, kwargs, key, _before(x, whole[-1][:, : self.tokens]))
                output = call(*args, **kwargs)
                if this.path != self.exit:
                    return output
                whole.append(main_output(output))
                return _cut(output, whole[-1].shape[1], self.tokens)

            return watched

        with host.watched(watch):
            return host(*args, **kwargs)


class MaskGrown(nn.Module):
    """Lets a decoder attend to the prompt in the encoder's states, for which the caller's mask has no place."""

    @nn.nowrap
    def __call__(self, host: Host, *args: Any, **kwargs: Any) -> Any:
        bound = arguments(host.module_type, args, kwargs)
        given: dict[str, Any] = bound.arguments
        mask, states = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
        if mask is not None and states is not None and mask.shape[1] < states.shape[1]:
            new = jnp.ones((len(mask), states.shape[1] - mask.shape[1]), mask.dtype)
            given["encoder_attention_mask"] = _before(mask, new)
        return host(*bound.args[1:], **bound.kwargs)


class EncoderStatesCut(nn.Module):
    """Takes the prompt off an encoder's states where a whole encoder-decoder returns them.

    Attributes:
      encoder: path of the encoder's layers, a `Prompted` host.
    """

    encoder: Path

    @nn.nowrap
    def __call__(self, host: Host, *args: Any, **kwargs: Any) -> Any:
        extra = total = 0
        states: dict[int, jax.Array] = {}  # by id: what the encoder returned, wherever it is in the output

        def watch(this: ModuleCall, call: Callable) -> Callable:
            def watched(*args: Any, **kwargs: Any) -> Any:
                nonlocal extra, total  # extra: all prompts' tokens
                output = call(*args, **kwargs)
                total = main_output(output).shape[1]
                extra = total - main_input(this.module_type, args, kwargs)[1].shape[1]
                states.update({id(leaf): leaf for leaf in jax.tree.leaves(output)})
                return output

            return watched if this.path == self.encoder else call

        bound = arguments(host.module_type, args, kwargs)
        named = bound.arguments.get("return_dict") is not False
        if not named:  # among a tuple's elements, cross-attention cannot be told from the decoder's own
            bound.arguments["return_dict"] = True
        with host.watched(watch):
            output = host(*bound.args[1:], **bound.kwargs)
        if any(id(a) in states for a in jax.tree.leaves(output)):  # not if another prompt's cut was there before
            if cross := getattr(output, "cross_attentions", None):
                output = output.replace(cross_attentions=tuple(weights[..., extra:] for weights in cross))
            output = jax.tree.map(lambda a: _cut(a, total, extra) if id(a) in states else a, output)
        return output if named else output.to_tuple()


def _length(this: ModuleCall, output: Any, args: tuple, kwargs: Mapping[str, Any]) -> int:
    """The length of what a module returns; with several arrays, that of its input."""
    try:
        length: int = main_output(output).shape[1]
    except TypeError:
        length = main_input(this.module_type, args, kwargs)[1].shape[1]
    return length


def _causally_before(mask: jax.Array, length: int, n: int) -> jax.Array:
    """A mask `(…, queries, keys)` with those of a prompt before: its tokens see those of it up to themselves, and all
    others see the prompt."""
    if not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)):
        raise TypeError(f"soft prompt: a mask of {mask.ndim} axes holds booleans or integers, got {mask.dtype}.")
    if mask.shape[-2] not in (1, length) or mask.shape[-1] != length:
        raise ValueError(
            f"soft prompt: the attention mask of shape {mask.shape} is not one of {length} tokens that attend to each "
            "other."
        )
    own = jnp.broadcast_to(mask, (*mask.shape[:-2], length, length))
    rows = jnp.pad(jnp.tril(jnp.ones((n, n), mask.dtype)), ((0, 0), (0, length)))
    seen = jnp.concatenate([jnp.ones((*own.shape[:-1], n), mask.dtype), own], axis=-1)
    return jnp.concatenate([jnp.broadcast_to(rows, (*own.shape[:-2], *rows.shape)), seen], axis=-2)


def _before(rest: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.concatenate([new.astype(rest.dtype), rest], axis=1)


def _cut(tree: Any, length: int, n: int) -> Any:
    """Everything without its first `n` of `length` positions: `(batch, length, …)`, and attention weights."""

    def cut(a: jax.Array) -> jax.Array:
        if a.ndim == 4 and a.shape[-2:] == (length, length):
            return a[..., n:, n:]
        return a[:, n:] if a.ndim > 1 and a.shape[1] == length else a

    return jax.tree.map(cut, tree)
