"""One computation of attention weights, and the weights while nothing needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdelta.hosts.attention_parts import Kernel, innermost_prefix, preceded, take, widened


class AttentionCall:
    """One computation of attention weights, with the keys that active prefixes put before the model's own.

    Attributes:
      given: the arguments of `dot_product_attention_weights` by name, prefix included.
      computed: whether a kernel computed the result.
    """

    def __init__(self, weights_of: Callable, given: dict[str, Any]):
        self._weights_of = weights_of
        self._weights: jax.Array | None = None
        self._prefix = innermost_prefix()
        self.given = given
        self.computed = False
        if self._prefix is not None:
            key = given["key"]
            heads, width = key.shape[-2:]
            keys, self._values = take(heads, width, key.dtype)
            n = len(keys)
            given["key"] = key = preceded(key, keys)
            given["bias"] = widened(given.get("bias"), n, key.shape[-3], 0)
            given["mask"] = widened(given.get("mask"), n, key.shape[-3], True)

    @property
    def made(self) -> bool:
        """Whether the weights were materialised."""
        return self._weights is not None

    def values(self, value: jax.Array) -> jax.Array:
        """The model's values after those of the prefixes."""
        return value if self._prefix is None else preceded(value, self._values)

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
class LazyWeights:
    """Attention weights that the model's own function materialises when something that no kernel does needs them.

    In a tree they are the array that they stand for, so every transformation of JAX materialises them.
    """

    def __init__(
        self, call: AttentionCall, kernel: Kernel, dtype: Any, steps: tuple[Callable, ...] = (), factors: Any = None
    ):
        self._call, self._kernel = call, kernel
        self._dtype = dtype  # in which they meet the values, but for the factors of heads
        self._steps = steps  # what was done to them
        self._factors = factors  # of the heads, `(heads,)`

    def astype(self, dtype: Any) -> LazyWeights:
        """They, in another dtype."""
        steps = (*self._steps, lambda weights: weights.astype(dtype))
        return LazyWeights(self._call, self._kernel, dtype, steps, self._factors)

    def einsum(self, einsum: Callable, subscripts: str, other: jax.Array) -> Any:
        """`einsum` of them and something else; `None` if that has to be done by `einsum`."""
        left, _, result = subscripts.replace(" ", "").partition("->")
        weights, _, right = left.partition(",")
        batch, d, (h, q, k) = weights[:-3], right[-1:], tuple(weights[-3:].ljust(3))
        if (right, result) == (h, weights) and self._factors is None:
            steps = (*self._steps, lambda weights: einsum(subscripts, weights, other))
            return LazyWeights(self._call, self._kernel, self._dtype, steps, other)
        if (right, result) != (batch + k + h + d, batch + q + h + d) or self._call.made:
            return None
        computed = self._kernel.attend(self._call, other, self._dtype)
        if computed is None:
            return None
        self._call.computed = True
        return computed if self._factors is None else computed * self._factors[:, None]

    def __jax_array__(self) -> jax.Array:
        if not self._call.computed:
            self._kernel.refuse("it uses its attention weights for something else than a sum of values")
        weights = self._call.weights()
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


def materialised(tree: Any) -> Any:
    """The tree with all deferred weights in it materialised."""
    return jax.tree.map(lambda leaf: leaf, tree)


def _operator(name: str) -> Callable:
    return lambda self, *args: getattr(self.__jax_array__(), name)(*args)


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow"):  # Python looks for these in the class alone
    setattr(LazyWeights, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(LazyWeights, f"__r{_name}__", _operator(f"__r{_name}__"))
for _name in ("getitem", "neg", "len", "array", "lt", "gt", "le", "ge"):
    setattr(LazyWeights, f"__{_name}__", _operator(f"__{_name}__"))
