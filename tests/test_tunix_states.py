"""States of tunix's models with deltas: what is split, merged, left out and run row by row computes the same."""

import jax
import numpy as np
import pytest
import tunix_models
from flax import nnx

import jdelta

pytestmark = pytest.mark.tunix


@pytest.fixture(scope="module", params=tunix_models.FAMILIES)
def trained(request):
    model, inputs = tunix_models.build(request.param), tunix_models.inputs()
    delta = jdelta.LoraModel(model, lora_r=2, dummy_inputs=inputs)
    graphdef, state = nnx.split(nnx.clone(model))
    trainable, frozen = delta.partition(state)
    moved = jax.tree.map(lambda leaf: leaf + 0.05, trainable)
    logits = jax.jit(lambda state: nnx.merge(graphdef, state)(*inputs)[0])(delta.combine(moved, frozen))
    return model, delta, inputs, (trainable, moved), frozen, logits


def same(one, other):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


def test_a_state_without_the_delta_runs_as_the_backbone_does(trained):
    model, delta, inputs, (_, moved), frozen, logits = trained
    graphdef = nnx.graphdef(model)
    reference = jax.jit(lambda state: nnx.merge(graphdef, jdelta.without(state, delta))(*inputs)[0])
    with delta.disabled():
        expected = model(*inputs)[0]
    same(reference(delta.combine(moved, frozen)), expected)
    assert np.abs(logits - expected).max() > 0.1


def test_a_merged_state_runs_on_the_bare_model(trained):
    model, delta, inputs, (_, moved), frozen, logits = trained
    merged = delta.merge(delta.combine(moved, frozen))
    with delta.disabled():
        same(nnx.merge(nnx.graphdef(model), merged)(*inputs)[0], logits)


def test_each_row_has_its_delta(trained):
    model, delta, inputs, trees, frozen, logits = trained
    rows = jdelta.rowwise(model, frozen)(*inputs, params=jdelta.stack(trees))[0]
    same(rows[1], logits[1])
    with delta.disabled():
        same(rows[0], model(*inputs)[0][0])  # with a delta that has not moved
