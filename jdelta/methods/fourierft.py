"""FourierFT: some entries of the change's spectrum train, at random places (Gao et al. 2024, arXiv 2405.03003).

`W + scaling · Re(ifft2(F))`, where `F` is sparse. Numbers agree with PyTorch PEFT's for the same spectrum: the places
are those that PyTorch draws of the same seed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jdelta.core.config import require_positive_int, require_positive_ints
from jdelta.core.method import Method
from jdelta.core.rules import Leaves
from jdelta.trees import addressing

LARGEST = (2**32 - 1) // 20  # from this size on, PyTorch's permutations depend on its release


@dataclasses.dataclass(frozen=True)
class FourierFTRule:
    """`ΔW = scaling · Re(ifft2(F))`, with `F[places] = spectrum`.

    Attributes:
      count: of entries of the spectrum.
      scaling: factor of the change.
      seed: of their places.
      zeros: whether they start at 0, and not at N(0, 1).
    """

    count: int
    scaling: float
    seed: int = 777
    zeros: bool = False

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        d_in, d_out = weight.shape
        if self.count > d_in * d_out:
            raise ValueError(
                f"n_frequency={self.count} is above the number of entries of the weight, {d_in} · {d_out} = "
                f"{d_in * d_out}."
            )
        return {"spectrum": jnp.zeros(self.count) if self.zeros else jax.random.normal(key, (self.count,))}

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        d_in, d_out = weight.shape
        columns, rows = np.divmod(permuted(d_in * d_out, self.count, self.seed), d_in)
        # The real part is the transform of the part of F that is symmetric about 0, of which half says all.
        rows, columns = np.concatenate([rows, -rows % d_in]), np.concatenate([columns, -columns % d_out])
        (half,) = np.nonzero(columns <= d_out // 2)
        values = own["spectrum"][half % self.count] / 2
        symmetric = jnp.zeros((d_in, d_out // 2 + 1)).at[rows[half], columns[half]].add(values)
        return self.scaling * jnp.fft.irfft2(symmetric, (d_in, d_out))


@functools.lru_cache(maxsize=256)
def permuted(size: int, count: int, seed: int) -> np.ndarray:
    """The first numbers of `torch.randperm(size, generator=torch.Generator().manual_seed(seed))`, below `LARGEST`.

    That is a Fisher–Yates shuffle of the 32-bit numbers of a Mersenne Twister. Only what moves is kept.
    """
    draws = np.random.RandomState(seed % 2**32).randint(2**32, size=count, dtype=np.uint32)
    moved: dict[int, int] = {}
    first = []
    for i, draw in enumerate(draws.tolist()):
        other = i + draw % (size - i)
        first.append(moved.get(other, other))
        moved[other] = moved.get(i, i)
    return np.array(first)


@dataclasses.dataclass(frozen=True)
class FourierFTConfig(Method):
    """Arguments of FourierFT.

        config = jdelta.FourierFTConfig(n_frequency=1000, modified_modules=["query", "value"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      n_frequency: the number of entries of the spectrum that train at each module.
      scaling: factor of the change.
      random_loc_seed: the seed of their places, which are the same at all modules of one shape.
      init_weights: whether they start at 0. By default they start at N(0, 1), so that the output changes at once.
      n_frequency_pattern: patterns of modules to their own number, in place of `n_frequency`; the first that matches
        counts.
    """

    delta_type = "fourierft"
    default_modified_modules = ("attn.q", "attn.v", "conv")

    pattern_fields: ClassVar[tuple[str, ...]] = ("n_frequency_pattern",)

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    init_weights: bool = False
    n_frequency_pattern: dict[str, int] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("n_frequency", self.n_frequency)
        require_positive_ints("n_frequency_pattern", self.n_frequency_pattern)

    def count_of(self, name: str) -> int:
        """The `n_frequency` at the module or parameter of this name."""
        count: int = addressing.first_match(self.n_frequency_pattern, name, self.n_frequency)
        return count

    def rule(self, name: str) -> FourierFTRule:
        return FourierFTRule(self.count_of(name), self.scaling, self.random_loc_seed, self.init_weights)
