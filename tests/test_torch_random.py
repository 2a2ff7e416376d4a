"""PyTorch's random numbers, drawn in JAX: the same to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdelta.methods import torch_random


def test_the_bits_are_those_of_a_mersenne_twister():
    first = np.asarray(jax.jit(torch_random.bits, static_argnums=(0, 1))(5489, 10_000))
    assert first[0] == 3499211612
    assert first[-1] == 4123659995  # the 10000th, as the C++ standard says of std::mt19937


@pytest.mark.parity
@pytest.mark.parametrize("seed", [0, 12345, 2**31, 2**32 + 5])
def test_the_arrays_are_those_that_torch_draws(seed):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(seed)
    shapes = (37, 101), (290, 31), (5, 7)
    theirs = (
        torch.empty(shapes[0]).uniform_(-0.3, 0.3, generator=generator),
        torch.empty(shapes[1], dtype=torch.bfloat16).uniform_(-0.17, 0.17, generator=generator),
        torch.rand(shapes[2], generator=generator),
    )
    bits = jax.jit(torch_random.split, static_argnums=(0, 1))(seed, shapes)
    ours = (
        torch_random.uniform(bits[0], shapes[0], 0.3),
        torch_random.uniform(bits[1], shapes[1], 0.17, jnp.bfloat16),
        torch_random.unit(bits[2], shapes[2]),
    )
    for mine, tensor in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, tensor.float().numpy())
