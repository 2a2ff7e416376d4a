"""The two formats in which a delta is written to a folder: for tests, and for the processes that they kill.

As a program, `python folders.py FORMAT FOLDER OLD`: for step after step writes the number 2 into a folder of its own
(where 1 was, with OLD), in a process that is killed before its step-th change of the file system, until one ends alive.
Prints the number of processes. Then 30 more are killed while they write into one folder, `often`.
"""

import dataclasses
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import linen as nn

import jdelta
from jdelta.hosts.adapting import adapt
from jdelta.saved import folder
from jdelta.saved.finetuned import Finetuned
from jdelta.saved.peft import names, reading, writing

CHANGES = ("chmod", "fsync", "link", "mkdir", "open", "rename", "replace", "unlink")


class Format(NamedTuple):
    """How a number is written as a delta whose values are all this number, and read; and the files of the folder."""

    write: Callable[[Path, float], None]
    read: Callable[[Path], float]
    config: str
    tensors: str
    card: tuple[str, ...] = ()

    @property
    def files(self) -> set[str]:
        return {self.config, self.tensors, *self.card}


def number_in(values: Mapping[str, np.ndarray]) -> float:
    """The number that all values are; an error if there are two, as after a mixture of two writers."""
    (number,) = {float(x) for value in values.values() for x in np.unique(value)}
    return number


@functools.cache
def formats() -> dict[str, Format]:
    module = nn.Sequential([nn.Dense(16)])
    params = {"layers_0": {"kernel": np.ones((64, 16), "f4"), "bias": np.ones(16, "f4")}}
    model = jdelta.Backbone(module, params, dummy_inputs=(np.ones((1, 64), "f4"),))
    delta = jdelta.LoraModel(model, modified_modules=["layers_0"], lora_r=4)
    structure = adapt(model).structure()
    values = {"layers_0.lora.a": (64, 4), "layers_0.lora.b": (4, 16)}
    found = Finetuned("lora", delta.config, {k: np.zeros(shape, "f4") for k, shape in values.items()}, ["layers_0"])

    def filled(number: float) -> Finetuned:
        full = {name: np.full_like(value, number) for name, value in found.values.items()}
        return dataclasses.replace(found, config=dataclasses.replace(found.config, lora_alpha=number), values=full)

    def read(path: Path) -> float:
        saved = Finetuned.read(path)
        assert saved.config.lora_alpha == number_in(saved.values)
        return number_in(saved.values)

    def read_peft(path: Path) -> float:
        fields, tensors = reading.read(path, names.Names.of(structure, ""))
        assert fields["lora_alpha"] == number_in(tensors)
        return number_in(tensors)

    return {
        "jdelta": Format(
            lambda path, number: filled(number).save(path), read, folder.CONFIG, folder.TENSORS, (folder.CARD,)
        ),
        "peft": Format(
            lambda path, number: writing.to_peft(filled(number), structure, path),
            read_peft,
            names.CONFIG,
            names.TENSORS,
        ),
    }


def is_killed_at(step: int, function: Callable[[], None]) -> bool:
    """Runs it in a process that dies before its step-th change of the file system; whether there was such a step."""
    if child := os.fork():
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    seen = 0

    def dying(change):
        def run(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **kwargs)

        return run

    for name in CHANGES:
        setattr(os, name, dying(getattr(os, name)))
    try:
        function()
    finally:
        os._exit(0)


def steps(format: Format, path: Path, old: bool) -> Iterator[int]:
    for step in range(1, 100):
        target = path / str(step) / "out"
        target.parent.mkdir()
        if old:
            format.write(target, 1)
        yield step
        if not is_killed_at(step, lambda target=target: format.write(target, 2)):
            return


def killed_often(format: Format, target: Path, last: int, old: bool) -> None:
    """Kills 30 writers of one folder, each at another step, many while they tidy up after the one before."""
    target.parent.mkdir()
    if old:
        format.write(target, 1)
    for turn in range(30):
        killed = is_killed_at(1 + 7 * turn % (last - 1), lambda: format.write(target, 2))
        assert killed or turn
        assert not target.exists() or format.read(target) in {1, 2}


if __name__ == "__main__":
    tried, old, place = formats()[sys.argv[1]], bool(sys.argv[3:]), Path(sys.argv[2])
    *_, last = steps(tried, place, old)
    print(last)
    killed_often(tried, place / "often" / "out", last, old)
