"""LoRAs of other ranks and modules in one form."""

import jax
import numpy as np
import pytest
from conftest import fresh, noisy, train_deltas

import jdelta

IDS = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])
KINDS = {
    "movies": {"modified_modules": ["query", "value"], "lora_r": 3, "lora_alpha": 5},
    "tweets": {
        "modified_modules": ["query", "output.dense"],
        "lora_r": 2,
        "rank_pattern": {"0.attention.self.query": 5},
    },
    "tables": {"modified_modules": ["word_embeddings"], "lora_r": 4, "use_rslora": True},
}


def model():
    return fresh("bert", "FlaxBertForSequenceClassification")


@pytest.fixture(scope="module")
def deltas():
    """Each trained, and the logits with it."""
    found, logits = [], []
    for seed, arguments in enumerate(KINDS.values()):
        backbone = model()
        delta = jdelta.LoraModel(backbone, unfrozen_modules=["classifier"], **arguments)
        train_deltas(delta, seed)
        found.append(delta.finetuned())
        logits.append(np.asarray(backbone(IDS).logits))
    return found, logits


def test_each_computes_what_it_did_and_one_program_runs_them_all(deltas, tmp_path):
    found, logits = deltas
    padded = jdelta.padded(found)
    assert len({str(delta.config) for delta in padded}) == 1
    assert len({tuple(sorted((key, value.shape) for key, value in delta.values.items())) for delta in padded}) == 1
    assert padded[0].config.lora_r == 5
    assert padded[0].config.scale_of("bert.encoder.layer.0.attention.self.query") == 1

    backbone = model()
    delta = jdelta.AutoDeltaModel.from_finetuned(padded[0], backbone)
    run = jax.jit(lambda params: backbone(IDS, params=params).logits)
    for i, each in enumerate(padded):
        each.save(tmp_path / str(i))
        np.testing.assert_allclose(run(delta.load_finetuned(tmp_path / str(i))), logits[i], atol=1e-6)
    assert run._cache_size() == 1


@pytest.mark.slow
def test_they_are_stacked_and_run_by_row(deltas):
    found, logits = deltas
    padded = jdelta.padded(found, name="task")
    backbone = model()
    delta = jdelta.AutoDeltaModel.from_finetuned(padded[0], backbone)
    assert delta.name == "task"
    trees = [delta.partition(delta.load_finetuned(each))[0] for each in padded]
    _, frozen = delta.partition()
    rows = jdelta.select(jdelta.stack(trees), [2, 0])
    by_row = jdelta.rowwise(backbone, frozen)(IDS, params=rows).logits
    np.testing.assert_allclose(by_row, [logits[2][0], logits[0][1]], atol=1e-6)


def test_parameters_by_name_have_their_own_scale():
    backbone = model()
    name = "0.intermediate.dense.kernel"
    kinds = [{"lora_alpha": 6}, {"alpha_pattern": {name: 9}}]
    found = []
    for kind in kinds:
        delta = jdelta.LoraModel(backbone, modified_parameters=[name], lora_r=3, **kind)
        backbone.params = noisy(backbone.params)
        found.append(delta.finetuned())
        delta.remove()
    padded = jdelta.padded(found)
    for scale, before, after in zip((2, 3), found, padded, strict=True):
        key = next(key for key in before.values if key.endswith(".b"))
        np.testing.assert_allclose(after.values[key], scale * before.values[key], rtol=1e-6)
        assert after.config.modified_modules is None
    total = jdelta.weighted_sum(found, [1, 1])
    product = sum(
        scale * delta.values[f"{key[:-2]}.a"] @ delta.values[key] for scale, delta in zip((2, 3), found, strict=True)
    )
    np.testing.assert_allclose(total.values[f"{key[:-2]}.a"] @ total.values[key], product, rtol=1e-5, atol=1e-6)


def test_what_does_not_go_together_is_refused(deltas):
    found, _ = deltas
    backbone = model()
    adapter = jdelta.AdapterModel(backbone)
    train_deltas(adapter)
    with pytest.raises(ValueError, match=r"delta 2 is of method 'adapter'\. jdelta\.convert_to_lora makes LoRA"):
        jdelta.padded([found[0], adapter])
    lone = jdelta.LoraModel(backbone, ["query"])
    train_deltas(lone)
    with pytest.raises(ValueError, match=r"do not train the same leaves of the backbone: classifier"):
        jdelta.padded([found[0], lone])
    kinds = ({"lora_dropout": 0.5}, {"use_dora": True})
    dropped, dora = (jdelta.LoraModel(model(), ["query"], **kind) for kind in kinds)
    for delta in (dropped, dora):
        train_deltas(delta)
    with pytest.raises(ValueError, match=r"lora_dropout=0\.5"):
        jdelta.padded([lone, dropped])
    with pytest.raises(ValueError, match=r"does not have the leaves of LoRA at .*\.m"):
        jdelta.padded([dora])
