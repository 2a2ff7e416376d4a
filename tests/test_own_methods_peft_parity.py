"""The methods that docs/own-methods.md writes have PyTorch PEFT's numbers: logits for the same weights, within 1e-5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from own_methods import defined
from parity import assert_close, peft, torch

import jdelta
from jdelta.core.config import METHODS
from jdelta.trees import surgery

pytestmark = pytest.mark.parity

CONFIG = transformers.BertConfig(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=37,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
IDS = np.random.default_rng(0).integers(0, 99, (3, 7))
NAMES = ["query", "value"]
IA3 = ["key", "value", "output.dense"]


def cases():
    return {
        "ia3": (peft.IA3Config(target_modules=IA3, feedforward_modules=["output.dense"]), IA3),
        "dora": (peft.LoraConfig(target_modules=NAMES, r=8, lora_alpha=16, use_dora=True), NAMES),
        "vera": (peft.VeraConfig(target_modules=NAMES, r=16), NAMES),
    }


def leaf_of(name, value):
    """The path of jdelta's leaf, and its value, for a tensor of PEFT's."""
    host, _, kind = name.removeprefix("base_model.model.").partition(".ia3_l")
    if not kind and "ia3_l" in name:
        return (*host.split("."), "my_ia3", "l"), value.reshape(-1)
    for theirs, ours, change in (
        (".lora_A.default.weight", ("my_dora", "a"), np.transpose),
        (".lora_B.default.weight", ("my_dora", "b"), np.transpose),
        (".lora_magnitude_vector.default.weight", ("my_dora", "m"), np.ravel),
        (".vera_lambda_d.default", ("my_vera", "lambda_d"), np.ravel),
        (".vera_lambda_b.default", ("my_vera", "lambda_b"), np.ravel),
        (".ia3_l.default", ("my_ia3", "l"), np.ravel),
    ):
        if name.endswith(theirs):
            return (*name.removeprefix("base_model.model.").removesuffix(theirs).split("."), *ours), change(value)
    return None


@pytest.mark.parametrize("kind", ["ia3", "dora", "vera"])
def test_the_logits_are_those_of_peft(kind, monkeypatch):
    config, names = cases()[kind]
    torch.manual_seed(0)
    theirs = peft.get_peft_model(transformers.BertForSequenceClassification(CONFIG).eval(), config)
    state = theirs.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            if any(part in name for part in ("ia3_l", "lora_", "vera_lambda")):
                tensor.copy_(torch.rand(tensor.shape) + 0.3)
    logits = theirs.double()(input_ids=torch.tensor(IDS)).logits.detach().numpy()

    flat = {name: tensor.numpy().astype(np.float32) for name, tensor in state.items()}
    ours = transformers.FlaxBertForSequenceClassification(CONFIG)
    ours.params = backbone_values(ours.params, flat)
    method = defined()[{"ia3": "MyIa3", "dora": "MyDora", "vera": "MyVera"}[kind]]
    monkeypatch.setitem(METHODS, method.delta_type, method)
    delta = jdelta.DeltaModel(ours, names, method=method())
    new = dict(filter(None, (leaf_of(name, value) for name, value in flat.items())))
    if kind == "vera":
        for side in "AB":
            value = flat[f"base_model.vera_{side}.default"]
            new["my_vera", side] = value.T
    leaves = surgery.flatten(ours.params)
    assert {path for path in leaves if path in delta.paths} == new.keys()
    ours.params = surgery.unflatten({**leaves, **{path: jnp.asarray(value) for path, value in new.items()}})
    assert_close(jax.jit(lambda params: ours(IDS, params=params).logits)(ours.params), logits, kind)
    merged = delta.merge(ours.params)
    delta.detach()
    assert_close(ours(IDS, params=merged).logits, logits, f"{kind}, merged")


def backbone_values(params, flat):
    """The backbone's parameters, from PEFT's state."""
    plain = {}
    for name, value in flat.items():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".modules_to_save.default", "")
        plain[name.replace(".original_module", "")] = value
    found = {}
    for path, leaf in surgery.flatten(params).items():
        kinds = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
        value = plain[".".join((*path[:-1], kinds[path[-1]]))]
        found[path] = jnp.asarray(value.T if path[-1] == "kernel" else value)
        assert found[path].shape == leaf.shape
    return surgery.unflatten(found)
