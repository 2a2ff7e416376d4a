"""Lets prefixes take part in attention that was written without them, in both halves of Flax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

from jdelta.hosts.attention_parts import Prefix
from jdelta.hosts.call_edits import ModuleCall
from jdelta.hosts.nnx import attention as of_nnx
from jdelta.hosts.nnx import cached_attention
from jdelta.hosts.transformers import attention as of_linen


def may_compute_attention(module_type: type) -> bool:
    """Whether a module of a class may compute attention in a way that prefixes can take part in.

    Of a linen module its file tells. An nnx module can hold what computes its attention: a run shows whether it does.
    """
    return issubclass(module_type, nnx.Module) or of_linen.computes_attention(module_type)


def heard(this: ModuleCall, call: Callable) -> Callable:
    """A call of a module, in which active prefixes take part in the attention that the module computes."""
    module_type = this.module_type

    def run(*args: Any, **kwargs: Any) -> Any:
        if not issubclass(module_type, nnx.Module):
            with of_linen.heard_in(module_type):
                return call(*args, **kwargs)
        if cached_attention.takes_cache(module_type):
            return cached_attention.run(this, call, args, kwargs)
        with of_nnx.heard_in(this.module, module_type):
            return call(*args, **kwargs)

    return run


def joined(prefix: Prefix, this: ModuleCall, call: Callable) -> Callable:
    """A call inside the attention module, in which the prefix takes part, and whose input is the attention's result
    with the prefix's part."""

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = prefix.add_to_input(this.module_type, args, kwargs)
        return heard(this, call)(*args, **kwargs)

    return run
