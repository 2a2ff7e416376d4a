"""How the cost of a training step grows: with tokens, depth, deltas at once, and devices."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import many_deltas
import numpy as np
import optax
from contenders import FUSED, HAND, JDELTA, LEAN, Sized, numbers, trainings, with_arrays
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from steps import Training, step_of
from turns import FULL, compiled, size

LONGEST, MOST = 2.0, 4e9  # seconds and bytes that a step may take to be run


def ways(*names: str) -> dict[str, Callable[[Sized], Training]]:
    """Those that are here, of the named ones."""
    present, _ = trainings()
    return {name: present[name] for name in names if name in present}


def tokens(sizes: Sized, counts: Sequence[int], runs: int) -> Iterator[dict[str, Any]]:
    """One sequence of so many tokens: compiled for shapes, and run where that is short and takes little memory."""
    for name, way in ways(JDELTA, FUSED, LEAN, FULL).items():
        expected = 0.0
        for count in counts:
            at = dataclasses.replace(sizes, batch=1, length=count)
            training = way(at)
            built = compiled(training, at.inputs())
            row = {"contender": name, "tokens": count, "seconds": None, **built[1]}
            if expected < LONGEST and row["peak_bytes"] < MOST:
                contender = with_arrays(name, training, built, at, numbers(at))
                contender.take()
                row["seconds"] = statistics.median(contender.take().seconds for _ in range(runs))
                expected = row["seconds"] * (counts[1] / counts[0]) ** 1.5  # between linear and quadratic
                del contender
            yield row


def depth(sizes: Sized, layers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """So many layers; compiled only."""
    for count in layers:
        at = dataclasses.replace(sizes, layers=count)
        for name, way in ways(JDELTA, HAND, FULL).items():
            yield {"contender": name, "layers": count, **compiled(way(at), at.inputs())[1]}


def deltas(sizes: Sized, counts: Sequence[int], runs: int) -> list[dict[str, Any]]:
    """A forward pass of 64 rows that have so many different LoRAs, against one for all rows."""
    text = f"--deltas {' '.join(map(str, counts))} --layers {sizes.layers} --hidden {sizes.hidden} --runs {runs}"
    return many_deltas.measure("lora", many_deltas.parse([*text.split(), "--tokens", str(sizes.length)]))


def devices(model: str, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The batch split over so many virtual CPU devices, each number of them in a process of its own.

    They share the cores of one machine, so a time would say nothing.
    """
    for count in counts:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
        environment = {**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, model, str(count)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        yield from json.loads(out.splitlines()[-1])


def on_devices(sizes: Sized, count: int) -> list[dict[str, Any]]:
    """To be called in a process with at least so many devices: the batch split over them, parameters on each."""
    from large_models import OPERATIONS, measured

    mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
    tx = optax.adamw(1e-3)

    def placed(tree: Any, spec: P) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    rows = []
    for name, way in ways(JDELTA, HAND, FULL).items():
        training = way(sizes)
        trainable, frozen = placed(training.trainable, P()), placed(training.frozen, P())
        state = placed(jax.eval_shape(tx.init, trainable), P())
        inputs = sizes.inputs()
        key = placed(inputs.pop("key"), P())
        step = jax.jit(step_of(training, tx), donate_argnums=(0, 1))
        program = step.lower(trainable, state, frozen, {**placed(inputs, P("data")), "key": key}).compile()
        memory, found = program.memory_analysis(), measured(program)
        rows.append(
            {
                "contender": name,
                "devices": count,
                "flops": program.cost_analysis()["flops"],
                "temporary_bytes": memory.temp_size_in_bytes,
                "argument_bytes": memory.argument_size_in_bytes,
                "optimizer_bytes": size(state),
                "collectives": sum(found.get(kind, 0) for kind in OPERATIONS),
                "collective_bytes": sum(found.get(f"{kind} bytes", 0) for kind in OPERATIONS),
            }
        )
    return rows


if __name__ == "__main__":  # started by `devices`
    from contenders import MODELS
    from transformers.utils import logging

    logging.set_verbosity_error()
    print(json.dumps(on_devices(MODELS[sys.argv[1]], int(sys.argv[2]))))
