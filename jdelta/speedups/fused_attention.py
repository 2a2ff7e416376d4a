"""A faster computation of a model's attention: opt-in, without parameters, and undoable."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jdelta.core.edits import CallEdit
from jdelta.core.host import HostAdapter
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.hosts.call_edits import Host
from jdelta.hosts.transformers import attention
from jdelta.hosts.transformers.attention_call import AttentionCall, materialised
from jdelta.speedups.patch import Patch, install_patch, reasons, trace_with, unpatched

_NAME = "fused.attention"  # a delta's name has no dot
Implementation = Literal["cpu", "cudnn", "xla"]


def fused_attention(model: Any, implementation: Literal["cudnn", "xla"] | None = None) -> Patch:
    """Computes the attention of a model in one operation, where the result is equal.

        fused = jdelta.fused_attention(model)
        print(fused)  # 12 attention modules: bert.encoder.layer.[0-11].attention.self
        fused.undo()

    Every module that calls Flax's `dot_product_attention_weights` and sums values with the weights is changed. On a
    GPU in half precision this is cuDNN's flash attention, through `jax.nn.dot_product_attention`, if lengths are even
    and heads at most 128 wide; its memory does not grow with the square of the length. On a CPU it is the same sums in
    a quicker order, elsewhere `jax.nn.dot_product_attention`. (It is tested that calls of cuDNN pass JAX's checks and
    are lowered; they have not been run on a GPU.)

    No parameter is added. Masks, biases, caches and prefixes work as before, and deltas attach and detach in any order.
    Where the weights themselves are used, as with `output_attentions=True`, the model's own function computes them.
    With dropout of the weights, the model's own computation runs, and a warning says so once.

    JAX cannot map cuDNN's attention: under `jax.vmap`, as in `jdelta.rowwise`, use `implementation="xla"`. A function
    that `jax.jit` compiled before is not changed, neither here nor by `undo`.

    Args:
      model: a Flax model of transformers, or a `jdelta.Backbone`, with or without deltas.
      implementation: that of `jax.nn.dot_product_attention`; by default as described above.

    Returns:
      A description of the change, with a method `undo`.

    Raises:
      RuntimeError: the model's attention is fused already.
      TypeError: the model is not a supported one.
      ValueError: nothing in the model can be changed, and the message says why; or the implementation is unknown.
      Also the errors of `jax.nn.dot_product_attention`, if the given implementation cannot compute the attention.
    """
    if implementation is not None and str(implementation) not in ("cudnn", "xla"):
        raise ValueError(f"fused_attention: implementation is 'cudnn', 'xla' or None, got {implementation!r}.")
    adapter = unpatched(
        model, _NAME, "fused_attention: the attention of this model is fused already. Call undo() first."
    )
    structure = adapter.structure()
    kernels = _tried(adapter, structure, implementation)
    targets = [info for info in structure if info.path in kernels and kernels[info.path].used]
    left = {info.name: kernels[info.path].reason for info in structure if info.path in kernels and info not in targets}
    if not targets:
        found = f"left alone: {reasons(left)}" if left else "no module calls Flax's dot_product_attention_weights"
        raise ValueError(f"fused_attention: nothing in {adapter.class_name} can be changed; {found}.")
    once: set[str] = set()
    edits = [
        CallEdit(info.path, "around", _Fused(Kernel(info, once, implementation), info.caller is not None))
        for info in targets
    ]
    callers = dict.fromkeys(info.caller for info in targets if info.caller is not None)
    edits += [CallEdit(path, "around", _Materialised(), auxiliary=True) for path in callers]
    return install_patch(adapter, _NAME, edits, "attention modules", targets, left)


# --- the modules


class _Fused(nn.Module):
    """Runs an attention module with a kernel.

    Attributes:
      kernel: that kernel.
      defer: whether weights that it returns may stay deferred: BART's attention always returns them.
    """

    kernel: Kernel
    defer: bool = False

    @nn.nowrap
    def __call__(self, host: Host, *args: Any, **kwargs: Any) -> Any:
        with attention.active(self.kernel, host.module_type):
            output = host(*args, **kwargs)
            return output if self.defer else materialised(output)


class _Materialised(nn.Module):
    """Materialises the deferred weights in what a module returns."""

    @nn.nowrap
    def __call__(self, host: Host, *args: Any, **kwargs: Any) -> Any:
        return materialised(host(*args, **kwargs))


class Kernel:
    """Computes the attention of one module in one operation: a `Kernel` of `hosts.attention_parts`.

    Args:
      info: the module.
      once: the warnings that were given for this model.
      kind: how it computes, if that was given.
      trying: whether it is only tried out, where dropout may be on.
    """

    def __init__(self, info: ModuleInfo, once: set[str], kind: Implementation | None = None, trying: bool = False):
        sources = (vars(info.fields.get("config") or object), info.fields)
        self._rates = [{name: rate for name, rate in source.items() if "drop" in name} for source in sources]
        self._once = once
        self._kind = kind
        self._trying = trying
        self.used = False
        self.reason = ""

    def accepts(self, call: AttentionCall) -> bool:
        """Whether the arguments allow an equal result."""
        given = call.given
        if any(given.get(name) is not None for name in ("precision", "einsum", "einsum_dot_general")):
            self.refuse("it asks for products of a special precision or kind")
        elif given.get("module") is not None:
            self.refuse("it keeps its attention weights as intermediates")
        elif jnp.result_type(given["query"], given["key"]) == jnp.float64:
            self.refuse("it computes in float64")
        elif not self._trying and given.get("dropout_rate", 0.0) > 0.0 and not given.get("deterministic", False):
            self._warn(given["dropout_rate"])
        else:
            return True
        return False

    def attend(self, call: AttentionCall, value: jax.Array, dtype: Any) -> jax.Array | None:
        """The values, summed with the weights in this dtype."""
        given = call.given
        query, key, low = given["query"], given["key"], given.get("dtype")
        value = call.values(value)
        if value.shape != key.shape:
            self.refuse("its values do not have the shape of its keys")
            return None
        # The model computes in `low`. Where that is higher, as for a softmax in float32, it is the kernel's anyway.
        if low is not None and jnp.finfo(low).bits < jnp.finfo(jnp.result_type(query, key)).bits:
            query, key = query.astype(low), key.astype(low)
        common, out = jnp.result_type(query, key, value, dtype), jnp.result_type(dtype, value)
        self.used = True
        query, key, value = (states.astype(common) for states in (query, key, value))
        result = attend(query, key, value, given.get("bias"), given.get("mask"), self._kind)
        return result.astype(out)

    def refuse(self, reason: str) -> None:
        """Notes why the model's own computation runs."""
        self.reason = self.reason or reason

    def _warn(self, rate: float) -> None:
        fields = _dropout_fields(self._rates, rate)
        message = (
            f"fused_attention: dropout of the attention weights is on ({fields}{rate:g}), so the model's own "
            "computation runs. To train with fused attention, make that 0."
        )
        if not self._once:
            self._once.add(message)
            warnings.warn(message, stacklevel=2)


def _tried(adapter: HostAdapter, structure: Structure, kind: Implementation | None) -> dict[tuple[str, ...], Kernel]:
    """The kernels of the modules that compute attention, after one abstract run of the model."""
    kernels = {info.path: Kernel(info, set(), kind, trying=True) for info in structure}
    # Around all modules: the innermost is the one whose own code computes attention.
    trace_with(adapter, structure, _NAME, lambda info: _Fused(kernels[info.path]))
    return {path: kernel for path, kernel in kernels.items() if kernel.used or kernel.reason}


def _dropout_fields(rates: Sequence[Mapping[str, Any]], rate: float) -> str:
    """The names under which the rate of dropout is in a module's configuration or fields, those of attention first."""
    for source in rates:
        names = [name for name, value in source.items() if value == rate]
        if names:
            return f"{' or '.join([name for name in names if 'att' in name] or names)} = "
    return ""


# --- the computation


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: Any = None,
    mask: Any = None,
    kind: Implementation | None = None,
) -> jax.Array:
    """Softmax attention with the softmax in float32.

    Args:
      query: `(…, queries, heads, width)`.
      key, value: `(…, keys, heads, width)`, of the same dtype.
      bias: broadcasts to `(…, heads, queries, keys)`.
      mask: bools that broadcast likewise.
      kind: how; by default as `chosen` says.

    Returns:
      `(…, queries, heads, width)`.
    """
    lengths = (query.shape[-3], key.shape[-3])
    kind = kind or chosen(_backend(), query.dtype, query.shape[-1], lengths)
    if kind == "cpu":
        return _on_cpu(query, key, value, bias, mask)
    batch = query.shape[:-3]
    bias, mask = (None if s is None else _four_axes(jnp.asarray(s), batch) for s in (bias, mask))
    if kind == "cudnn" and (bias is not None or mask is not None):
        # As low as jax.nn.dot_product_attention goes: cuDNN fails at the difference of two numbers near the lowest.
        least = -(2.0**41) if query.dtype == jnp.bfloat16 else -(2.0**15)
        bias = jnp.zeros((), query.dtype) if bias is None else jnp.maximum(bias, least).astype(query.dtype)
        bias = bias if mask is None else jnp.where(mask, bias, jnp.asarray(least, query.dtype))
        bias, mask = jnp.broadcast_to(bias, (*bias.shape[:-2], *lengths)), None
    q, k, v = (states.reshape(math.prod(batch), *states.shape[-3:]) for states in (query, key, value))
    return jax.nn.dot_product_attention(q, k, v, bias, mask, implementation=kind).reshape(query.shape)


def chosen(backend: str, dtype: Any, width: int, lengths: tuple[int, int]) -> Implementation:
    """How attention is computed.

    Args:
      backend: `"cpu"`, `"cuda"`, which stands for GPUs that cuDNN's flash attention runs on, or any other.
      dtype: of query, keys and values.
      width: of a head.
      lengths: how many queries and keys.

    Returns:
      `"cudnn"` or `"xla"` of `jax.nn.dot_product_attention`; or `"cpu"`, which is quicker there.
    """
    if backend == "cpu":
        return "cpu"
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    # Gradients need even lengths in cuDNN.
    even = not any(length % 2 for length in lengths)
    return "cudnn" if backend == "cuda" and half and width % 8 == 0 and width <= 128 and even else "xla"


def _backend() -> str:
    """The default backend; `"cuda"` for Nvidia's GPUs since Ampere, on which cuDNN has flash attention."""
    backend = jax.default_backend()
    if backend == "gpu":
        major = str(getattr(jax.local_devices()[0], "compute_capability", "0")).split(".")[0]
        return "cuda" if major.isdigit() and int(major) >= 8 else backend
    return backend


def _on_cpu(query: jax.Array, key: jax.Array, value: jax.Array, bias: Any, mask: Any) -> jax.Array:
    """Heads before lengths, so that the products are plain ones; and divided when the sum over the keys is done."""
    q, k, v = (states.astype(jnp.float32).swapaxes(-3, -2) for states in (query, key, value))
    scores = jnp.einsum("...qd,...kd->...qk", q / math.sqrt(q.shape[-1]), k)
    if bias is not None:
        scores += bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    result = jnp.einsum("...qk,...kd->...qd", weights, v) / weights.sum(-1, keepdims=True)
    return result.swapaxes(-3, -2).astype(query.dtype)


def _four_axes(scores: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """A bias or mask that broadcasts to `(*batch, heads, queries, keys)`, with all axes of the batch in one."""
    scores = scores.reshape((1,) * (len(batch) + 3 - scores.ndim) + scores.shape)
    if math.prod(scores.shape[: len(batch)]) > 1:
        scores = jnp.broadcast_to(scores, (*batch, *scores.shape[-3:]))
    return scores.reshape(-1, *scores.shape[-3:])
