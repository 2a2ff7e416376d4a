"""Ways to train the same BERT with the same LoRA on the same batch, each of them as steps that can be taken in turn.

All of them get the same numbers in the same places, whatever they call these, so their losses agree.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from handwritten import ALPHA, TARGETS, Sizes, by_hand, cross_entropy, full, with_jdelta
from steps import Training
from transformers import BertConfig, FlaxBertForSequenceClassification
from turns import FULL, Contender, compiled, contender

import jdelta

Tree = Any
Path = tuple[str, ...]

JDELTA, FUSED, LEAN, HAND, QWIX, PEFT = (
    "jdelta",
    "jdelta, fused attention",
    "jdelta, fused and lean",
    "by hand",
    "qwix",
    "PyTorch PEFT",
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
    values = merged(values, sizes.rank) if name == FULL else values
    trainable, frozen = filled(training.trainable, values), filled(training.frozen, values)
    batch = {**jax.tree.map(jnp.asarray, batch_of(sizes)), "key": jax.random.key(0)}
    return contender(name, built, trainable, frozen, batch)
