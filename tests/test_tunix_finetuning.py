"""examples/tunix_finetuning.py trains with tunix's trainer, and says what is missing where tunix is not there."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import jdelta

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        sys.modules.pop("tunix_finetuning", None)
        return importlib.import_module("tunix_finetuning")


@pytest.mark.tunix
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_the_loss_falls_the_text_changes_and_the_delta_is_saved(example, method, tmp_path, capsys):
    small = ["--steps", "20", "--length", "24", "--batch-size", "8", "--rank", "4", "--tokens", "8"]
    words = ["--method", method, *small, "--learning-rate", "3e-2", "--out", str(tmp_path)]
    results = example.main(words)
    assert len(results["losses"]) == 20
    assert np.mean(results["losses"][-3:]) < results["losses"][0]
    assert results["before"] != results["after"]
    text = capsys.readouterr().out
    assert all(repr(each) in text for each in (*results["before"], *results["after"]))
    inputs = example.build_delta(example.build_model(0), example.parse(words)).structure[""].args
    loaded = jdelta.AutoDeltaModel.from_finetuned(
        tmp_path, backbone_model=example.build_model(0), dummy_inputs=tuple(inputs)
    )
    assert len(loaded.paths) == results["trained"]


def test_without_tunix_it_says_what_to_install(example, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs tunix and qwix\.[^\n]*\n\n    pip install -e '\.\[tunix\]'"):
        example.main([])
