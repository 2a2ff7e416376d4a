"""Programs of several processes: in one order, and none waits for one that has failed."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from jdelta.trees import fingerprint, processes


@pytest.fixture
def spread(monkeypatch):
    """Stands for arrays of several processes: how they are gathered is recorded, (array, thread)."""
    gathered = []

    def to_host(value):
        gathered.append((id(value), threading.current_thread()))
        return np.asarray(value)

    monkeypatch.setattr(fingerprint, "spread", lambda value: True)
    monkeypatch.setattr(fingerprint, "to_host", to_host)
    return gathered


def test_a_fingerprint_gathers_in_the_order_of_names_in_the_calling_thread(spread):
    leaves = {f"{i * 7 % 10}": jax.numpy.full((50_000,), i) for i in range(10)}
    first = fingerprint.fingerprint(leaves)
    assert spread == [(id(leaves[name]), threading.current_thread()) for name in sorted(leaves)]
    assert fingerprint.fingerprint(leaves) == first == fingerprint.fingerprint({k: leaves[k] for k in sorted(leaves)})
    assert len(spread) == 10  # what is known is not gathered again


def others(monkeypatch, *reports):
    """Stands for a program of which this is process 1 and the others report so."""

    def exchange(text):
        mine = [*reports]
        mine.insert(1, text)
        return mine

    monkeypatch.setattr(jax, "process_count", lambda: len(reports) + 1)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(processes, "_exchange", exchange)


def test_what_another_process_raises_is_raised_here(monkeypatch):
    others(monkeypatch, '["OSError", "No space left on device"]')
    with pytest.raises(OSError, match="process 0: No space left"):
        processes.together(lambda: 1)
    ran = []
    with pytest.raises(OSError, match="process 0: No space left"):
        processes.by_first(lambda: ran.append(1))
    assert ran == []


def test_what_this_process_raises_is_told_to_the_others(monkeypatch):
    told = []
    others(monkeypatch, '["", ""]')
    exchange = processes._exchange
    monkeypatch.setattr(processes, "_exchange", lambda text: told.append(text) or exchange(text))

    class Odd(PermissionError):
        pass

    def fail():
        raise Odd("no")

    with pytest.raises(Odd, match="no"):
        processes.together(fail)
    assert told == ['["PermissionError", "no"]']


def test_processes_that_find_other_contents(monkeypatch):
    others(monkeypatch, '["", "a"]', '["", "a"]')
    assert processes.together(lambda: "a", str) == "a"
    with pytest.raises(ValueError, match="process 1 finds other contents"):
        processes.together(lambda: "b", str)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `on_processes.py` found, by number of processes: of each process."""
    results = {}
    for count in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes-{count}")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        script = str(Path(__file__).with_name("on_processes.py"))
        words = [[sys.executable, script, str(folder), str(count), str(index), str(port)] for index in range(count)]
        running = [subprocess.Popen(w, env=env, stderr=subprocess.PIPE, text=True) for w in words]
        try:
            for process in running:
                _, errors = process.communicate(timeout=240)  # one that waits for another for good ends here
                assert process.returncode == 0, errors
        finally:
            for process in running:
                process.kill()
        results[count] = [json.loads((folder / f"{index}.json").read_text()) for index in range(count)]
    return results


@pytest.mark.slow
def test_two_processes_train_save_load_merge_and_resume_with_the_same_bits(found):
    first, second = found[2]
    assert first == second
    assert first["losses"][0] > first["losses"][-1] > first["resumed losses"][-1]


@pytest.mark.slow
def test_two_processes_find_what_one_process_with_all_devices_finds(found):
    (one,), (two, _) = found[1], found[2]
    assert two["initialised"] == one["initialised"]  # bits: nothing is summed
    for losses in ("losses", "resumed losses"):  # gloo sums in another order than one process
        np.testing.assert_allclose(two[losses], one[losses], rtol=1e-5)


@pytest.mark.slow
def test_what_fails_in_one_of_two_processes_is_raised_in_both(found):
    expected = {"save": "NotADirectoryError", "peft": "NotADirectoryError", "load": "FileNotFoundError"}
    assert [each["raised"] for each in found[2]] == [expected, expected]
