"""The table of what each method can do, in docs/methods.md, is what happens; and what it says of all holds for all."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh, noisy
from flax import linen as nn
from matrix import ALL
from tiers import breadth

import jdelta
from jdelta.core import config

IDS = jnp.array([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
PAGE = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
VERBS = ("merge", "movement", "convert_to_lora", "to_peft")
COMPOSED = "composed"  # can what its methods can
EVERY = sorted(
    kind for kind, each in config.METHODS.items() if each.__module__.startswith("jdelta.methods.") and kind != COMPOSED
)


def table() -> dict[str, dict[str, str]]:
    """`delta_type` to verb to what the page says: yes, or no and why."""
    rows = {}
    for line in PAGE[PAGE.index("## What each can do") :].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = re.findall(r"`(\w+)`", cells[0])
        if line.startswith("| `") and len(cells) == 1 + len(VERBS) and names != ["delta_type"]:
            rows |= {name: dict(zip(VERBS, cells[1:], strict=True)) for name in names}
    return rows


def arguments_of(kind: str) -> tuple[type[jdelta.DeltaModel], dict]:
    return next((cls, arguments) for cls, arguments in ALL.values() if cls.method_class.delta_type == kind)


def moved(model, kind: str, **more) -> jdelta.DeltaModel:
    """The delta on the model, trained by noise."""
    cls, arguments = arguments_of(kind)
    delta = cls(model, **{**arguments, **more})
    if kind in ("prefix", "soft_prompt") and "classifier" in model.params:  # PEFT saves it with a prompt
        delta.freeze_module(exclude=["deltas", "classifier"])
    trains, frozen = delta.partition()
    model.params = jdelta.combine(noisy(trains), frozen)
    return delta


def test_every_method_is_in_the_table():
    assert sorted(table()) == EVERY


@pytest.mark.parametrize("kind", breadth(EVERY, "lora", "bitfit", "adapter", "soft_prompt"))
def test_what_the_table_says_is_what_happens(kind, tmp_path):
    run = {
        "merge": lambda delta: delta.merge(),
        "movement": lambda delta: delta.movement(),
        "convert_to_lora": lambda delta: jdelta.convert_to_lora(delta, rank=2),
        "to_peft": lambda delta: delta.to_peft(tmp_path / "peft"),
    }
    for verb in VERBS:
        delta, says = moved(fresh("bert", "FlaxBertForSequenceClassification"), kind), table()[kind][verb]
        if says == "yes":
            run[verb](delta)
            continue
        assert re.fullmatch("no: .+", says), says
        with pytest.raises(ValueError, match=r"no change of|moves no weights|more than change matrices|has no method"):
            run[verb](delta)


@pytest.mark.parametrize("kind", breadth(EVERY, "lora", "prefix"))
def test_every_method_has_rows_of_its_own_in_a_batch_and_places_on_a_mesh(kind):
    model = fresh("bert", "FlaxBertForSequenceClassification")
    delta = moved(model, kind)
    trains, frozen = delta.partition()
    both = [trains, noisy(trains, seed=1)]
    rows = jdelta.select(jdelta.stack(both), [0, 1])
    found = jdelta.rowwise(model, frozen)(IDS, params=rows).logits
    for i in range(2):
        alone = model(IDS, params=jdelta.combine(both[i], frozen)).logits[i]
        np.testing.assert_allclose(found[i], alone, rtol=1e-4, atol=1e-5)

    specs = jax.tree.map(lambda leaf: jax.P(*(None,) * leaf.ndim), jdelta.prune(model.params, delta))
    placed = jax.device_put(model.params, delta.shardings(specs, jax.make_mesh((1,), ("model",))))
    assert jax.tree.all(jax.tree.map(np.array_equal, placed, model.params))


class Layer(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, _):
        kind = {"dtype": self.dtype}
        x = x + nn.MultiHeadDotProductAttention(2, **kind, name="attn")(nn.LayerNorm(**kind, name="norm")(x))
        return x + jnp.tanh(nn.Dense(8, **kind, name="up")(x)), None


class Net(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(20, 8, dtype=self.dtype, name="word")(ids)
        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return layers(self.dtype, name="layers")(x, None)[0]


# Where a method goes in that network, if not at its query and `up`.
AT = {
    "parallel_adapter": ["attn", "attn"],
    "ln_tuning": ["norm"],
    "prefix": ["attn"],
    "bitfit": ["layers"],
    "compacter": ["up"],
    **{kind: ["word"] for kind in ("soft_prompt", "trainable_tokens")},
}


@pytest.mark.parametrize("kind", breadth(EVERY, "lora", "prefix"))
def test_every_method_runs_in_remat_and_scan_and_in_bfloat16(kind):
    found = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        module = Net(dtype)
        params = jax.jit(module.init)(jax.random.key(0), IDS)["params"]
        backbone = jdelta.Backbone(module, params, dummy_inputs=(IDS,))
        delta = moved(backbone, kind, modified_modules=AT.get(kind, ["query", "up"]))
        trains, frozen = delta.partition()
        assert {leaf.dtype for leaf in jax.tree.leaves(trains)} == {jnp.dtype("float32")}

        @jax.jit
        @jax.value_and_grad
        def loss(own, frozen, run=backbone):
            return jnp.mean(run(IDS, params=jdelta.combine(own, frozen)).astype(jnp.float32) ** 2)

        value, grads = loss(trains, frozen)
        found[dtype] = float(value)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
        assert backbone(IDS).dtype == dtype
    assert found[jnp.bfloat16] == pytest.approx(found[jnp.float32], rel=0.05)
