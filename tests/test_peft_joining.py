"""LoRA of PyTorch's modules for keys and for values, as LoRA of one module that computes both."""

import numpy as np
import pytest

from jdelta.saved.peft.joining import Lora, joined

D_IN, WIDTH = 5, 4


def lora(rank, alpha, seed):
    random = np.random.default_rng(seed)
    return Lora(*(random.normal(size=size).astype("f4") for size in ((D_IN, rank), (rank, WIDTH))), alpha)


def change(found, use_rslora):
    return found.alpha / (found.rank**0.5 if use_rslora else found.rank) * found.a @ found.b


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    ("parts", "rank"),
    [
        ({0: lora(2, 4, 0), 1: lora(2, 4, 1)}, 4),
        ({0: lora(2, 4, 0), 1: lora(3, 1, 1)}, 5),
        ({1: lora(2, 4, 0)}, 2),
        ({0: lora(1, 3, 0), 1: lora(2, 4, 1), 2: lora(3, 5, 2)}, 6),
        ({0: lora(2, 0, 0), 1: lora(2, 4, 1)}, 4),
        ({0: lora(2, 4, 0), 1: lora(2, 0, 1)}, 4),
    ],
)
def test_each_part_changes_by_its_own_lora(parts, rank, use_rslora):
    count = 1 + max(1, *parts)
    found = joined(parts, count, count * WIDTH, use_rslora)
    assert found.rank == rank
    zeros = np.zeros((D_IN, WIDTH))
    expected = [change(parts[i], use_rslora) if i in parts else zeros for i in range(count)]
    np.testing.assert_allclose(change(found, use_rslora), np.concatenate(expected, axis=1), atol=1e-6)


def test_parts_with_the_same_a_keep_it_once():
    first = lora(2, 4, 0)
    second = Lora(first.a, lora(2, 4, 1).b, 4)
    found = joined({0: first, 2: second}, 3, 3 * WIDTH, use_rslora=False)
    assert found.a is first.a
    assert found.alpha == 4
    np.testing.assert_array_equal(found.b, np.concatenate([first.b, np.zeros_like(first.b), second.b], axis=1))


def test_a_part_of_another_width_is_an_error():
    with pytest.raises(ValueError, match="makes 4 features, and here there are 3"):
        joined({0: lora(2, 4, 0)}, 2, 6, use_rslora=False)
