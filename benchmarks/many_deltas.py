"""What it costs that each row of a batch has a delta of its own, against one delta for all rows.

    python benchmarks/many_deltas.py                                          # LoRA on a small BERT; about a minute
    python benchmarks/many_deltas.py --methods lora adapter bitfit --deltas 64
    python benchmarks/many_deltas.py --layers 12 --hidden 768 --tokens 128 --runs 0   # BERT base, compiled only

One compiled forward pass for one delta and one for each number of deltas, of which every row takes one in turn
(`jdelta.select` is a part of the pass). FLOPs and temporary memory are what XLA says of the compiled pass on this
machine's default device. To be timed, they take turns, and the ratio is the median of the ratios within a turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, FlaxBertForSequenceClassification
from transformers.utils import logging

import jdelta

Tree = Any

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora_r": 8},
    "adapter": {},
    "parallel_adapter": {},
    "low_rank_adapter": {},
    "compacter": {},
    "bitfit": {},
    "prefix": {"reparameterize": False},  # as it is saved
    "soft_prompt": {"soft_token_num": 20, "token_init": False},
}


def build(method: str, args: argparse.Namespace) -> tuple[Any, Tree, Tree]:
    """The model, and the shapes of what trains and of what is frozen."""
    config = BertConfig(
        vocab_size=1000,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(args.hidden // 64, 1),
        intermediate_size=4 * args.hidden,
    )
    model = FlaxBertForSequenceClassification(config, _do_init=False)
    config = jdelta.AutoDeltaConfig.from_dict(
        {"delta_type": method, "unfrozen_modules": ["classifier"], **METHODS[method]}
    )
    delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)
    return model, *delta.partition(jdelta.graft(model.params_shape_tree, delta.shapes()))


def passes(model: Any) -> tuple[Callable, Callable]:
    """The forward pass with one delta, and that with a delta for each row."""

    def one(trainable: Tree, frozen: Tree, ids: jax.Array) -> jax.Array:
        return model(ids, params=jdelta.combine(trainable, frozen)).logits

    def many(stacked: Tree, frozen: Tree, ids: jax.Array, indices: jax.Array) -> jax.Array:
        return jdelta.rowwise(model, frozen)(ids, params=jdelta.select(stacked, indices)).logits

    return one, many


def with_axis(shapes: Tree, length: int) -> Tree:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct((length, *s.shape), s.dtype), shapes)


def random(shapes: Tree) -> Tree:
    rng = np.random.default_rng(0)

    def value(s: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(s.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 1000, s.shape), s.dtype)
        return jnp.asarray(rng.normal(0, 0.05, s.shape), s.dtype)

    return jax.tree.map(value, shapes)


def measure(method: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of deltas."""
    model, trainable, frozen = build(method, args)
    one, many = passes(model)
    ids = jax.ShapeDtypeStruct((args.rows, args.tokens), jnp.int32)
    indices = jax.ShapeDtypeStruct((args.rows,), jnp.int32)
    arguments = {0: (trainable, frozen, ids)}
    arguments |= {k: (with_axis(trainable, k), frozen, ids, indices) for k in args.deltas}
    compiled = {k: jax.jit(many if k else one).lower(*given).compile() for k, given in arguments.items()}
    costs = {k: (c.cost_analysis()["flops"], c.memory_analysis().temp_size_in_bytes) for k, c in compiled.items()}
    seconds: dict[int, list[float]] = {k: [] for k in compiled}
    if args.runs:
        values = random((frozen, ids))
        own = {k: random(given[0]) for k, given in arguments.items()}
        rows = {k: (jnp.arange(args.rows) % k,) if k else () for k in arguments}
        for _ in range(args.runs + 1):
            for k, run in compiled.items():
                begin = time.perf_counter()
                jax.block_until_ready(run(own[k], *values, *rows[k]))
                seconds[k].append(time.perf_counter() - begin)
    return [
        {
            "method": method,
            "deltas": k,
            "flops": costs[k][0] / costs[0][0],
            "memory": costs[k][1] / costs[0][1],
            "time": ratio(seconds[k], seconds[0]),
            "seconds": statistics.median(seconds[0][1:]) if args.runs else None,
        }
        for k in args.deltas
    ]


def ratio(these: Sequence[float], those: Sequence[float]) -> float | None:
    """The median of the ratios, turn by turn; the first turn warms up."""
    ratios = [a / b for a, b in zip(these[1:], those[1:], strict=True)]
    return statistics.median(ratios) if ratios else None


def table(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> Table:
    size = f"BERT of {args.layers} layers, width {args.hidden}; {args.rows} rows of {args.tokens} tokens"
    made = Table(title=f"against one delta: {size}", title_justify="left")
    for column in ("method", "deltas", "FLOPs", "temporary memory", "time", "one delta"):
        made.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        colour = "green" if row["flops"] <= 1.05 else "red"
        times = ("", "") if row["time"] is None else (f"{row['time']:.2f}", f"{1e3 * row['seconds']:.0f} ms")
        flops = f"[{colour}]{row['flops']:.4f}"
        made.add_row(row["method"], str(row["deltas"]), flops, f"{row['memory']:.2f}", *times)
    return made


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=["lora"], metavar="METHOD", help=", ".join(METHODS))
    add("--deltas", nargs="+", type=int, default=[1, 4, 16, 64], help="numbers of deltas")
    add("--rows", type=int, default=64, help="of the batch")
    add("--tokens", type=int, default=64, help="of a row")
    add("--layers", type=int, default=2, help="of the backbone")
    add("--hidden", type=int, default=256, help="width of the backbone")
    add("--runs", type=int, default=15, help="turns that are timed; 0 to compile only")
    add("--json", type=Path, default=None, help="write the figures to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measures and prints; returns the rows of the table."""
    args = parse(argv)
    logging.set_verbosity_error()
    rows = [row for method in args.methods for row in measure(method, args)]
    Console().print(table(rows, args))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
