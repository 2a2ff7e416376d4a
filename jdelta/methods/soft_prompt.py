"""Soft prompt: trainable vectors before the embedded input (Lester et al. 2021, arXiv 2104.08691).

The prompt's tokens have ids of their own, beyond the vocabulary. They are put before the input's where the model embeds
those; masks, token types and positions grow with them; after the last layer they are taken off again.
Numbers agree with PyTorch PEFT's prompt tuning; where a head pools the first position, with `pool_prompt`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jdelta.core.arguments import arguments, is_array, main_input, main_output, with_main_input
from jdelta.core.axes import Axes
from jdelta.core.config import require_count, require_positive
from jdelta.core.edits import CallEdit
from jdelta.core.method import Method, Site
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.hosts.call_edits import Host, ModuleCall
from jdelta.hosts.transformers import generation
from jdelta.hosts.transformers.positions import positions
from jdelta.methods.parameter import param
from jdelta.names import common_names
from jdelta.trees import dtypes, surgery
from jdelta.trees.surgery import Path


@dataclasses.dataclass(frozen=True)
class SoftPromptConfig(Method):
    """Arguments of the soft prompt.

        config = jdelta.SoftPromptConfig(soft_token_num=20)
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      soft_token_num: number of trainable vectors.
      init_range: without `token_init`, they start at U(±init_range).
      token_init: start them at the first rows of the word embedding.
      pool_prompt: whether a pooler, a module that reads the first of all positions, reads the prompt's first, as in
        PyTorch PEFT, and not the input's.
    """

    delta_type = "soft_prompt"
    default_modified_modules = ("embeddings",)

    soft_token_num: int = 100
    init_range: float = 0.5
    token_init: bool = True
    pool_prompt: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("soft_token_num", self.soft_token_num)
        require_positive("init_range", self.init_range)

    def place(self, site: Site, patterns: Sequence[str]) -> Iterable[CallEdit]:
        structure = site.structure
        hosts = [info for info in site.find(patterns) if jnp.issubdtype(info.x.dtype, jnp.integer)]
        if not hosts:
            raise TypeError(f"SoftPromptModel: the modules that {list(patterns)} mean take no token ids.")
        if len(hosts) > 1 and self.modified_modules is not None:
            names = ", ".join(host.name for host in hosts)
            raise ValueError(f"SoftPromptModel goes before one input; {list(patterns)} mean {names}. Name one.")
        host = hosts[0]
        callers = structure.callers(host)
        layers = common_names.known(structure, ["attn"])
        top, entry, exit = _extent(structure, [host, *callers], layers)
        reading = [info for info in callers if _attends_to_encoder(info)]
        if reading and not all(_within(structure, info, reading) for info in layers):
            raise TypeError(
                f"SoftPromptModel: {host.name} takes the tokens of a decoder whose encoder takes none; a prompt before "
                "the encoder's input needs token ids there."
            )
        ids = self._ids(host, site)
        table = PromptTable(ids, host.y.shape[-1], self.init_range)
        yield CallEdit(host.path, "around", table, outermost=True)
        reads = [info for info in structure if _attends_to_encoder(info) and info not in callers]
        decoders = [info for info in reads if not _within(structure, info, [top, *reads])]
        around = Prompted(ids, entry, None if decoders or self.pool_prompt else exit, positions(top))
        yield CallEdit(top.path, "around", around, auxiliary=True)
        if self.pool_prompt:
            pooled = PromptPooled(len(ids), exit, tuple(info.path for info in self._poolers(structure, exit)))
            yield CallEdit((), "around", pooled, leaf=("pooled",), auxiliary=True)
        for info in decoders:
            yield CallEdit(info.path, "around", MaskGrown(), auxiliary=True)
        if decoders:
            yield CallEdit((), "around", EncoderStatesCut(top.path), auxiliary=True)

    def _poolers(self, structure: Structure, exit: Path) -> list[ModuleInfo]:
        found = _poolers(structure, exit)
        if not found:
            raise TypeError(
                "SoftPromptModel: pool_prompt needs a pooler, and no module of this model makes one position of all. "
                "Leave it out."
            )
        return found

    def _ids(self, host: ModuleInfo, site: Site) -> range:
        """Ids beyond the vocabulary, and beyond other prompts'."""
        table = host.params.get("embedding")
        if table is None or len(table.shape) != 2:
            raise TypeError(f"SoftPromptModel at {host.name} ({host.type.__name__}): it is no word embedding.")
        edits = [edit for a in site.attachments for edit in a.edits if edit.host == host.path]
        taken = [edit.layer.prompt_ids.stop for edit in edits if isinstance(edit.layer, PromptTable)]
        start = max([table.shape[0], *taken])
        return range(start, start + self.soft_token_num)

    def init_from_backbone(
        self, leaves: Mapping[Path, jax.Array], params: Mapping[Path, jax.Array]
    ) -> Mapping[Path, jax.Array]:
        if not self.token_init:
            return leaves
        n = self.soft_token_num
        own = [p for p, leaf in leaves.items() if p[-1] == "embedding" and len(leaf) == n]
        rows = {p: params[(*p[:-2], "embedding")] for p in own if (*p[:-2], "embedding") in params}
        for path, table in rows.items():
            if dtypes.is_fixed(table):
                raise ValueError(
                    f"SoftPromptModel starts from rows of {surgery.name_of(path[:-2])}, which holds {table.dtype}, and "
                    "they are no vectors by themselves. Pass token_init=False."
                )
        started = {p: jnp.resize(table[:n], (n, table.shape[1])).astype(jnp.float32) for p, table in rows.items()}
        return {**leaves, **started}


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
        length = ids.shape[1] if mask is None else mask.shape[1]
        if generation.prompt_is_in():
            self._check_length(host, 0, length)
            return host(*args, **kwargs)
        if host.has_cache():
            raise ValueError(
                f"soft prompt at {host.describe()}: in a call with a cache, the prompt would be put in again and "
                "again. Use model.generate, which puts it in once, or call the model without a cache."
            )
        self._check_length(host, n, length)
        args, kwargs = self._grown(host.module_type, args, kwargs, ids)

        def watch(this: ModuleCall, call: Callable) -> Callable:
            def watched(*args: Any, **kwargs: Any) -> Any:
                if this.path == self.entry:
                    args, kwargs = self._prompted(this.module_type, args, kwargs)
                output = call(*args, **kwargs)
                return _cut(output, main_output(output).shape[1], n) if this.path == self.exit else output

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
            given["attention_mask"] = _before(mask, jnp.ones((len(mask), n), mask.dtype))
        if "token_type_ids" in bound.signature.parameters:
            types = jnp.zeros_like(ids) if types is None else types
            given["token_type_ids"] = _before(types, jnp.zeros((len(types), n), types.dtype))
        if "position_ids" in bound.signature.parameters:
            places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape) if places is None else places
            first = jnp.maximum(places[:, :1], self.positions.start if self.positions else 0)  # padding may be before
            given["position_ids"] = _before(places + n, first + jnp.arange(n))
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


def _extent(
    structure: Structure, path: Sequence[ModuleInfo], attention: Sequence[ModuleInfo]
) -> tuple[ModuleInfo, Path, Path]:
    """Where a prompt is in the model: the module that calls both word embedding and layers, the module in it that takes
    the ids, and the last that has layers in it. In a model whose layers are unknown, the root is all three."""
    layers = [[info, *structure.callers(info)] for info in attention]
    inside = {info.path for stack in layers for info in stack}
    for i, top in enumerate(path):
        if top.path in inside:
            last = next(stack for stack in reversed(layers) if top in stack)
            return top, path[i - 1].path, last[last.index(top) - 1].path
    root = path[-1]
    return root, root.path, root.path


def has_pooler(structure: Structure, host: ModuleInfo) -> bool:
    """Whether a model has a module that reads the first position after its layers, for `pool_prompt`."""
    layers = common_names.known(structure, ["attn"])
    return bool(_poolers(structure, _extent(structure, [host, *structure.callers(host)], layers)[2]))


def _poolers(structure: Structure, exit: Path) -> list[ModuleInfo]:
    """The outermost modules that run after one of a path, and make `(batch, width)` of its `(batch, length, width)`."""
    infos = list(structure)
    start = [info.path for info in infos].index(exit)
    found: list[ModuleInfo] = []
    for info in infos[start + 1 :]:
        inside = info.path[: len(exit)] == exit or any(info.path[: len(f.path)] == f.path for f in found)
        if not inside and is_array(info.x) and is_array(info.y) and (len(info.x.shape), len(info.y.shape)) == (3, 2):
            found.append(info)
    return found


def _within(structure: Structure, info: ModuleInfo, others: Sequence[ModuleInfo]) -> bool:
    """Whether a module is called inside one of the others."""
    return any(caller in others for caller in structure.callers(info))


def _attends_to_encoder(info: ModuleInfo) -> bool:
    return is_array(arguments(info.type, info.args, info.kwargs).arguments.get("encoder_hidden_states"))


def _before(rest: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.concatenate([new.astype(rest.dtype), rest], axis=1)


def _cut(tree: Any, length: int, n: int) -> Any:
    """Everything without its first `n` of `length` positions: `(batch, length, …)`, and attention weights."""

    def cut(a: jax.Array) -> jax.Array:
        if a.ndim == 4 and a.shape[-2:] == (length, length):
            return a[..., n:, n:]
        return a[:, n:] if a.ndim > 1 and a.shape[1] == length else a

    return jax.tree.map(cut, tree)
