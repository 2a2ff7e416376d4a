"""LoRA-FA: `a` is frozen, and the inputs of modules are not kept for its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import fresh
from flax import linen as nn
from flax import nnx

import jdelta
from jdelta.trees import surgery

ROWS, WIDTH = 1024, 32


def chain(freeze_a):
    """Layers whose inputs nothing else keeps."""
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    module = nn.Sequential([nn.Dense(WIDTH) for _ in range(6)])
    backbone = jdelta.Backbone(module, jax.eval_shape(module.init, jax.random.key(0), x)["params"], (x,))
    delta = jdelta.LoraModel(backbone, ["[r]layers_\\d"], lora_r=2, freeze_a=freeze_a)
    return x, backbone, delta


@pytest.mark.parametrize("fused", [True, False])
def test_the_inputs_of_modules_are_not_kept(fused, monkeypatch):
    monkeypatch.setattr("jdelta.core.products.fusing_is_cheaper", lambda *_: fused)
    arrays, flops = [], []
    for freeze_a in (False, True):
        x, backbone, delta = chain(freeze_a)
        trains, frozen = delta.partition()

        def loss(own, frozen, x, run=backbone):
            return jnp.sum(run(x, params=jdelta.combine(own, frozen)) ** 2)

        step = jax.jit(jax.grad(loss)).lower(trains, frozen, x).compile()
        arrays.append(step.memory_analysis().temp_size_in_bytes / (4 * ROWS * WIDTH))
        flops.append(step.cost_analysis()["flops"])
    assert arrays[1] < arrays[0] - 3.5  # of five inputs inside, each the size of an array
    assert flops[1] < flops[0]


def test_b_has_the_gradient_of_lora_and_a_stays_bit_for_bit():
    grads, leaves = [], []
    for freeze_a in (False, True):
        model = fresh("bert", "FlaxBertForSequenceClassification")
        delta = jdelta.LoraModel(model, lora_r=2, freeze_a=freeze_a)
        trains, frozen = delta.partition()
        ids = jnp.array([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
        grad = jax.jit(jax.grad(lambda t: jnp.sum(model(ids, params=jdelta.combine(t, frozen)).logits ** 2)))  # noqa: B023
        grads.append({path: leaf for path, leaf in surgery.flatten(grad(trains)).items() if path[-1] == "b"})
        leaves.append({path[-1] for path in surgery.flatten(trains)})
    assert leaves == [{"a", "b"}, {"b"}]
    for path, want in grads[0].items():
        np.testing.assert_allclose(grads[1][path], want, rtol=1e-5, atol=1e-7)

    tx = delta.optimizer(optax.adamw(0.1, weight_decay=0.1))
    before, state = model.params, tx.init(model.params)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, before), state, before)
    after = optax.apply_updates(before, updates)
    moved = {path[-1] for path, new in surgery.flatten(after).items() if (new != surgery.flatten(before)[path]).any()}
    assert moved == {"b"}


def test_on_nnx_b_alone_is_what_trains():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    wrapped = nnx.Sequential(model)
    delta = jdelta.LoraModel(wrapped, ["0"], lora_r=2, freeze_a=True, dummy_inputs=(jnp.ones((2, 4)),))
    assert [path[-1] for path, _ in nnx.to_flat_state(nnx.state(wrapped, delta.filter))] == ["b"]


def test_it_is_saved_with_a_and_written_for_peft_as_lora(tmp_path):
    model = fresh("bert", "FlaxBertForSequenceClassification")
    delta = jdelta.LoraModel(model, lora_r=2, freeze_a=True)
    model.params = jax.tree.map(lambda leaf: leaf + 0.01, model.params)
    delta.save_finetuned(tmp_path / "saved")
    delta.to_peft(tmp_path / "peft")
    own = surgery.flatten(delta.own(model.params))
    delta.remove()
    again = jdelta.AutoDeltaModel.from_finetuned(tmp_path / "saved", model)
    assert again.config.freeze_a
    found = surgery.flatten(again.own(model.params))
    assert all(np.array_equal(found[path], leaf) for path, leaf in own.items())
    again.remove()
    of_peft = jdelta.from_peft(tmp_path / "peft", model)
    assert sorted(map(np.shape, surgery.flatten(of_peft.own(model.params)).values())) == sorted(
        map(np.shape, own.values())
    )


def test_an_embedding_is_refused_since_nothing_would_train():
    model = fresh("bert", "FlaxBertForSequenceClassification")
    with pytest.raises(ValueError, match=r"word_embeddings.*`a` starts at 0 in an embedding"):
        jdelta.LoraModel(model, ["word_embeddings", "query"], freeze_a=True)
    assert "lora" not in str(jax.tree.structure(model.params))
