"""Fine-tunes a tiny Llama 3 of tunix on movie reviews with tunix's own trainer, which knows nothing of jdelta.

    pip install -e '.[tunix]'                             # in jdelta's folder
    python examples/tunix_finetuning.py                   # LoRA; a few minutes on two CPU cores
    python examples/tunix_finetuning.py --method adapter
    python examples/tunix_finetuning.py --steps 10 --out /tmp/delta                  # a quick look

The weights are random, and a token is a byte of the text, so what it writes is no English: the loss falls, and the
texts that tunix's sampler generates before and after differ. Data: `data/README.md`.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import jdelta

DATA = Path(__file__).resolve().parent / "data" / "movies.tsv.gz"
PROMPTS = ["the film ", "a story of "]
SIZES = {"num_layers": 2, "embed_dim": 64, "hidden_dim": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


class Bytes:
    """A tokenizer, as tunix's sampler takes it: a token for each byte, after those for padding, begin and end."""

    vocab_size = 259

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) - 3 for i in ids if i >= 3).decode(errors="replace")

    def pad_id(self) -> int:
        return 0

    def bos_id(self) -> int:
        return 1

    def eos_id(self) -> int:
        return 2


class Losses:
    """Hooks of the trainer that keep the loss of each step, and print some."""

    def __init__(self, every: int):
        self.every, self.found = every, list[float]()

    def on_train_step_end(self, trainer: Any, step: int, loss: Any) -> None:
        self.found.append(float(loss))
        if len(self.found) == 1 or len(self.found) % self.every == 0:
            print(f"step {len(self.found):4}  loss {self.found[-1]:.4f}", flush=True)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *args: None


def require_tunix() -> None:
    missing = [name for name in ("tunix", "qwix") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"This example needs {' and '.join(missing)}. Install tunix, on Python 3.11 or later, with:\n\n"
            "    pip install -e '.[tunix]'\n"
        )


def load_texts() -> list[str]:
    if not DATA.exists():
        raise SystemExit(
            f"The data is missing: {DATA}.\nIt is part of jdelta's repository, and not of the installed package. Run "
            "the example from a checkout:\n\n    git checkout -- examples/data\n"
        )
    with gzip.open(DATA, "rt", encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def build_model(seed: int) -> nnx.Module:
    """A tiny Llama 3 with random weights; tunix itself begins with feed-forward layers of zeros."""
    from tunix.models.llama3 import model as llama3

    config = llama3.ModelConfig(vocab_size=Bytes.vocab_size, rope_theta=1_000_000, norm_eps=1e-6, **SIZES)
    model: nnx.Module = llama3.Llama3(config, rngs=nnx.Rngs(seed))
    draw = np.random.default_rng(seed)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable[...] = variable[...] + draw.normal(scale=0.05, size=variable.shape)
    return model


def build_delta(model: nnx.Module, args: argparse.Namespace) -> jdelta.DeltaModel:
    tokens = jax.ShapeDtypeStruct((1, args.length), np.int32)
    mask = jax.ShapeDtypeStruct((1, args.length, args.length), np.bool_)
    common = {"rng": args.seed, "dummy_inputs": (tokens, tokens, None, mask)}
    if args.method == "adapter":
        return jdelta.AdapterModel(model, bottleneck_dim=args.rank, **common)
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return jdelta.LoraModel(model, modified_modules=every, lora_r=args.rank, lora_alpha=2 * args.rank, **common)


def batches(texts: Sequence[str], args: argparse.Namespace) -> Iterator[Any]:
    """Random batches, as the trainer takes them: texts are cut off at `args.length` tokens, and padded to it."""
    from tunix.sft.peft_trainer import TrainingInput

    tokenizer, draw = Bytes(), np.random.default_rng(args.seed)
    for _ in range(args.steps):
        tokens = np.full((args.batch_size, args.length), tokenizer.pad_id(), np.int32)
        for row, i in zip(tokens, draw.integers(len(texts), size=args.batch_size), strict=True):
            ids = [tokenizer.bos_id(), *tokenizer.encode(texts[i]), tokenizer.eos_id()][: args.length]
            row[: len(ids)] = ids
        yield TrainingInput(input_tokens=tokens, input_mask=tokens != tokenizer.pad_id())


def model_inputs(batch: Any) -> dict[str, Any]:
    from tunix.sft import utils

    mask = batch.input_mask
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": mask,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }


def train(model: nnx.Module, texts: Sequence[str], args: argparse.Namespace) -> list[float]:
    """Trains with tunix's trainer: it trains each `nnx.LoRAParam`, which the leaves of a delta are."""
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

    config = TrainingConfig(eval_every_n_steps=args.steps, max_steps=args.steps)
    trainer = PeftTrainer(model, optax.adam(args.learning_rate), config).with_gen_model_input_fn(model_inputs)
    trainer.with_training_hooks(losses := Losses(max(args.steps // 10, 1)))
    trainer.train(batches(texts, args))
    return losses.found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--method", choices=["lora", "adapter"], default="lora", help="what trains")
    add("--steps", type=positive, default=200, help="training steps")
    add("--rank", type=positive, default=8, help="rank of the LoRA, or width of the adapter's bottleneck")
    add("--batch-size", type=positive, default=16, help="texts a step")
    add("--length", type=positive, default=64, help="tokens that each text is cut off at or padded to")
    add("--learning-rate", type=float, default=1e-2, help="learning rate of Adam")
    add("--tokens", type=positive, default=24, help="tokens to generate after each prompt, a byte each")
    add("--seed", type=int, default=0, help="seed of the initial values and of the order of the texts")
    add("--out", type=Path, default=Path("tunix_delta"), help="folder that the delta is saved to")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"at least 1, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, generates, saves and prints; returns what was printed."""
    args = parse(argv)
    require_tunix()
    from tunix.generate.sampler import CacheConfig, Sampler

    texts, model = load_texts(), build_model(args.seed)
    delta = build_delta(model, args)
    delta.log()
    sizes = {name: SIZES[name] for name in ("num_layers", "num_kv_heads", "head_dim")}
    sampler = Sampler(model, Bytes(), CacheConfig(cache_size=args.tokens + 32, **sizes))

    def generate() -> list[str]:
        found: list[str] = sampler(PROMPTS, max_generation_steps=args.tokens, temperature=0.0, seed=args.seed).text
        return found

    before = generate()
    losses = train(model, texts, args)
    sampler.transformer_state = nnx.variables(model)
    after = generate()
    delta.save_finetuned(args.out)
    print(f"loss {losses[0]:.4f} → {losses[-1]:.4f}; the delta is in {args.out}")
    for prompt, one, other in zip(PROMPTS, before, after, strict=True):
        print(f"{prompt!r}\n  before: {one!r}\n  after:  {other!r}")
    return {"losses": losses, "before": before, "after": after, "trained": len(delta.paths)}


if __name__ == "__main__":
    main()
