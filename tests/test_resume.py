"""A run of examples/resume.py that is killed, at a save or at any moment, goes on as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
STEPS, EVERY, KILLED_AT = 15, 3, 3  # in the middle of the third save, that of step 9
EIGHT = ["--devices", "8", "--model-axis", "2"]


def start(*runs: list[str], first: str = "") -> subprocess.Popen:
    """A process with 8 virtual devices that makes these runs one after another."""
    code = f"import json, sys, resume\n{first}\nfor words in json.loads(sys.argv[1]): resume.main(words)"
    common = ["--tiny", "--steps", str(STEPS), "--batch-size", "24", "--tokens", "8", "--lora-r", "2"]
    words = json.dumps([[*common, *run] for run in runs])
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(EXAMPLES)}
    return subprocess.Popen([sys.executable, "-c", code, words], env=env, stderr=subprocess.PIPE, text=True)


def losses(out: Path) -> list[float]:
    return [float(line) for line in (out / "losses.txt").read_text().split()]


def complete(out: Path) -> list[int]:
    return sorted(int(path.name) for path in out.glob("checkpoints/*") if path.name.isdecimal())


def unfinished(out: Path) -> list[str]:
    return [path.name for path in out.glob("checkpoints/*") if not path.name.isdecimal()]


def kill_at_some_moment(out: Path, seed: int) -> None:
    """Starts or continues a run that saves at every step, and kills it when it has made some steps."""
    before = complete(out)
    process = start([*EIGHT, "--save-every", "1", "--out", str(out)])
    while process.poll() is None and complete(out) == before:
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 0.2))
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folders of runs: `whole` was never killed; `killed` was, and its copies went on; `moments` was, twice."""
    folder = tmp_path_factory.mktemp("resume")
    save = ["--save-every", str(EVERY), "--out"]
    # The thread that writes shall not get Python's lock, and finish, between the end of save() and the signal.
    undisturbed = "sys.setswitchinterval(10)"
    process = start([*EIGHT, *save, str(folder / "killed"), "--kill-at-save", str(KILLED_AT)], first=undisturbed)
    for seed in range(2):
        kill_at_some_moment(folder / "moments", seed)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    for name in ("same", "other", "one"):
        shutil.copytree(folder / "killed", folder / name)
    process = start(
        [*EIGHT, *save, str(folder / "whole")],
        [*EIGHT, *save, str(folder / "same")],
        [*EIGHT, *save, str(folder / "moments")],
        ["--devices", "8", "--model-axis", "4", *save, str(folder / "other")],
        ["--devices", "1", *save, str(folder / "one")],
    )
    assert process.wait() == 0, process.stderr.read()
    return folder


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save_the_earlier_checkpoints_are_whole(folder):
    assert complete(folder / "killed") == [3, 6]
    assert unfinished(folder / "killed") == ["9.orbax-checkpoint-tmp"]
    assert len(losses(folder / "killed")) == EVERY * KILLED_AT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["same", "moments"])
def test_on_the_same_mesh_it_goes_on_bit_for_bit(name, folder):
    assert len(losses(folder / "whole")) == STEPS
    assert len(set(losses(folder / "whole"))) == STEPS
    assert losses(folder / name) == losses(folder / "whole")
    deltas = [(folder / run / "delta" / "delta.safetensors").read_bytes() for run in (name, "whole")]
    assert deltas[0] == deltas[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["other", "one"])
def test_on_another_mesh_it_goes_on_but_for_rounding(name, folder):
    assert losses(folder / name)[: 2 * EVERY] == losses(folder / "whole")[: 2 * EVERY]
    np.testing.assert_allclose(losses(folder / name), losses(folder / "whole"), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "same", "moments", "other", "one"])
def test_two_checkpoints_are_left_and_nothing_unfinished(name, folder):
    assert complete(folder / name)[-1] == STEPS
    assert len(complete(folder / name)) == 2
    assert unfinished(folder / name) == []


@pytest.mark.slow
def test_a_checkpoint_holds_what_trains_and_nothing_of_the_backbone(folder):
    import jax
    import orbax.checkpoint as ocp

    checkpoint = folder / "whole" / "checkpoints" / str(STEPS)
    state = ocp.StandardCheckpointer().metadata(checkpoint / "state").item_metadata.tree
    leaves = {jax.tree_util.keystr(p, simple=True, separator="."): v for p, v in jax.tree.leaves_with_path(state)}
    arrays = {name: leaf for name, leaf in leaves.items() if leaf.shape}
    assert all("lora" in name or "classifier" in name for name in arrays.keys() - {"key"})
    trainable = 2 * 2 * (2 * 32) + 2 * 32 + 2  # query and value, two factors each, and the classifier
    assert sum(np.prod(leaf.shape) for name, leaf in arrays.items() if name != "key") == 3 * trainable
    split = [name for name, leaf in arrays.items() if "model" in leaf.sharding.partition_spec]
    assert len(split) == 3 * 2  # with both moments
    assert all(name.endswith(("query.lora.b", "value.lora.b")) for name in split)
    assert sum(file.stat().st_size for file in checkpoint.rglob("*")) < 4 * 5000 * 32 / 3  # of the word embedding alone


@pytest.mark.slow
def test_other_settings_are_refused(folder, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import resume

    args = resume.parse(["--tiny", "--batch-size", "24", "--tokens", "8"])
    with (
        resume.open_checkpoints(folder / "one" / "checkpoints") as checkpoints,
        pytest.raises(SystemExit, match="was begun with --lora-r 2, not 8"),
    ):
        resume.restore(checkpoints, None, None, args)


@pytest.mark.slow
def test_batches_go_on_from_their_place_also_at_the_border_of_epochs(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import resume

    args = resume.parse(["--tiny", "--batch-size", "7", "--tokens", "8"])
    sentences = resume.load(args)[1][:30]  # four batches an epoch
    batches = resume.Batches(sentences, args)
    for _ in range(10):
        place = json.loads(json.dumps(batches.place()))
        again = resume.Batches(sentences, args)
        again.go_to(place)
        for _ in range(6):
            want, have = next(batches), next(again)
            assert all(np.array_equal(want[key], have[key]) for key in want)
        batches.go_to(place)
        next(batches)
