"""What LoRA through jdelta costs beside the same LoRA written into BERT by hand, and beside full fine-tuning.

    python benchmarks/handwritten.py                             # BERT base, 8 x 128 tokens
    python benchmarks/handwritten.py --layers 2 --hidden 64      # quick
    python benchmarks/handwritten.py --json handwritten.json

The training steps are compiled for shapes alone: nothing is allocated and nothing is run. FLOPs and temporary memory
are what XLA says of the compiled step on this machine's default device.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console
from steps import (
    OF_FULL,
    SAME_COST,
    SAME_MEMORY,
    TRACING,
    Figure,
    Training,
    cost,
    report,
    tracing_times,
    write,
)
from transformers import BertConfig, FlaxBertForSequenceClassification
from transformers.models.bert import modeling_flax_bert as bert
from transformers.utils import logging

import jdelta

Tree = Any

ALPHA = 16
# The modules that get LoRA, in jdelta's names and in those of the hand-written modules below.
TARGETS = {
    "query and value": (["query", "value"], ("query", "value")),
    "every Dense": (
        ["query", "key", "value", "output.dense", "intermediate.dense", "pooler.dense"],
        ("query", "key", "value", "attention.output", "intermediate", "output", "pooler"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The backbone and the batch; by default BERT base."""

    layers: int = 12
    hidden: int = 768
    vocab: int = 30522
    batch: int = 8
    length: int = 128
    dropout: float = 0.0
    rank: int = 4

    def config(self, **more: Any) -> BertConfig:
        return BertConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=max(self.hidden // 64, 2),
            intermediate_size=4 * self.hidden,
            max_position_embeddings=max(self.length, 512),
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            **more,
        )

    def inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of one batch, and the key of its dropout."""
        tokens = jax.ShapeDtypeStruct((self.batch, self.length), jnp.int32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return {
            "input_ids": tokens,
            "attention_mask": tokens,
            "labels": jax.ShapeDtypeStruct((self.batch,), jnp.int32),
            "key": key,
        }


def cross_entropy(model: FlaxBertForSequenceClassification, params: Tree, batch: Mapping[str, Any]) -> jax.Array:
    """The usual loss of a classifier; every variant below uses it."""
    logits = model(
        batch["input_ids"], batch["attention_mask"], params=params, dropout_rng=batch["key"], train=True
    ).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


# --- with jdelta


def with_jdelta(
    sizes: Sizes, targets: Sequence[str], init: bool = False, alter: Sequence[Callable[[Any], Any]] = ()
) -> Training:
    """LoRA attached by jdelta, after alterations of the model; the classifier trains too."""
    model = FlaxBertForSequenceClassification(sizes.config(), _do_init=init)
    for function in alter:
        function(model)
    params = model.params if init else model.params_shape_tree
    delta = jdelta.LoraModel(
        model, modified_modules=targets, lora_r=sizes.rank, lora_alpha=ALPHA, unfrozen_modules=["classifier"]
    )
    trainable, frozen = delta.partition(model.params if init else jdelta.graft(params, delta.shapes()))

    def loss(trainable: Tree, frozen: Tree, batch: Mapping[str, Any]) -> jax.Array:
        return cross_entropy(model, jdelta.combine(trainable, frozen), batch)

    return Training(loss, trainable, frozen)


# --- by hand: the modules of transformers with another `setup`, down from the classifier to the Dense


class LoraDense(nn.Module):
    """`nn.Dense` with LoRA."""

    features: int
    rank: int
    scale: float
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        a = self.param("lora_a", nn.initializers.he_uniform(), (x.shape[-1], self.rank))
        b = self.param("lora_b", nn.initializers.zeros, (self.rank, self.features))
        return x @ kernel + bias + (x @ a) @ b * self.scale


def dense(config: BertConfig, name: str, features: int) -> nn.Module:
    """A Dense, with LoRA if the configuration names it."""
    init = nn.initializers.normal(config.initializer_range)
    if name in config.lora_targets:
        scale = config.lora_alpha / config.lora_rank
        return LoraDense(features, config.lora_rank, scale, kernel_init=init)
    return nn.Dense(features, kernel_init=init)


class LoraBertSelfAttention(bert.FlaxBertSelfAttention):
    def setup(self) -> None:
        self.head_dim = self.config.hidden_size // self.config.num_attention_heads
        self.query = dense(self.config, "query", self.config.hidden_size)
        self.key = dense(self.config, "key", self.config.hidden_size)
        self.value = dense(self.config, "value", self.config.hidden_size)


class LoraBertSelfOutput(bert.FlaxBertSelfOutput):
    def setup(self) -> None:
        self.dense = dense(self.config, "attention.output", self.config.hidden_size)
        self.LayerNorm = nn.LayerNorm(epsilon=self.config.layer_norm_eps)
        self.dropout = nn.Dropout(rate=self.config.hidden_dropout_prob)


class LoraBertAttention(bert.FlaxBertAttention):
    def setup(self) -> None:
        self.self = LoraBertSelfAttention(self.config)
        self.output = LoraBertSelfOutput(self.config)


class LoraBertIntermediate(bert.FlaxBertIntermediate):
    def setup(self) -> None:
        self.dense = dense(self.config, "intermediate", self.config.intermediate_size)
        self.activation = bert.ACT2FN[self.config.hidden_act]


class LoraBertOutput(bert.FlaxBertOutput):
    def setup(self) -> None:
        self.dense = dense(self.config, "output", self.config.hidden_size)
        self.LayerNorm = nn.LayerNorm(epsilon=self.config.layer_norm_eps)
        self.dropout = nn.Dropout(rate=self.config.hidden_dropout_prob)


class LoraBertLayer(bert.FlaxBertLayer):
    def setup(self) -> None:
        self.attention = LoraBertAttention(self.config)
        self.intermediate = LoraBertIntermediate(self.config)
        self.output = LoraBertOutput(self.config)


class LoraBertLayerCollection(bert.FlaxBertLayerCollection):
    def setup(self) -> None:
        self.layers = [LoraBertLayer(self.config, name=str(i)) for i in range(self.config.num_hidden_layers)]


class LoraBertEncoder(bert.FlaxBertEncoder):
    def setup(self) -> None:
        self.layer = LoraBertLayerCollection(self.config)


class LoraBertPooler(bert.FlaxBertPooler):
    def setup(self) -> None:
        self.dense = dense(self.config, "pooler", self.config.hidden_size)


class LoraBertModule(bert.FlaxBertModule):
    def setup(self) -> None:
        self.embeddings = bert.FlaxBertEmbeddings(self.config)
        self.encoder = LoraBertEncoder(self.config)
        self.pooler = LoraBertPooler(self.config)


class LoraBertForSequenceClassificationModule(bert.FlaxBertForSequenceClassificationModule):
    def setup(self) -> None:
        self.bert = LoraBertModule(self.config)
        self.dropout = nn.Dropout(rate=self.config.hidden_dropout_prob)
        self.classifier = nn.Dense(self.config.num_labels)


class LoraBertForSequenceClassification(FlaxBertForSequenceClassification):
    module_class = LoraBertForSequenceClassificationModule


def by_hand(sizes: Sizes, targets: Sequence[str]) -> Training:
    """LoRA in the modules above; the classifier trains too."""
    config = sizes.config(lora_targets=list(targets), lora_rank=sizes.rank, lora_alpha=ALPHA)
    model = LoraBertForSequenceClassification(config, _do_init=False)
    flat = flatten_dict(model.params_shape_tree)
    trainable = {k: v for k, v in flat.items() if k[0] == "classifier" or k[-1] in ("lora_a", "lora_b")}
    frozen = {k: v for k, v in flat.items() if k not in trainable}

    def loss(trainable: Tree, frozen: Tree, batch: Mapping[str, Any]) -> jax.Array:
        return cross_entropy(model, unflatten_dict({**trainable, **frozen}), batch)

    return Training(loss, trainable, frozen)


# --- without LoRA


def full(sizes: Sizes) -> Training:
    """Fine-tuning of the whole bare model."""
    model = FlaxBertForSequenceClassification(sizes.config(), _do_init=False)
    return Training(lambda params, _, batch: cross_entropy(model, params, batch), dict(model.params_shape_tree), {})


def intercepted(sizes: Sizes) -> Training:
    """The same with an interceptor that changes nothing: a delta without a layer."""
    model = FlaxBertForSequenceClassification(sizes.config(), _do_init=False)
    jdelta.DeltaModel(model)
    return Training(lambda params, _, batch: cross_entropy(model, params, batch), dict(model.params_shape_tree), {})


def agreement(targets: str, sizes: Sizes) -> dict[str, float]:
    """Largest relative difference of loss and gradients, jdelta's from the hand-written, on random weights."""
    mine, hand = with_jdelta(sizes, TARGETS[targets][0], init=True), by_hand(sizes, TARGETS[targets][1])
    random = np.random.default_rng(0)

    def noise(tree: Tree) -> Tree:
        return jax.tree.map(lambda leaf: leaf + 0.1 * random.standard_normal(leaf.shape, np.float32), tree)

    def renamed(tree: Tree) -> Tree:
        """jdelta's tree as the hand-written modules name it."""
        flat = flatten_dict(tree)
        return {(*k[:-2], f"lora_{k[-1]}") if k[-2] == "lora" else k: leaf for k, leaf in flat.items()}

    trainable, frozen = noise(mine.trainable), noise(mine.frozen)
    batch = {
        "input_ids": random.integers(0, sizes.vocab, (sizes.batch, sizes.length), dtype=np.int32),
        "attention_mask": np.ones((sizes.batch, sizes.length), np.int32),
        "labels": random.integers(0, 2, (sizes.batch,), dtype=np.int32),
        "key": jax.random.key(1),
    }
    assert renamed(trainable).keys() == hand.trainable.keys()
    assert renamed(frozen).keys() == hand.frozen.keys()
    loss, grads = jax.jit(jax.value_and_grad(mine.loss))(trainable, frozen, batch)
    hand_loss, hand_grads = jax.jit(jax.value_and_grad(hand.loss))(renamed(trainable), renamed(frozen), batch)
    differences = [
        float(jnp.abs(leaf - hand_grads[key]).max() / jnp.abs(hand_grads[key]).max())
        for key, leaf in renamed(grads).items()
    ]
    return {"loss": float(abs(loss - hand_loss) / abs(hand_loss)), "gradients": max(differences)}


# --- the report


def costs(sizes: Sizes) -> list[Figure]:
    inputs, figures = sizes.inputs(), []
    whole = cost(full(sizes), inputs)
    figures += [
        Figure("full fine-tuning: FLOPs", whole["flops"] / 1e9, "G"),
        Figure("full fine-tuning: temporary memory", whole["temp"] / 1e6, "MB"),
    ]
    for name, (patterns, by_hand_names) in TARGETS.items():
        mine, hand = cost(with_jdelta(sizes, patterns), inputs), cost(by_hand(sizes, by_hand_names), inputs)
        figures += [
            Figure(f"{name}: FLOPs, jdelta", mine["flops"] / 1e9, "G"),
            Figure(f"{name}: FLOPs, by hand", hand["flops"] / 1e9, "G"),
            Figure(f"{name}: FLOPs, jdelta / by hand", mine["flops"] / hand["flops"], goal=SAME_COST),
            Figure(f"{name}: temporary memory, jdelta", mine["temp"] / 1e6, "MB"),
            Figure(f"{name}: temporary memory, by hand", hand["temp"] / 1e6, "MB"),
            Figure(f"{name}: temporary memory, jdelta / by hand", mine["temp"] / hand["temp"], goal=SAME_MEMORY),
            Figure(
                f"{name}: FLOPs, jdelta / full fine-tuning",
                mine["flops"] / whole["flops"],
                goal=OF_FULL if name == "every Dense" else None,
            ),
            Figure(f"{name}: FLOPs, by hand / full fine-tuning", hand["flops"] / whole["flops"]),
        ]
    return figures


def tracings(sizes: Sizes, runs: int) -> list[Figure]:
    variants = {"bare": full(sizes), "intercepted": intercepted(sizes)}
    for name, (patterns, by_hand_names) in TARGETS.items():
        variants[f"{name}, jdelta"] = with_jdelta(sizes, patterns)
        variants[f"{name}, by hand"] = by_hand(sizes, by_hand_names)
    times = tracing_times(variants, sizes.inputs(), runs)
    figures = []
    for what in ("forward", "gradient"):
        at = {name: kinds[what] for name, kinds in times.items()}
        figures += [Figure(f"{what} traced, {name}", seconds, "s") for name, seconds in at.items()]
        figures.append(
            Figure(f"{what} traced, interceptor without a layer / bare", at["intercepted"] / at["bare"], goal=TRACING)
        )
        for name in TARGETS:
            ratio = at[f"{name}, jdelta"] / at[f"{name}, by hand"]
            figures += [
                Figure(f"{what} traced, {name}, jdelta / bare", at[f"{name}, jdelta"] / at["bare"]),
                Figure(f"{what} traced, {name}, by hand / bare", at[f"{name}, by hand"] / at["bare"]),
                Figure(f"{what} traced, {name}, jdelta / by hand", ratio, goal=TRACING),
            ]
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--runs", type=int, default=16, help="how often each variant is traced (default 16)")
    parser.add_argument("--only", choices=["cost", "tracing"], help="leave the other out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    sizes = Sizes(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Sizes)})
    small = Sizes(layers=2, hidden=64, vocab=100, batch=2, length=16, dropout=sizes.dropout)

    figures = []
    for name in TARGETS:
        for what, difference in agreement(name, small).items():
            figures.append(Figure(f"{name}: {what}, relative difference to by hand", difference, goal=1e-5))
    if options.only != "tracing":
        figures += costs(sizes)
    if options.only != "cost":
        figures += tracings(sizes, options.runs)

    console = Console(width=110)
    console.print(f"{sizes}, jax {jax.__version__} on {jax.devices()[0].device_kind}")
    report(figures, console)
    if options.json:
        write(options.json, sizes, figures)


if __name__ == "__main__":
    main()
