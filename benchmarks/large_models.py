"""What a training step of a large model takes on each device of a mesh, on paper: nothing is allocated.

    python benchmarks/large_models.py --config llama-7b --mesh data=2,model=4 --method lora
    python benchmarks/large_models.py --config llama-70b --mesh fsdp=4,model=8 --method lora --layers 3

The model is given as shapes, and the step is compiled for as many virtual CPU devices as the mesh has. Bytes of the
backbone, the delta, the gradients and the optimizer (Adam) are exact, from the shapes and their shardings. Temporaries
(which include the gradients) and collectives are those of XLA's program for CPUs: its collectives are those of other
backends before these combine and overlap them, its temporaries a hint. Each collective counts once for each time it is
in the program, and its bytes are those of its result on one device.

All layers are compiled. With `--layers n`, models of n, n + 1 and n + 2 layers are compiled instead. A figure that lies
on a line through these three is computed for all layers; of one that does not, as temporaries often do not, that of
n + 2 layers is shown, and says so. Bytes of parameters, gradients and optimizer are those of all layers in any case.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # virtual devices, whatever there is

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table
from transformers import FlaxLlamaForCausalLM, LlamaConfig
from transformers.utils import logging

import jdelta

CONFIGS = {
    "llama-tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 8},
    "llama-7b": {},  # those of the 7B model are the defaults
    "llama-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
AXES = ("data", "fsdp", "model")
RULES = [
    (r"[r](q_proj|k_proj|v_proj|gate_proj|up_proj|lm_head)\.kernel", P("fsdp", "model")),
    (r"[r](o_proj|down_proj)\.kernel", P("model", "fsdp")),
    ("embed_tokens.embedding", P(("fsdp", "model"), None)),
    (r"[r]\w*norm\.weight", P()),
]
METHODS = {
    "lora": jdelta.LoraModel,
    "adapter": jdelta.AdapterModel,
    "parallel_adapter": jdelta.ParallelAdapterModel,
    "low_rank_adapter": jdelta.LowRankAdapterModel,
    "compacter": jdelta.CompacterModel,
    "bitfit": jdelta.BitFitModel,
}
FULL = "full fine-tuning"
OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
WIDTHS = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1, "f64": 8, "s64": 8}


class Setup:
    """A model of some layers on a mesh, with a delta or without: what trains, what is frozen, and where it lies."""

    def __init__(self, args: argparse.Namespace, mesh: Mesh, method: str, layers: int | None):
        sizes = CONFIGS[args.config] | ({} if layers is None else {"num_hidden_layers": layers})
        self.config = LlamaConfig(**sizes, max_position_embeddings=max(args.tokens, 32), use_cache=False)
        self.model = FlaxLlamaForCausalLM(self.config, _do_init=False, dtype=args.dtype)
        self.mesh = mesh
        shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, args.dtype), self.model.params_shape_tree)
        specs = jdelta.match_partition_rules(RULES, shapes)
        if method == FULL:
            split = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda leaf: isinstance(leaf, P))
            self.trainable, self.frozen = placed(shapes, split), {}
            self.backbone, self.delta = self.trainable, {}
            return
        delta = METHODS[method](self.model)
        grafted = placed(jdelta.graft(shapes, delta.shapes()), delta.shardings(specs, mesh))
        self.trainable, self.frozen = delta.partition(grafted)
        self.backbone, self.delta = jdelta.prune(grafted, delta.name), delta.own(grafted)

    def optimizer_state(self, tx: optax.GradientTransformation) -> Any:
        state = jax.eval_shape(tx.init, self.trainable)
        split = jax.tree.map(lambda leaf: leaf.sharding, self.trainable)
        return placed(state, jdelta.state_shardings(state, split))


def placed(shapes: Any, split: Any) -> Any:
    return jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), shapes, split)


def per_device(tree: Any) -> int:
    """Bytes that each device holds of a tree of placed shapes."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def whole(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compiled(setup: Setup, args: argparse.Namespace) -> tuple[Any, float]:
    """The step of training, compiled, and how many seconds that took."""
    tx, mesh = optax.adam(1e-4), setup.mesh
    ids = jax.ShapeDtypeStruct(
        (args.batch_size, args.tokens), jnp.int32, sharding=NamedSharding(mesh, P(("data", "fsdp")))
    )
    state = setup.optimizer_state(tx)

    def step(trainable: Any, state: Any, frozen: Any, ids: jax.Array) -> Any:
        def loss_of(trainable: Any) -> jax.Array:
            params = jdelta.combine(trainable, frozen)
            logits = setup.model(ids, params=params, train=True, dropout_rng=jax.random.key(0)).logits
            losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), ids[:, 1:])
            return losses.mean()

        loss, grads = jax.value_and_grad(loss_of)(trainable)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(trainable, updates), state, loss

    held = jax.tree.map(lambda leaf: leaf.sharding, (setup.trainable, state))
    run = jax.jit(step, out_shardings=(*held, NamedSharding(mesh, P())), donate_argnums=(0, 1))
    start = time.perf_counter()
    program = run.lower(setup.trainable, state, setup.frozen, ids).compile()
    return program, time.perf_counter() - start


def measured(program: Any) -> dict[str, int]:
    """Temporaries of a compiled program in bytes, and number and bytes of each kind of collective."""
    found = {"temporaries": program.memory_analysis().temp_size_in_bytes}
    for shapes, kind in re.findall(rf"= (.*?) ({'|'.join(OPERATIONS)})(?:-start)?\(", program.as_text()):
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            size = math.prod(int(n) for n in sizes.split(",") if n) * WIDTHS[dtype]
            found[kind] = found.get(kind, 0) + 1
            found[f"{kind} bytes"] = found.get(f"{kind} bytes", 0) + size
    return found


def extended(points: Sequence[Mapping[str, int]], first: int, layers: int) -> tuple[dict[str, int], list[str]]:
    """From the figures of `first`, `first + 1` and `first + 2` layers those of all.

    Returns:
      The figures, and which of them are on no line, and are those of the last point.
    """
    rows = {key: [point.get(key, 0) for point in points] for key in dict.fromkeys(key for p in points for key in p)}
    off = [key for key, (a, b, c) in rows.items() if c - b != b - a]
    return {key: c if key in off else a + (b - a) * (layers - first) for key, (a, b, c) in rows.items()}, off


def figures(args: argparse.Namespace, mesh: Mesh, method: str) -> dict[str, Any]:
    """Everything about one way of training."""
    setup = Setup(args, mesh, method, None)
    found: dict[str, Any] = {
        "method": method,
        "backbone": per_device(setup.backbone),
        "delta": per_device(setup.delta),
        "gradients": per_device(setup.trainable),
        "optimizer": per_device(setup.optimizer_state(optax.adam(1e-4))),
        "backbone of all devices": whole(setup.backbone),
        "delta of all devices": whole(setup.delta),
    }
    layers = setup.config.num_hidden_layers
    counts = [layers] if args.layers is None else [args.layers + i for i in range(3)]
    points, seconds = [], 0.0
    for count in counts:
        program, took = compiled(Setup(args, mesh, method, count), args)
        points.append(measured(program))
        seconds += took
    found["compile seconds"] = seconds
    if args.layers is None:
        return found | points[0] | {"layers compiled": counts, "of fewer layers": []}
    total, off = extended(points, counts[0], layers)
    return found | total | {"layers compiled": counts, "of fewer layers": off}


def show(results: Sequence[dict[str, Any]], args: argparse.Namespace, mesh: Mesh, console: Console) -> None:
    sizes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    title = f"{args.config} on {sizes}, {args.batch_size} × {args.tokens} tokens, {np.dtype(args.dtype).name}"
    table = Table("on each device", *(r["method"] for r in results), title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for key in ("backbone", "delta", "gradients", "optimizer", "temporaries"):
        table.add_row(key, *(f"{r[key] / 1e9:,.3f} GB{_fewer(r, key)}" for r in results))
    table.add_section()
    for kind in (kind for kind in OPERATIONS if any(r.get(kind) for r in results)):
        cells = [f"{r.get(kind, 0):,} of {r.get(f'{kind} bytes', 0) / 1e9:,.3f} GB{_fewer(r, kind)}" for r in results]
        table.add_row(kind, *cells)
    table.add_section()
    table.add_row("layers compiled", *(", ".join(map(str, r["layers compiled"])) for r in results))
    table.add_row("compiled in", *(f"{r['compile seconds']:.0f} s" for r in results))
    console.print(table)


def _fewer(result: Mapping[str, Any], key: str) -> str:
    off = {key, f"{key} bytes"} & set(result["of fewer layers"])
    return f" ({result['layers compiled'][-1]} layers)" if off else ""


def parse_mesh(text: str) -> dict[str, int]:
    """`data=2,model=4`, with 1 for the axes that are left out."""
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.isdigit() or int(size) < 1:
            raise argparse.ArgumentTypeError(f"{part!r} is no axis and its size: write data=2,fsdp=2,model=4.")
        sizes[axis] = int(size)
    return sizes


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number.")
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", choices=CONFIGS, default="llama-7b", help="the model (default: llama-7b)")
    add("--mesh", type=parse_mesh, default="data=2,model=4", help="sizes of data, fsdp and model (data=2,model=4)")
    add("--method", choices=METHODS, default="lora", help="the delta, at its default positions (default: lora)")
    add("--layers", type=positive, default=None, help="compile this many layers, one more and two more (default: all)")
    add("--batch-size", type=positive, default=8, help="sequences of a step, of all devices together (default: 8)")
    add("--tokens", type=positive, default=512, help="length of a sequence (default: 512)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the backbone (default: float32)")
    add("--without-full", action="store_true", help="leave full fine-tuning out")
    add("--json", type=Path, default=None, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    args.dtype = jnp.dtype(args.dtype)
    if args.batch_size % (args.mesh["data"] * args.mesh["fsdp"]):
        parser.error(f"--batch-size {args.batch_size} is no multiple of data × fsdp.")
    return args


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Prints the table; returns its figures."""
    args = parse(argv)
    logging.set_verbosity_error()
    devices = math.prod(args.mesh.values())
    jax.config.update("jax_num_cpu_devices", devices)
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(tuple(args.mesh.values())), AXES)
    methods = [args.method] if args.without_full else [args.method, FULL]
    results = [figures(args, mesh, method) for method in methods]
    show(results, args, mesh, Console(width=120))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
