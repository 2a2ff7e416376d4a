"""Lets `model.generate` of transformers put soft prompts before the input, once, as tokens among tokens.

An active edit whose layer has `prompt_ids`, a `range` beyond the vocabulary, embeds these ids wherever they occur.
While `generate` runs, they are in the input already: caches, masks and positions treat them like any other token.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jdelta.hosts.linen.instrument import attachments_of
from jdelta.trees import left_out, surgery

_prompted: contextvars.ContextVar[bool] = contextvars.ContextVar("prompted", default=False)


def prompt_is_in() -> bool:
    """Whether the prompts are in the input of the model already."""
    return _prompted.get()


def prompt_ids(module: nn.Module, without: Collection[str] = ()) -> list[int]:
    """The ids of all active prompts but of some deltas, in the order in which the model is to see them."""
    active = [a for a in reversed(attachments_of(module)) if a.active and a.name not in without]
    edits = [edit for a in active for edit in a.edits if not edit.auxiliary]
    return [i for edit in edits for i in getattr(edit.layer, "prompt_ids", ())]


def with_prompts(original: Any) -> Callable[..., Any]:
    """The method `generate` of a class, for models with prompts."""

    @functools.wraps(original.generate)
    def generate(self: Any, input_ids: jax.Array, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        params = kwargs.get("params")
        names = left_out.names_in({"params": surgery.parameters(self.params if params is None else params)})
        prompt = jnp.array(prompt_ids(self.module, names), jnp.int32)
        n, rows = len(prompt), len(input_ids)
        ids = jnp.concatenate([jnp.broadcast_to(prompt, (rows, n)), jnp.asarray(input_ids, jnp.int32)], axis=1)
        for name, fill in (("attention_mask", 1), ("token_type_ids", 0)):
            if kwargs.get(name) is not None:
                given = jnp.asarray(kwargs[name])
                kwargs[name] = jnp.concatenate([jnp.full((rows, n), fill, given.dtype), given], axis=1)
        config = generation_config or self.generation_config
        decoder_only = not self.config.is_encoder_decoder
        if decoder_only:  # lengths count the input
            if kwargs.get("max_new_tokens", config.max_new_tokens) is None:
                # transformers reads a max_length of 20, its default, as none; with the prompt, another may become 20
                longest = kwargs.pop("max_length", None) or config.max_length
                kwargs["max_new_tokens"] = longest - jnp.shape(input_ids)[1]
            least = kwargs.get("min_length", config.min_length)
            kwargs |= {"min_length": least + n} if least else {}
        token = _prompted.set(True)
        try:
            output = original.generate(self, ids, generation_config, *args, **kwargs)
        finally:
            _prompted.reset(token)
        return output.replace(sequences=output.sequences[:, n:]) if decoder_only else output

    return generate
