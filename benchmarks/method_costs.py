"""What a training step of each method costs, beside full fine-tuning's and LoRA's.

    python benchmarks/method_costs.py                                    # FLOPs and memory of the compiled steps
    python benchmarks/method_costs.py --time 10                          # and their times, in turn in one process
    python benchmarks/method_costs.py --methods lora dora miss --time 20
    python benchmarks/method_costs.py --json method_costs.json

A BERT of MiniLM's sizes on 32 x 64 tokens, without dropout; the classifier trains too, and the optimizer is AdamW.
Methods, arguments and modules are those of `examples/methods.py`: what changes weights is at every Dense. FLOPs and
temporary memory are what XLA says of the compiled step. Seconds are of the clock, and of the processor's cores
together, which other work on the machine hardly changes; both are compared with LoRA's, turn by turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from handwritten import Sizes, cross_entropy
from rich.console import Console
from rich.table import Table
from steps import Training, Tree
from transformers import FlaxBertForSequenceClassification
from transformers.utils import logging
from turns import Contender, compiled, contender, ratio, take_turns

import jdelta

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from methods import METHODS, Method

MINILM = Sizes(layers=6, hidden=384, batch=32, length=64)
TINY = Sizes(layers=2, hidden=384, vocab=100, batch=2, length=8)  # the width is that of the arguments' blocks
LORA, FULL = "lora", "full"


def attached(model: FlaxBertForSequenceClassification, name: str, method: Method) -> jdelta.DeltaModel:
    """The delta of a method; `full` and `head` have an empty one."""
    if "deltas" in method.trains:
        config = jdelta.AutoDeltaConfig.from_dict({"delta_type": method.delta_type or name, **method.arguments})
        delta = jdelta.AutoDeltaModel.from_config(config, model)
    else:
        delta = jdelta.DeltaModel(model)
    delta.freeze_module(exclude=[*method.trains, "classifier"])
    return delta


def training_of(delta: jdelta.DeltaModel) -> Training:
    """The loss and the values of the model as it is."""
    model = delta.backbone_model

    def loss(trainable: Tree, frozen: Tree, batch: Mapping[str, Any]) -> jax.Array:
        params = jdelta.combine(trainable, frozen)
        return cross_entropy(model, params, batch) + delta.penalty(params)

    return Training(loss, *delta.partition())


def measure(names: Sequence[str], sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    """A row for each method; LoRA and full fine-tuning are among them."""
    model = FlaxBertForSequenceClassification(sizes.config())
    random = jax.random.key(0)
    tokens = jax.random.randint(random, (sizes.batch, sizes.length), 0, sizes.vocab)
    batch = {
        "input_ids": tokens,
        "attention_mask": jnp.ones_like(tokens),
        "labels": jnp.arange(sizes.batch) % 2,
        "key": random,
    }
    contenders: list[Contender] = []
    for name in dict.fromkeys([LORA, FULL, *names]):
        delta = attached(model, name, METHODS[name])
        training = training_of(delta)
        built = compiled(training, batch)
        trainable = jax.tree.map(jnp.copy, training.trainable)  # the step takes it over
        contenders.append(contender(name, built, trainable, training.frozen, batch))
        delta.remove()
    taken = take_turns(contenders, rounds) if rounds else {}
    by_name = {each.name: each.figures for each in contenders}
    rows = []
    for each in contenders:
        row = {"method": each.name, "trained": each.figures["trained_parameters"]}
        row["flops"] = each.figures["flops"] / by_name[FULL]["flops"]
        row["memory"] = each.figures["temporary_bytes"] / by_name[LORA]["temporary_bytes"]
        if taken:
            row["seconds"] = taken[each.name]["seconds"]
            row["time"] = ratio(taken[each.name]["all"], taken[LORA]["all"])
            row["processor"] = taken[each.name]["processor_seconds"] / taken[LORA]["processor_seconds"]
        rows.append(row)
    return sorted(rows, key=lambda row: row["flops"])


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(
        "method", "trained", "FLOPs / full", "temp. memory / LoRA", "time / LoRA (quartiles)", "processor / LoRA"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        time = (
            f"{row['time']['median']:.2f} ({row['time']['low']:.2f}–{row['time']['high']:.2f})" if "time" in row else ""
        )
        processor = f"{row['processor']:.2f}" if "processor" in row else ""
        table.add_row(
            row["method"], f"{row['trained']:,}", f"{row['flops']:.3f}", f"{row['memory']:.3f}", time, processor
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measures and prints; returns the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add("--time", type=int, default=0, metavar="ROUNDS", help="take steps too, each method two in each round")
    add("--quick", action="store_true", help="a tiny model: to see that it runs")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    rows = measure(args.methods, TINY if args.quick else MINILM, args.time)
    show(rows, Console(width=max(Console().width, 110)))
    if args.json:
        args.json.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
