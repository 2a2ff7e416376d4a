"""Ways to train the same BERT with the same LoRA on the same batch, each of them as steps that can be taken in turn.

All of them get the same numbers in the same places, whatever they call these, so their losses agree.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from handwritten import ALPHA, TARGETS, Sizes, Training, by_hand, cross_entropy, full, step_of, with_jdelta
from transformers import BertConfig, FlaxBertForSequenceClassification

import jdelta

Tree = Any
Path = tuple[str, ...]

RATE, WEIGHT_DECAY = 1e-3, 1e-4  # of AdamW
SETTLE = 0.02  # seconds in which the threads of the contender before stop waiting for work

# What glibc should do with memory that is freed: keep it. Else it gives the temporaries of XLA's step back to the
# kernel, and gets them again as pages that are to be zeroed, in each step anew.
KEEP_MEMORY = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}

JDELTA, FUSED, LEAN, HAND, QWIX, PEFT, FULL = (
    "jdelta",
    "jdelta, fused attention",
    "jdelta, fused and lean",
    "by hand",
    "qwix",
    "PyTorch PEFT",
    "full fine-tuning",
)


@dataclasses.dataclass(frozen=True)
class Sized(Sizes):
    """Sizes with a number of heads; by default those of MiniLM, and a batch that takes a CPU half a second."""

    layers: int = 6
    hidden: int = 384
    batch: int = 32
    length: int = 64
    heads: int = 12

    def config(self, **more: Any) -> BertConfig:
        config = super().config(**more)
        config.num_attention_heads = self.heads
        return config


MODELS = {
    "minilm": Sized(),
    "base": Sized(layers=12, hidden=768, batch=8, length=128),
    "tiny": Sized(layers=2, hidden=32, vocab=100, batch=4, length=16, heads=2),
}


# --- what they are given


def path_of(key_path: Sequence[Any]) -> Path:
    """Where jdelta keeps the leaf that a contender has there: the code by hand says `lora_a`, qwix `kernel_lora_a`."""
    path: Path = ()
    for key in key_path:
        path += key.key if isinstance(key.key, tuple) else (key.key,)
    _, found, factor = path[-1].rpartition("lora_")
    return (*path[:-1], "lora", factor) if found else path


def numbers(sizes: Sizes) -> dict[Path, np.ndarray]:
    """Random weights for every leaf of the model and of LoRA; none is zero, `b` neither."""
    training = with_jdelta(sizes, TARGETS["query and value"][0])
    random = np.random.default_rng(0)
    values = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(jdelta.combine(training.trainable, training.frozen)):
        path = path_of(key_path)
        values[path] = 0.04 * random.standard_normal(leaf.shape, np.float32) + np.float32(path[-1] == "scale")
    return values


def batch_of(sizes: Sizes) -> dict[str, np.ndarray]:
    """Random tokens; rows are padded by up to a half."""
    random = np.random.default_rng(1)
    lengths = random.integers(sizes.length // 2, sizes.length, sizes.batch, endpoint=True)
    return {
        "input_ids": random.integers(1, sizes.vocab, (sizes.batch, sizes.length), dtype=np.int32),
        "attention_mask": (np.arange(sizes.length) < lengths[:, None]).astype(np.int32),
        "labels": random.integers(0, 2, (sizes.batch,), dtype=np.int32),
    }


def merged(values: Mapping[Path, np.ndarray], rank: int) -> dict[Path, np.ndarray]:
    """The same function without LoRA: its products added to the kernels."""
    result = {path: value for path, value in values.items() if "lora" not in path}
    for path, a in values.items():
        if path[-2:] == ("lora", "a"):
            b = values[(*path[:-1], "b")]
            result[(*path[:-2], "kernel")] = result[(*path[:-2], "kernel")] + a @ b * np.float32(ALPHA / rank)
    return result


def filled(tree: Tree, values: Mapping[Path, np.ndarray]) -> Tree:
    """A contender's tree of shapes with the numbers in it."""
    return jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(values[path_of(path)]), tree)


# --- the contenders in JAX


def with_qwix(sizes: Sizes) -> Training:
    """LoRA by qwix on the linen module of the Hugging HostAdapter model; the classifier trains too."""
    import qwix

    model = FlaxBertForSequenceClassification(sizes.config(), _do_init=False)
    provider = qwix.LoraProvider(module_path=r".*/(query|value)", rank=sizes.rank, alpha=ALPHA)
    model._module = qwix.apply_lora_to_model(model.module, provider)
    shapes = jax.eval_shape(lambda: model.init_weights(jax.random.key(0), (1, 2)))

    def trains(path: Path) -> bool:
        return path[0] == "classifier" or "lora" in path

    trainable, frozen = jdelta.partition(
        shapes, jax.tree_util.tree_map_with_path(lambda path, _: trains(path_of(path)), shapes)
    )

    def loss(trainable: Tree, frozen: Tree, batch: Mapping[str, Any]) -> jax.Array:
        return cross_entropy(model, jdelta.combine(trainable, frozen), batch)

    return Training(loss, trainable, frozen)


def trainings() -> tuple[dict[str, Callable[[Sizes], Training]], dict[str, str]]:
    """The ways to train in JAX; and why others are left out."""
    patterns, by_hand_names = TARGETS["query and value"]
    ways: dict[str, Callable[[Sizes], Training]] = {
        JDELTA: lambda sizes: with_jdelta(sizes, patterns),
        FUSED: lambda sizes: with_jdelta(sizes, patterns, alter=[jdelta.fused_attention]),
        LEAN: lambda sizes: with_jdelta(sizes, patterns, alter=[jdelta.fused_attention, jdelta.lean_activations]),
        HAND: lambda sizes: by_hand(sizes, by_hand_names),
        QWIX: with_qwix,
        FULL: full,
    }
    missing = {}
    if importlib.util.find_spec("qwix") is None:
        missing[QWIX] = "qwix is not installed"
    return {name: way for name, way in ways.items() if name not in missing}, missing


def size(tree: Tree) -> int:
    """Bytes of all leaves; shapes suffice."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compiled(training: Training, inputs: Mapping[str, Any]) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    """The step of AdamW, for shapes, with what can be said of it before it runs."""
    tx = optax.adamw(RATE, weight_decay=WEIGHT_DECAY)
    state = jax.eval_shape(tx.init, training.trainable)
    step = jax.jit(step_of(training, tx), donate_argnums=(0, 1))
    start = time.perf_counter()
    traced = step.trace(training.trainable, state, training.frozen, inputs)
    after_trace = time.perf_counter()
    lowered = traced.lower()
    after_lower = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    memory = program.memory_analysis()
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    # Off the CPU, products go to libraries, and XLA does not count what it hands to these.
    counted = program if jax.default_backend() == "cpu" else lowered
    return program, {
        "flops": counted.cost_analysis()["flops"],
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": arguments,
        "output_bytes": outputs,
        "alias_bytes": memory.alias_size_in_bytes,
        "peak_bytes": arguments + outputs - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        "trace_seconds": after_trace - start,
        "lower_seconds": after_lower - after_trace,
        "compile_seconds": done - after_lower,
        "optimizer_bytes": size(state),
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(training.trainable)),
    }


class Taken(NamedTuple):
    """What a step took."""

    seconds: float
    processor_seconds: float  # of all cores together; what else runs on the machine hardly changes it
    system_seconds: float  # of these, in the kernel
    page_faults: int  # pages of memory that the process touched for the first time


@dataclasses.dataclass
class Contender:
    """Takes a step of training when it is asked to, waits for it, and returns the loss before it."""

    name: str
    step: Callable[[], float]
    figures: dict[str, Any]
    losses: list[float] = dataclasses.field(default_factory=list)

    def take(self) -> Taken:
        """A step."""
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        self.losses.append(self.step())
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        system = after.ru_stime - before.ru_stime
        return Taken(seconds, after.ru_utime - before.ru_utime + system, system, after.ru_minflt - before.ru_minflt)


def in_jax(name: str, training: Training, sizes: Sizes, values: Mapping[Path, np.ndarray]) -> Contender:
    return with_arrays(name, training, compiled(training, sizes.inputs()), sizes, values)


def with_arrays(
    name: str,
    training: Training,
    built: tuple[jax.stages.Compiled, dict[str, Any]],
    sizes: Sizes,
    values: Mapping[Path, np.ndarray],
) -> Contender:
    """A contender whose step was compiled for shapes."""
    program, figures = built
    values = merged(values, sizes.rank) if name == FULL else values
    trainable, frozen = filled(training.trainable, values), filled(training.frozen, values)
    batch = {**jax.tree.map(jnp.asarray, batch_of(sizes)), "key": jax.random.key(0)}
    held = trainable, optax.adamw(RATE, weight_decay=WEIGHT_DECAY).init(trainable)

    def step() -> float:
        nonlocal held
        *held, loss = program(*held, frozen, batch)
        jax.block_until_ready(held)
        return float(loss)

    return Contender(name, step, figures)


# --- time


def take_turns(contenders: Sequence[Contender], rounds: int) -> dict[str, dict[str, Any]]:
    """What a step takes, of contenders that take turns in one process.

    In its turn each waits until the threads of the one before sleep, and takes two steps, of which the second counts:
    the first finds the caches full of another's data.
    """
    taken: dict[str, list[Taken]] = {contender.name: [] for contender in contenders}
    for i in range(rounds + 1):
        first = i % len(contenders)  # nobody always runs after the same one
        for contender in [*contenders[first:], *contenders[:first]]:
            time.sleep(SETTLE)
            contender.take()
            taken[contender.name].append(contender.take())
    return {name: spread(steps[1:]) for name, steps in taken.items()}  # the first round warms up


def spread(steps: Sequence[Taken]) -> dict[str, Any]:
    """The median of each figure, the shortest and the longest step, and the seconds of all of them."""
    all_of = {field: [getattr(step, field) for step in steps] for field in Taken._fields}
    medians = {field: statistics.median(values) for field, values in all_of.items()}
    seconds = all_of["seconds"]
    return medians | {"shortest": min(seconds), "longest": max(seconds), "all": seconds}


def ratio(these: Sequence[float], those: Sequence[float]) -> dict[str, float]:
    """The median of the ratios turn by turn, and the quartiles, between which half of them lie."""
    ratios = [a / b for a, b in zip(these, those, strict=True)]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {"median": float(middle), "low": float(low), "high": float(high)}


def require_same_losses(contenders: Sequence[Contender], tolerance: float) -> float:
    """The largest difference from the first contender, of the losses before training and after a step.

    Full fine-tuning starts with the same loss, and goes elsewhere.

    Raises:
      AssertionError: it is above the tolerance: these do not compute the same, and their times say nothing.
    """
    first, worst = contenders[0], 0.0
    for contender in contenders[1:]:
        steps = 1 if contender.name == FULL else 2
        for mine, its in zip(first.losses[:steps], contender.losses[:steps], strict=True):
            difference = abs(mine - its)
            if not difference <= tolerance or not math.isfinite(difference):
                raise AssertionError(
                    f"losses differ: {first.name} {first.losses[:steps]}, {contender.name} {contender.losses[:steps]}."
                )
            worst = max(worst, difference)
    return worst


def keep_memory() -> bool:
    """Tells glibc to; whether there is one and it took it. To be called before the first array."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all([mallopt(parameter, value) for parameter, value in KEEP_MEMORY.values()])


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
