"""The low-rank adapter: how it starts, what its gradient reaches, and mistakes. Its numbers are in test_formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jdelta
from jdelta.models import LowRankAdapterModel
from jdelta.trees import surgery

X = jax.random.normal(jax.random.key(5), (2, 6, 16))


class Host(nn.Module):
    """One host, alone in a model."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], name="host")(x)


def attach(x=X, **arguments):
    backbone = jdelta.Backbone(Host(), Host().init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
    before = backbone(x)
    return backbone, LowRankAdapterModel(backbone, modified_modules=["host"], **arguments), before


def test_the_leaves_and_their_number():
    backbone, delta, _ = attach(reduction_factor=4, low_rank_rank=3)
    shapes = {".".join(path[2:]): leaf.shape for path, leaf in surgery.flatten(delta.shapes()).items()}
    assert shapes == {
        "down.left": (16, 3),
        "down.right": (3, 4),
        "down.bias": (4,),
        "up.left": (4, 3),
        "up.right": (3, 16),
        "up.bias": (16,),
    }
    trainable, _ = delta.partition(backbone.params)
    assert surgery.flatten(trainable).keys() == surgery.flatten(delta.shapes()).keys()


@pytest.mark.parametrize(("init", "shape"), [("glorot-uniform", np.sqrt(3)), ("glorot-normal", None)])
@pytest.mark.slow
def test_initial_values_are_glorot_with_gain_root_two(init, shape):
    wide = jax.random.normal(jax.random.key(0), (2, 768))
    backbone, *_ = attach(wide, low_rank_w_init=init, reduction_factor=4, low_rank_rank=4)
    down, up = (backbone.params["host"]["low_rank_adapter"][side] for side in ("down", "up"))
    for leaf in (down["left"], down["right"], up["left"], up["right"]):
        std = np.sqrt(2 * 2 / sum(leaf.shape))
        assert np.std(leaf) == pytest.approx(std, rel=0.1)
        if shape is not None:
            assert 0.97 * shape * std < np.abs(leaf).max() <= shape * std
        else:
            assert np.abs(leaf).max() > 2.2 * std
    assert not down["bias"].any()
    assert not up["bias"].any()


def test_with_zero_up_the_output_is_unchanged_and_the_second_gradient_reaches_every_leaf():
    backbone, delta, before = attach(zero_up=True, reduction_factor=4)
    assert (backbone(X) == before).all()
    trainable, frozen = delta.partition()
    gradient = jax.grad(lambda t: jnp.sum(backbone(X, params=jdelta.combine(t, frozen)) ** 2))
    first = gradient(trainable)["host"]["low_rank_adapter"]["up"]
    assert first["right"].any()
    assert first["bias"].any()
    moved = jax.tree.map(lambda p, g: p - 0.1 * jnp.sign(g), trainable, gradient(trainable))
    for path, leaf in surgery.flatten(gradient(moved)).items():
        assert leaf.any(), path


@pytest.mark.slow
def test_without_it_the_first_gradient_reaches_every_leaf():
    backbone, delta, before = attach(reduction_factor=4, low_rank_rank=2)
    assert (backbone(X) != before).any()
    trainable, frozen = delta.partition()
    gradients = jax.grad(lambda t: jnp.sum(backbone(X, params=jdelta.combine(t, frozen)) ** 2))(trainable)
    for path, leaf in surgery.flatten(gradients).items():
        assert leaf.any(), path


WRONG = {
    "no dimension is left": (
        {},
        ValueError,
        r"LowRankAdapterModel at host \(Dense\): reduction_factor=32 leaves nothing of 16 dimensions: take at most 16",
    ),
    "a factor of 0": ({"reduction_factor": 0}, ValueError, "reduction_factor is at least 1, got 0"),
    "a rank that is no number": ({"low_rank_rank": 1.5}, TypeError, "low_rank_rank is a whole number, got 1.5"),
    "a rank of 0": ({"low_rank_rank": 0}, ValueError, "low_rank_rank is at least 1, got 0"),
    "an unknown distribution": (
        {"low_rank_w_init": "glorot"},
        ValueError,
        "low_rank_w_init='glorot' is unknown. There are: glorot-uniform, glorot-normal",
    ),
    "an unknown non-linearity": ({"non_linearity": "gleu"}, ValueError, "non_linearity='gleu' is unknown"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_named(mistake):
    arguments, error, message = WRONG[mistake]
    with pytest.raises(error, match=message):
        attach(**arguments)
