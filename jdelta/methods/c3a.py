"""C3A: a change that is circulant block by block (Chen et al. 2024, arXiv 2407.19342).

Each block of the output's features is the sum of circular correlations of the input's blocks with small kernels.
Numbers agree with PyTorch PEFT's for the same kernels.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jdelta.core.config import require_positive_int, require_positive_ints
from jdelta.core.linear_maps import BoundLinear
from jdelta.core.method import Method
from jdelta.core.rules import Leaves
from jdelta.trees import addressing


@dataclasses.dataclass(frozen=True)
class C3ARule:
    """`ΔW[n b + j, m b + t] = kernel[m, n, (j − t) mod b] / d_in`, for blocks of `b` features.

    Attributes:
      size: of the blocks, `b`.
      start: how the kernels start, as PEFT's `init_weights`.
    """

    size: int
    start: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] = "xavier_uniform"

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        d_in, d_out = weight.shape
        if d_in % self.size or d_out % self.size:
            raise ValueError(
                f"block_size={self.size} has to divide the numbers of input and output features, {d_in} and {d_out}."
            )
        shape = (d_out // self.size, d_in // self.size, self.size)
        if self.start is True:
            return {"kernel": jnp.zeros(shape)}
        if self.start == "gaussian":
            return {"kernel": jax.random.normal(key, shape)}
        bound = (1 / d_in) ** 0.5 if self.start == "kaiming_uniform" else (6 / (d_in + d_out)) ** 0.5
        return {"kernel": jax.random.uniform(key, shape, jnp.float32, -bound, bound)}

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        d_in, d_out = weight.shape
        shift = np.subtract.outer(np.arange(self.size), np.arange(self.size)) % self.size
        blocks = own["kernel"][:, :, shift].transpose(1, 2, 0, 3)
        return blocks.reshape(d_in, d_out) / d_in

    def product(self, x: jax.Array, y: jax.Array, own: Leaves, linear: BoundLinear) -> jax.Array | None:
        """By Fourier transforms, block by block."""
        features = linear.features(x)
        if features is None:
            return None
        d_in = features.shape[-1]
        blocks = features.reshape(*features.shape[:-1], d_in // self.size, self.size).astype(jnp.float32)
        spectrum = jnp.fft.rfft(blocks), jnp.conj(jnp.fft.rfft(own["kernel"].astype(jnp.float32)))
        out = jnp.fft.irfft(jnp.einsum("...nk,mnk->...mk", *spectrum), self.size) / d_in
        return out.reshape(*out.shape[:-2], y.shape[-1]).astype(y.dtype)


@dataclasses.dataclass(frozen=True)
class C3AConfig(Method):
    """Arguments of C3A.

        config = jdelta.C3AConfig(block_size=64, modified_modules=["query", "value"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      block_size: of the blocks of features. It divides the numbers of input and output features; larger ones train
        less: `d_in d_out / block_size` numbers.
      init_weights: how the kernels start. `True`: at 0; `"gaussian"`: at N(0, 1); `"kaiming_uniform"`: at
        U(±√(1/d_in)); `"xavier_uniform"` or `False`: at U(±√(6/(d_in + d_out))). All but `True` change the output at
        once.
      block_size_pattern: patterns of modules to their own size, in place of `block_size`; the first that matches
        counts.
    """

    delta_type = "c3a"
    default_modified_modules = ("attn.q", "attn.v", "conv")

    pattern_fields: ClassVar[tuple[str, ...]] = ("block_size_pattern",)

    block_size: int = 256
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] = "xavier_uniform"
    block_size_pattern: dict[str, int] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("block_size", self.block_size)
        require_positive_ints("block_size_pattern", self.block_size_pattern)

    def rule(self, name: str) -> C3ARule:
        return C3ARule(addressing.first_match(self.block_size_pattern, name, self.block_size), self.init_weights)
