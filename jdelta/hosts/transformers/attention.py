"""Lets others take part in attention that was written without them: keys and values of a prefix, a faster kernel.

Flax models compute `weights = dot_product_attention_weights(query, key, bias=…)` and contract the weights with the
values themselves. No interception reaches that place, so while a module runs with a prefix or a kernel, that name means
another function in the module's file, which in other threads does as the original.

With a prefix, the softmax runs over the prefix and the keys together, the weights of the keys are returned, and what
the prefix adds to the result waits to be added to the input of the next module, the attention's output projection.
With a kernel, the weights are put off until the file's `jnp.einsum` contracts them with the values, prefix included;
whatever else the file does with them makes them as ever. Masks, caches, rotary and relative positions stay as they are.

Two models of transformers compute a softmax of their own: DistilBERT, and BigBird where it is block-sparse.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import attention as flax_attention

from jdelta.core.arguments import main_input, main_output, with_main_input, with_main_output
from jdelta.hosts import patches
from jdelta.hosts.linen.calls import Frame

_WEIGHTS = "dot_product_attention_weights"
_BLOCK_SPARSE = "bigbird_block_sparse_attention"
_active: contextvars.ContextVar[tuple[Prefix, ...]] = contextvars.ContextVar("prefixes", default=())
_kernel: contextvars.ContextVar[Kernel | None] = contextvars.ContextVar("kernel", default=None)

# --- what can take part


class Prefix:
    """A prefix during one call of an attention module.

    Args:
      where: name and class of the module, for messages.
      make: from the number of heads and their width to the keys and the values, `(tokens, heads, width)` each.
      head_mask: factors of the heads, `(heads,)`, if the model was given some.
    """

    def __init__(
        self,
        where: str,
        make: Callable[[int, int], tuple[jax.Array, jax.Array]],
        head_mask: jax.Array | None = None,
    ):
        self._where = where
        self._make = make
        self._head_mask = head_mask
        self._waiting: jax.Array | None = None
        self._used = False
        self.scratch: Any = None

    @contextlib.contextmanager
    def active(self, module: nn.Module) -> Iterator[None]:
        """While this lasts, the prefix takes part in the attention that the module computes."""
        token = _active.set((*_active.get(), self))
        try:
            with _taking_part_in(module):
                yield
        finally:
            _active.reset(token)

    def take(self, heads: int, width: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """The keys and the values, for the one attention that is computed in this call."""
        if self._used:
            raise TypeError(
                f"prefix at {self._where}: it computes attention more than once. Name the attention modules inside it."
            )
        self._used = True
        keys, values = self._make(heads, width)
        return keys.astype(dtype), values.astype(dtype)

    def leave(self, result: jax.Array, masked: bool = True) -> None:
        """Leaves the prefix's part of the result, `(batch, …, heads, width)`, to be added where it belongs.

        Args:
          result: that part.
          masked: whether the model masks the heads of its own part.
        """
        self._waiting = result * self._head_mask[:, None] if masked and self._head_mask is not None else result

    def join(self, frame: Frame, call: Callable) -> Callable:
        """A call in which the prefix takes part, and which adds what is waiting to its input, if the shape says that it
        takes the attention's result."""
        return functools.partial(self._joined, frame, call)

    def _joined(self, frame: Frame, call: Callable, /, *args: Any, **kwargs: Any) -> Any:
        if self._waiting is not None:
            with contextlib.suppress(TypeError):  # a call without an array
                key, x = main_input(type(frame.module), args, kwargs)
                part = self._fitting(x)
                if part is not None:
                    self._waiting = None
                    args, kwargs = with_main_input(args, kwargs, key, x + part)
        with _taking_part_in(frame.module):
            return call(*args, **kwargs)

    def finish(self, output: Any) -> Any:
        """What the attention module returns; where no output projection is inside it, with what is waiting."""
        if not self._used:
            raise TypeError(f"prefix at {self._where}: it computes no attention that a prefix could join.")
        if self._waiting is None:
            return output
        part = self._fitting(main_output(output))
        if part is None:
            raise TypeError(
                f"prefix at {self._where}: nothing inside it takes its attention's result. Name a module further out."
            )
        return with_main_output(output, main_output(output) + part)

    def _fitting(self, x: Any) -> jax.Array | None:
        """What is waiting, in the shape of `x`: `(…, heads, width)`, or `(batch, length, heads · width)`."""
        assert self._waiting is not None
        part = self._waiting
        if x.shape != part.shape:
            blocks = part.ndim > 4  # the length was rounded up to whole blocks
            part = part.reshape(part.shape[0], -1, math.prod(part.shape[-2:]))
            if x.ndim == 3 and blocks:
                part = part[:, : x.shape[1]]
        return part.astype(x.dtype) if part.shape == x.shape else None


class Kernel(Protocol):
    """What computes attention in one go, without the weights, while it is active."""

    def accepts(self, asked: Asked) -> bool:
        """Whether weights that were asked for may be put off."""
        ...

    def attend(self, asked: Asked, value: jax.Array, dtype: Any) -> jax.Array | None:
        """The weights, in this dtype, contracted with the values; `None` if it cannot."""
        ...

    def refuse(self, reason: str) -> None:
        """Told why attention was computed without it."""
        ...


@contextlib.contextmanager
def active(kernel: Kernel, module: nn.Module) -> Iterator[None]:
    """While this lasts, the kernel is offered all attention that the module computes."""
    token = _kernel.set(kernel)
    try:
        with _taking_part_in(module):
            yield
    finally:
        _kernel.reset(token)


# --- the weights that a file asks for


class Asked:
    """One computation of attention weights, with the keys that active prefixes put before the model's own.

    Attributes:
      given: the arguments of `dot_product_attention_weights` by name, prefix included.
      computed: whether a kernel has computed the result.
    """

    def __init__(self, weights_of: Callable, given: dict[str, Any]):
        self._weights_of = weights_of
        self._weights: jax.Array | None = None
        self._prefix = _active.get()[-1] if _active.get() else None
        self.given = given
        self.computed = False
        if self._prefix is not None:
            key = given["key"]
            heads, width = key.shape[-2:]
            keys, self._values = _take(heads, width, key.dtype)
            n = len(keys)
            given["key"] = key = _preceded(key, keys)
            given["bias"] = _widened(given.get("bias"), n, key.shape[-3], 0)
            given["mask"] = _widened(given.get("mask"), n, key.shape[-3], True)

    @property
    def made(self) -> bool:
        """Whether the weights were made."""
        return self._weights is not None

    def values(self, value: jax.Array) -> jax.Array:
        """The model's values after those of the prefixes."""
        return value if self._prefix is None else _preceded(value, self._values)

    def weights(self) -> jax.Array:
        """The weights of the model's own keys. Unless the result is computed, what the prefixes add to it waits."""
        if self._weights is None:
            weights = self._weights_of(**self.given)
            if self._prefix is not None:
                n, precision = len(self._values), self.given.get("precision")
                if not self.computed:
                    values = self._values.astype(weights.dtype)
                    part = jnp.einsum("...hqn,nhd->...qhd", weights[..., :n], values, precision=precision)
                    self._prefix.leave(part)
                weights = weights[..., n:]
            self._weights = weights
        return self._weights


@jax.tree_util.register_pytree_node_class
class PutOff:
    """Attention weights that are made when something asks for them that no kernel does, by the model's own function.

    In a tree they are the array that they stand for, so every transformation of JAX makes them.
    """

    def __init__(self, asked: Asked, kernel: Kernel, dtype: Any, steps: tuple[Callable, ...] = (), factors: Any = None):
        self._asked, self._kernel = asked, kernel
        self._dtype = dtype  # in which they meet the values, but for the factors of heads
        self._steps = steps  # what was done to them
        self._factors = factors  # of the heads, `(heads,)`

    def astype(self, dtype: Any) -> PutOff:
        """They, in another dtype."""
        steps = (*self._steps, lambda weights: weights.astype(dtype))
        return PutOff(self._asked, self._kernel, dtype, steps, self._factors)

    def einsum(self, einsum: Callable, subscripts: str, other: jax.Array) -> Any:
        """`einsum` of them and something else; `None` if that has to be done by `einsum`."""
        left, _, result = subscripts.replace(" ", "").partition("->")
        weights, _, right = left.partition(",")
        batch, d, (h, q, k) = weights[:-3], right[-1:], tuple(weights[-3:].ljust(3))
        if (right, result) == (h, weights) and self._factors is None:
            steps = (*self._steps, lambda weights: einsum(subscripts, weights, other))
            return PutOff(self._asked, self._kernel, self._dtype, steps, other)
        if (right, result) != (batch + k + h + d, batch + q + h + d) or self._asked.made:
            return None
        computed = self._kernel.attend(self._asked, other, self._dtype)
        if computed is None:
            return None
        self._asked.computed = True
        return computed if self._factors is None else computed * self._factors[:, None]

    def __jax_array__(self) -> jax.Array:
        if not self._asked.computed:
            self._kernel.refuse("it uses its attention weights for something else than a sum of values")
        weights = self._asked.weights()
        for step in self._steps:
            weights = step(weights)
        return weights

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.__jax_array__(), name)

    def tree_flatten(self) -> tuple[tuple[jax.Array], None]:
        """The weights themselves."""
        return (self.__jax_array__(),), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[jax.Array]) -> jax.Array:
        """The weights themselves."""
        return children[0]


def made(tree: Any) -> Any:
    """The tree with all weights in it made."""
    return jax.tree.map(lambda leaf: leaf, tree)


def _operator(name: str) -> Callable:
    return lambda self, *args: getattr(self.__jax_array__(), name)(*args)


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow"):  # Python looks for these in the class alone
    setattr(PutOff, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(PutOff, f"__r{_name}__", _operator(f"__r{_name}__"))
for _name in ("getitem", "neg", "len", "array", "lt", "gt", "le", "ge"):
    setattr(PutOff, f"__{_name}__", _operator(f"__{_name}__"))


# --- the files of models


def computes_attention(module_type: type[nn.Module]) -> bool:
    """Whether attention is computed in the file of a module's class in a way that others can take part in."""
    return any(_WEIGHTS in file or _is_distilbert(file) for file in patches.globals_of(module_type))


@contextlib.contextmanager
def _taking_part_in(module: nn.Module) -> Iterator[None]:
    """While this lasts, active prefixes and kernels are heard in the file of a module's class, and in flax's own."""
    files = {id(file): file for file in (*patches.globals_of(type(module)), vars(flax_attention))}
    with contextlib.ExitStack() as stack:
        for file in files.values():
            for name, make in _replacements(file).items():
                stack.enter_context(patches.patched(file, name, make))
        for cls in type(module).__mro__:
            if _BLOCK_SPARSE in vars(cls):
                stack.enter_context(patches.patched(cls, _BLOCK_SPARSE, _big_bird_attention))
        yield


def _replacements(file: dict[str, Any]) -> dict[str, Callable]:
    """Name to what makes its replacement, of what means something else in a file."""
    if _is_distilbert(file):
        return {
            "nn": _in_namespace("softmax", _distilbert_softmax),
            "jnp": _in_namespace("matmul", _distilbert_matmul),
        }
    if _WEIGHTS not in file:
        return {}
    found: dict[str, Callable] = {_WEIGHTS: _taking_part}
    for name, value in list(file.items()):
        if patches.original_of(value) is jnp:
            found[name] = _in_namespace("einsum", _einsum)
    if _is_file(file, "big_bird"):
        found["jax"] = _big_bird_jax
    return found


def _is_file(file: dict[str, Any], family: str) -> bool:
    return file["__name__"].endswith(f"modeling_flax_{family}")


def _is_distilbert(file: dict[str, Any]) -> bool:
    return _is_file(file, "distilbert")


def _taking_part(weights_of: Callable) -> Callable:
    @functools.wraps(weights_of)
    def dot_product_attention_weights(*args: Any, **kwargs: Any) -> Any:
        kernel = _kernel.get()
        if kernel is None and not _active.get():
            return weights_of(*args, **kwargs)
        asked = Asked(weights_of, inspect.signature(weights_of).bind(*args, **kwargs).arguments)
        if kernel is None or not kernel.accepts(asked):
            return asked.weights()
        dtype = asked.given.get("dtype")
        return PutOff(
            asked, kernel, jnp.result_type(asked.given["query"], asked.given["key"]) if dtype is None else dtype
        )

    return dot_product_attention_weights


def _einsum(einsum: Callable, subscripts: Any, *operands: Any, **kwargs: Any) -> Any:
    if any(isinstance(operand, PutOff) for operand in operands):
        plain = all(value is None or value is jax.lax.dot_general for value in kwargs.values())
        if plain and len(operands) == 2 and isinstance(operands[0], PutOff) and isinstance(subscripts, str):
            result = operands[0].einsum(einsum, subscripts, operands[1])
            if result is not None:
                return result
        operands = made(operands)
    return einsum(subscripts, *operands, **kwargs)


def _take(heads: int, width: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The keys and the values of all active prefixes, `(tokens, heads, width)` each."""
    pairs = [prefix.take(heads, width, dtype) for prefix in _active.get()]
    keys, values = zip(*pairs, strict=True)
    return jnp.concatenate(keys), jnp.concatenate(values)


def _preceded(states: jax.Array, others: jax.Array) -> jax.Array:
    """Keys or values, `(…, length, heads, width)`, after others, `(tokens, heads, width)`."""
    before = jnp.broadcast_to(others.astype(states.dtype), (*states.shape[:-3], *others.shape))
    return jnp.concatenate([before, states], axis=-3)


def _widened(scores: Any, n: int, length: int, fill: Any) -> Any:
    """A bias or mask over keys that are preceded by `n` others, about which it says nothing."""
    if scores is None:
        return None
    rest = jnp.broadcast_to(scores, (*jnp.shape(scores)[:-1], length - n))
    return jnp.concatenate([jnp.full((*rest.shape[:-1], n), fill, rest.dtype), rest], axis=-1)


def _tell_kernel(reason: str) -> None:
    kernel = _kernel.get()
    if kernel is not None:
        kernel.refuse(reason)


class _Namespace:
    """A module in which some names mean something else: what is made of what they meant."""

    def __init__(self, module: Any, **replaced: Callable):
        self._module = module
        for name, make in replaced.items():
            setattr(self, name, make(getattr(module, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _in_namespace(name: str, function: Callable) -> Callable:
    """What makes a module in which a function, with the original as its first argument, has this name."""
    return lambda module: _Namespace(module, **{name: lambda original: functools.partial(function, original)})


# --- DistilBERT: softmax(matmul(query, key) - mask), then matmul(weights, value), all (batch, heads, length, …)


def _distilbert_matmul(matmul: Callable, a: jax.Array, b: jax.Array) -> jax.Array:
    if _active.get():
        prefix = _active.get()[-1]
        if prefix.scratch is None:
            prefix.scratch = a  # the query, for the softmax
        else:
            values = jnp.broadcast_to(prefix.scratch.swapaxes(0, 1), (*b.shape[:2], *prefix.scratch.shape[::2]))
            b = jnp.concatenate([values, b], axis=2)
            prefix.scratch = None
    return matmul(a, b)


def _distilbert_softmax(softmax: Callable, scores: jax.Array, axis: int = -1) -> jax.Array:
    _tell_kernel("it computes a softmax of its own")
    if _active.get():
        prefix = _active.get()[-1]
        query = prefix.scratch
        keys, prefix.scratch = _take(query.shape[1], query.shape[-1], query.dtype)
        scores = jnp.concatenate([jnp.einsum("bhqd,nhd->bhqn", query, keys), scores], axis=-1)
    return softmax(scores, axis=axis)


# --- BigBird: one softmax for each of five groups of consecutive queries, (batch, heads, …, keys)


class _BigBirdCall:
    def __init__(self, query: jax.Array):
        self.query = query
        self.keys, self.values = _take(query.shape[1], query.shape[-1], query.dtype)
        self.parts: list[jax.Array] = []

    def softmax(self, softmax: Callable, scores: jax.Array, axis: int) -> jax.Array:
        n, done = len(self.keys), sum(part.shape[2] for part in self.parts)
        rows = math.prod(scores.shape[2:-1])
        query = self.query[:, :, done : done + rows].reshape(*scores.shape[:-1], -1) / math.sqrt(self.query.shape[-1])
        weights = softmax(jnp.concatenate([jnp.einsum("bh...d,nhd->bh...n", query, self.keys), scores], -1), axis=axis)
        part = jnp.einsum("bh...n,nhd->bh...d", weights[..., :n], self.values)
        self.parts.append(part.reshape(*self.query.shape[:2], rows, -1))
        return weights[..., n:]


def _big_bird_attention(attend: Callable) -> Callable:
    @functools.wraps(attend)
    def bigbird_block_sparse_attention(
        self: Any,
        query: jax.Array,
        key: Any,
        value: Any,
        band_mask: Any,
        from_mask: jax.Array,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        _tell_kernel("its attention is block-sparse, with softmaxes of its own")
        if not _active.get():
            return attend(self, query, key, value, band_mask, from_mask, *args, **kwargs)
        prefix = _active.get()[-1]
        prefix.scratch = call = _BigBirdCall(query)
        output = attend(self, query, key, value, band_mask, from_mask, *args, **kwargs)
        part = jnp.concatenate(call.parts, axis=2) * from_mask
        prefix.leave(part.swapaxes(1, 2), masked=False)
        return output

    return bigbird_block_sparse_attention


def _big_bird_jax(module: Any) -> Any:
    return _Namespace(module, nn=_in_namespace("softmax", _big_bird_softmax))


def _big_bird_softmax(softmax: Callable, scores: jax.Array, axis: int = -1) -> jax.Array:
    if _active.get() and _active.get()[-1].scratch is not None:
        return _active.get()[-1].scratch.softmax(softmax, scores, axis)
    return softmax(scores, axis=axis)
