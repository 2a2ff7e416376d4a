"""AdaLoRA shrinks ranks as PEFT's allocator does, penalises as PEFT does, and folders hold the ranks that are left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from parity import peft, torch

import jdelta
from jdelta.trees import surgery

pytestmark = pytest.mark.parity

CONFIG = transformers.BertConfig(
    vocab_size=99,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
IDS = np.random.default_rng(0).integers(1, 99, (8, 6))
LABELS = np.arange(8) % 2
STEPS, RATE = 12, 0.05
OPTIONS = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": STEPS, "lora_alpha": 8}


@pytest.fixture
def both(tmp_path: Path) -> tuple[Any, jdelta.DeltaModel]:
    """PEFT's model, and jdelta's with the same values."""
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(CONFIG).eval()
    base.save_pretrained(tmp_path / "base")
    config = peft.AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], **OPTIONS)
    wrapped = peft.get_peft_model(base, config).eval()
    wrapped.save_pretrained(tmp_path / "start")
    model = transformers.FlaxBertForSequenceClassification.from_pretrained(tmp_path / "base", from_pt=True)
    delta = jdelta.from_peft(tmp_path / "start", model)
    return wrapped, delta


def values_of(wrapped: Any) -> list[np.ndarray]:
    return [p.detach().numpy().ravel() for name, p in wrapped.named_parameters() if "lora_E" in name]


def test_the_same_singular_values_are_zero_after_each_step(both: Any, tmp_path: Path) -> None:
    wrapped, delta = both
    delta.freeze_module(exclude=["deltas"])
    trained = [p for name, p in wrapped.named_parameters() if "lora_" in name]
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_("lora_" in name)
    descent = torch.optim.SGD(trained, lr=RATE)

    trains, frozen = delta.partition()
    tx = delta.optimizer(optax.sgd(RATE))

    @jax.jit
    def step(trains: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        def loss(trains: Any) -> jax.Array:
            params = jdelta.combine(trains, frozen)
            logits = delta.backbone_model(IDS, params=params).logits
            task = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()
            return task + delta.penalty(params)

        value, grads = jax.value_and_grad(loss)(trains)
        updates, state = tx.update(grads, state, trains)
        return optax.apply_updates(trains, updates), state, value

    state, left = tx.init(trains), []
    for i in range(STEPS):
        out = wrapped(input_ids=torch.tensor(IDS), labels=torch.tensor(LABELS))
        descent.zero_grad()
        out.loss.backward()
        descent.step()
        wrapped.base_model.update_and_allocate(i)
        trains, state, value = step(trains, state)
        np.testing.assert_allclose(value, out.loss.item(), rtol=1e-5)
        ours = {path[:-1]: np.asarray(leaf) for path, leaf in surgery.flatten(trains).items() if path[-1] == "e"}
        for mine, theirs in zip(ours.values(), values_of(wrapped), strict=True):
            assert ((mine == 0) == (theirs == 0)).all(), i
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-6)
        left.append(sum(int((mine != 0).sum()) for mine in ours.values()))
    assert left[0] == left[2] == left[3] == 16
    assert left[4] > left[6] >= left[8]  # every second step; between these what was zero moves again
    assert left[9:] == [8, 8, 8]  # two of four, on average

    wrapped.save_pretrained(tmp_path / "end")  # with the ranks that are left
    model = delta.backbone_model
    expected = wrapped(input_ids=torch.tensor(IDS)).logits.detach().numpy()
    delta.remove()
    again = jdelta.from_peft(tmp_path / "end", model)
    assert {*again.config.rank_pattern.values()} <= {0, 1, 2, 3, 4}
    assert sum(again.config.rank_pattern.values()) == 8
    np.testing.assert_allclose(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    again.to_peft(tmp_path / "back")
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "back").eval()
    np.testing.assert_allclose(loaded(input_ids=torch.tensor(IDS)).logits.detach().numpy(), expected, atol=1e-5)
    assert jnp.isfinite(model(IDS).logits).all()
