"""What a model carries, as a table and as a dict: each number by counting, each state by what was done."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh, noisy
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jdelta
from jdelta.trees import surgery


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(nn.Dense(8, name="up")(x))


X = jnp.ones((2, 4))
BACKBONE = 4 * 8 + 8 + 8 * 3 + 3


@pytest.fixture
def net():
    return jdelta.Backbone(Net(), Net().init(jax.random.key(0), X)["params"], (X,))


def entries(delta, **arguments):
    return {entry.pop("name"): entry for entry in delta.status(**arguments).to_dict()["deltas"]}


def test_each_delta_of_the_model_is_told_by_any_of_them(net):
    lora = jdelta.LoraModel(net, ["up", "out"], lora_r=2, unfrozen_modules=["out.bias"])
    bias = jdelta.BitFitModel(net, ["up"])
    adapter = jdelta.AdapterModel(net, ["up"], bottleneck_dim=4, name="mine")
    adapter.detach()
    own = 2 * (4 + 8) + 2 * (8 + 3)
    expected = {
        "lora": ("lora", "attached", 2, own, own + 3, {"float32": 4}),
        "bitfit": ("bitfit", "attached", 1, 0, 8, {"float32": 1}),
        "mine": ("adapter", "detached", 1, 8 * 4 + 4 + 4 * 8 + 8, 0, {"float32": 4}),
    }
    for delta in (lora, bias, adapter):
        found = delta.status()
        assert (found.backbone, found.parameters) == ("Net", BACKBONE)
        assert [entry.name for entry in found.deltas] == ["lora", "bitfit", "mine"]
        for entry in found.deltas:
            counted = (entry.method, entry.state, entry.targets, entry.parameters, entry.trains, dict(entry.dtypes))
            assert counted == expected[entry.name]
            assert entry.devices == ("cpu:0",)


def test_what_trains_follows_freeze_module(net):
    delta = jdelta.LoraModel(net, ["up"], lora_r=2)
    delta.freeze_module(["up"])
    assert entries(delta)["lora"]["trains"] == 4 * 8 + 8 + 2 * (4 + 8)
    trainable, _ = delta.partition()
    assert entries(delta)["lora"]["trains"] == sum(leaf.size for leaf in jax.tree.leaves(trainable))


def test_states_change_with_the_verbs(net):
    delta = jdelta.LoraModel(net, ["up"], lora_r=2)
    net.params = jdelta.combine(noisy(delta.partition()[0]), delta.partition()[1])
    states = [entries(delta)["lora"]["state"]]
    for verb in (delta.merge, delta.unmerge, delta.detach, delta.attach):
        verb()
        states.append(entries(delta)["lora"]["state"])
    assert states == ["attached", "merged", "attached", "detached", "attached"]
    with delta.disabled():
        assert entries(delta)["lora"]["state"] == "detached"
        assert entries(delta)["lora"]["parameters"] == 2 * (4 + 8)


def test_a_delta_that_nobody_holds_is_there_while_the_model_runs_it(net):
    jdelta.AdapterModel(net, ["up"], bottleneck_dim=4)
    delta = jdelta.LoraModel(net, ["up"], lora_r=2)
    found = entries(delta)
    assert found["adapter"]["state"] == "attached"
    assert found["adapter"]["trains"] is None
    assert found["adapter"]["parameters"] == 8 * 4 + 4 + 4 * 8 + 8


def test_values_are_those_of_the_tree_that_is_given(net):
    delta = jdelta.LoraModel(net, ["up"], lora_r=2)
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    leaves = dict(surgery.flatten(net.params))
    leaves["up", "lora", "a"] = jax.device_put(leaves["up", "lora", "a"], NamedSharding(mesh, P()))
    leaves["up", "lora", "b"] = leaves["up", "lora", "b"].astype(jnp.bfloat16)
    found = entries(delta, params=surgery.unflatten(leaves))["lora"]
    assert found["dtypes"] == {"float32": 1, "bfloat16": 1}
    assert found["shardings"] == {"replicated": 1}
    assert entries(delta)["lora"]["dtypes"] == {"float32": 2}
    assert entries(delta)["lora"]["shardings"] == {}


def test_of_shapes_there_is_no_place():
    net = jdelta.Backbone(Net(), None, (X,))
    delta = jdelta.LoraModel(net, ["up"], lora_r=2)
    found = entries(delta)["lora"]
    assert (found["parameters"], found["trains"], found["devices"]) == (24, 24, [])
    assert "shapes only" in str(delta.status())


def test_it_prints_as_a_table_and_goes_to_json(net):
    delta = jdelta.LoraModel(net, ["up", "out"], lora_r=2)
    found = delta.status()
    lines = str(found).splitlines()
    assert repr(found) == str(found)
    assert f"Net: {BACKBONE} parameters" in lines[0]
    row = next(line for line in lines if "lora" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        *("lora", "lora", "attached", "2", "46", "46", "float32", "cpu:0", "")
    ]
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert "attached" in found._repr_html_()


def test_a_delta_that_does_nothing_yet_has_no_place(net):
    delta = jdelta.DeltaModel(net)
    found = entries(delta)["delta"]
    assert (found["targets"], found["parameters"], found["devices"], found["dtypes"]) == (0, 0, [], {})
    assert "shapes only" not in str(delta.status())


@pytest.mark.parametrize(
    ("numbers", "shown"),
    [([0], "tpu:0"), ([0, 1, 2, 3], "tpu:0-3"), ([10, 2, 0, 1], "tpu:0-2,10"), ([], "")],
)
def test_devices_are_shown_as_ranges(numbers, shown):
    from jdelta.display.status import _order, _ranges

    assert _ranges(sorted((f"tpu:{number}" for number in numbers), key=_order)) == shown


def test_what_speeds_a_model_up_is_no_delta():
    model = fresh("bert", "FlaxBertForSequenceClassification")
    jdelta.fused_attention(model)
    delta = jdelta.LoraModel(model, ["query"], lora_r=2)
    assert list(entries(delta)) == ["lora"]
    assert entries(delta)["lora"]["targets"] == 2
