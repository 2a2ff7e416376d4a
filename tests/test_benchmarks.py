"""That `benchmarks/side_by_side.py` runs, and that what it compares computes the same."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import llama_contenders
import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "side_by_side.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("side_by_side") / "found.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--only", "contenders", "--json", str(file)]
    subprocess.run(
        command, check=True, capture_output=True, env={**os.environ, "USE_TORCH": "1"}
    )  # one of them is in it
    return json.loads(file.read_text())


def test_who_is_left_out_is_said(found: dict[str, Any]) -> None:
    rows, missing = found["contenders"]["rows"], found["contenders"]["missing"]
    names = {row["contender"] for row in rows}
    assert names >= {"jdelta", "jdelta, fused attention", "jdelta, fused and lean", "by hand", "full fine-tuning"}
    assert not names & missing.keys()
    assert names | missing.keys() >= {"qwix", "PyTorch PEFT"}
    assert ("qwix" in missing) == (importlib.util.find_spec("qwix") is None)


def test_all_contenders_train_the_same(found: dict[str, Any]) -> None:
    rows = [row for row in found["contenders"]["rows"] if row["contender"] != "full fine-tuning"]
    for row in rows:
        assert row["losses"] == pytest.approx(rows[0]["losses"], abs=1e-4)
        assert row["trained_parameters"] == rows[0]["trained_parameters"]
        assert row["optimizer_bytes"] == pytest.approx(rows[0]["optimizer_bytes"], rel=0.01)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA counts all FLOPs on the CPU only")
def test_a_step_takes_no_more_flops_than_one_by_hand(found: dict[str, Any]) -> None:
    rows = {row["contender"]: row for row in found["contenders"]["rows"]}
    assert rows["jdelta"]["flops"] <= 1.001 * rows["by hand"]["flops"]
    assert rows["jdelta, fused attention"]["flops"] <= 1.001 * rows["by hand"]["flops"]
    assert rows["jdelta, fused and lean"]["temporary_bytes"] < 0.9 * rows["by hand"]["temporary_bytes"]
    assert rows["by hand"]["flops"] < rows["full fine-tuning"]["flops"]


def test_every_figure_is_there(found: dict[str, Any]) -> None:
    for row in found["contenders"]["rows"]:
        assert row["seconds"] > 0
        assert row["processor_seconds"] >= row["system_seconds"]
        assert row["time"]["full fine-tuning"]["median"] > 0
        if row["contender"] != "PyTorch PEFT":
            for key in ("temporary_bytes", "peak_bytes", "trace_seconds", "compile_seconds", "tracing"):
                assert row[key], key


@pytest.mark.tunix
def test_jdelta_costs_no_more_than_qwix_on_llama() -> None:
    rows = {row["contender"]: row for row in llama_contenders.measure(llama_contenders.TINY, rounds=1)["rows"]}
    assert rows["jdelta"]["flops"] <= 1.001 * rows["qwix"]["flops"]
    assert rows["jdelta"]["flops"] <= 1.001 * rows["by hand"]["flops"]
    assert rows["jdelta"]["temporary_bytes"] <= 1.01 * rows["by hand"]["temporary_bytes"]
    assert rows["jdelta"]["trained_parameters"] == rows["qwix"]["trained_parameters"]
    assert rows["jdelta"]["losses"] == pytest.approx(rows["qwix"]["losses"], abs=1e-4)


def test_the_costs_of_methods_are_against_full_fine_tuning_and_lora(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    command = [sys.executable, str(SCRIPT.with_name("method_costs.py")), "--quick", "--time", "1", "--json", str(file)]
    subprocess.run([*command, "--methods", "miss", "shira", "head"], check=True, capture_output=True)
    rows = {row["method"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows.keys() == {"lora", "full", "miss", "shira", "head"}
    assert rows["full"]["flops"] == rows["lora"]["memory"] == 1
    assert rows["head"]["flops"] < rows["lora"]["flops"] < 1
    assert all(row["time"]["median"] > 0 for row in rows.values())
