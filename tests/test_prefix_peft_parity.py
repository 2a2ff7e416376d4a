"""A prefix gives the numbers of PyTorch PEFT's prefix tuning: logits, and gradients of everything that trains.

The torch model gets random weights and PEFT a random prefix; the same numbers go into the Flax model and into jdelta's
leaves, all of them float32. PEFT then computes in float64, so that what remains is jax's float32 (T5 takes its softmax
and GPT-J its rotary positions in float32 in torch as well). The tolerance is 1e-5 of the largest entry of the logits
and of each gradient.

What PEFT 0.21 does under transformers 4.57, and what is compared:

- GPT-2, Llama, OPT, GPT-J and BERT work. PEFT counts the prefix as positions, jdelta does not, so that jdelta is given
  PEFT's position ids. Without them jdelta's numbers are those of the torch model, fed by hand with a `DynamicCache`
  that holds the prefix and with the usual position ids.
- With fewer key heads than heads, PEFT makes a prefix of key heads, and so does jdelta.
- BART and T5 run, but the prefix is in the decoder's self-attention only: PEFT empties the cross-attention cache. And
  PEFT repeats the rows of the first half of the layers (it splits a `cat` over the layers in the wrong place), so that
  here both layers share theirs. What is compared are the numbers that PEFT really feeds.
- T5 in PEFT gives the prefix the relative position bias of tokens before the text; in jdelta it has none. With PEFT the
  decoder's table is zeros. By hand it is random, and the columns of the prefix are zeroed in the torch model's bias.
- Cross-attention: the torch model is fed by hand with an `EncoderDecoderCache` that has a prefix in its cross-attention
  part too. `is_updated` must be false, else torch takes the prefix in place of the encoder's keys, not before them.
- DistilBERT: PEFT does not know its sizes, and the torch model takes no cache. Bloom: PEFT counts the prefix in ALiBi.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers  # so that it finds torch, or is not loaded
from flax.traverse_util import flatten_dict, unflatten_dict
from parity import TOLERANCE, assert_close, loss_of, peft, torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import jdelta
from jdelta.hosts.linen.instrument import attachments_of

pytestmark = pytest.mark.parity

TOKENS = 3
LENGTH = 7
WORDS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 32}
STACKS = {
    "d_model": 16,
    **{f"{stack}_layers": 2 for stack in ("encoder", "decoder")},
    **{f"{stack}_attention_heads": 2 for stack in ("encoder", "decoder")},
    **{f"{stack}_ffn_dim": 24 for stack in ("encoder", "decoder")},
}

GPT2 = transformers.GPT2Config(**WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=32)
LLAMA = transformers.LlamaConfig(**WORDS, **SIZES, num_attention_heads=2)
GROUPED = transformers.LlamaConfig(**WORDS, **SIZES, num_attention_heads=4, num_key_value_heads=2)
OPT = transformers.OPTConfig(
    **WORDS,
    hidden_size=16,
    ffn_dim=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    word_embed_proj_dim=16,
)
GPTJ = transformers.GPTJConfig(**WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=32, rotary_dim=4)
BERT = transformers.BertConfig(**WORDS, **SIZES, num_attention_heads=2)
BART = transformers.BartConfig(**WORDS, **STACKS, max_position_embeddings=32, forced_eos_token_id=None)
T5 = transformers.T5Config(
    **WORDS, decoder_start_token_id=0, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="relu"
)

_BART_SELF, _BART_CROSS = "model.decoder.layers.{}.self_attn", "model.decoder.layers.{}.encoder_attn"
_T5_SELF = "decoder.block.{}.layer.0.SelfAttention"
_T5_CROSS = "decoder.block.{}.layer.1.EncDecAttention"


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of transformers, and who runs the prefix in torch."""

    cls: str
    config: Any
    task: str
    hosts: tuple[str, ...]  # names by layer: of self-attention, and of cross-attention
    by_hand: bool = False  # the torch model with a cache that we fill, in place of PEFT
    projection: bool = False  # reparameterised

    @property
    def seq2seq(self) -> bool:
        return self.config.is_encoder_decoder

    @property
    def padded(self) -> bool:
        """OPT in torch counts the positions from the mask, and so has none at padding."""
        return self.config is not OPT

    def inputs(self) -> dict[str, np.ndarray]:
        """Two sequences, the second of them padded."""
        ids = np.random.default_rng(0).integers(3, 60, (2, LENGTH))
        mask = np.ones((2, LENGTH), np.int64)
        if self.padded:
            mask[1, 5:] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.seq2seq:
            decoder_mask = np.ones((2, 5), np.int64)
            decoder_mask[0, 4:] = 0
            inputs |= {"decoder_input_ids": ids[:, :5], "decoder_attention_mask": decoder_mask}
        return inputs

    def positions(self) -> dict[str, np.ndarray]:
        """Position ids that the prefix has shifted, for Flax; none where torch is given the usual ones."""
        if self.config is T5 or (self.by_hand and not self.seq2seq):
            return {}
        length = 5 if self.seq2seq else LENGTH
        shifted = np.broadcast_to(np.arange(TOKENS, TOKENS + length), (2, length))
        return {"decoder_position_ids" if self.seq2seq else "position_ids": shifted}


_GPT2 = ("GPT2LMHeadModel", GPT2, "CAUSAL_LM", ("transformer.h.{}.attn",))
_LLAMA = ("LlamaForCausalLM", LLAMA, "CAUSAL_LM", ("model.layers.{}.self_attn",))
_BERT = ("BertForSequenceClassification", BERT, "SEQ_CLS", ("bert.encoder.layer.{}.attention",))
_BART = ("BartForConditionalGeneration", BART, "SEQ_2_SEQ_LM")
_T5 = ("T5ForConditionalGeneration", T5, "SEQ_2_SEQ_LM")

CASES = {
    "gpt2": Case(*_GPT2),
    "gpt2-reparameterised": Case(*_GPT2, projection=True),
    "llama": Case(*_LLAMA),
    "llama-fewer-key-heads": Case("LlamaForCausalLM", GROUPED, "CAUSAL_LM", ("model.layers.{}.self_attn",)),
    "opt": Case("OPTForCausalLM", OPT, "CAUSAL_LM", ("model.decoder.layers.{}.self_attn",)),
    "gptj": Case("GPTJForCausalLM", GPTJ, "CAUSAL_LM", ("transformer.h.{}.attn",)),
    "bert": Case(*_BERT),
    "bart": Case(*_BART, (_BART_SELF,)),
    "t5": Case(*_T5, (_T5_SELF,)),
    "gpt2-cache-by-hand": Case(*_GPT2, by_hand=True),
    "bart-crossattention-by-hand": Case(*_BART, (_BART_SELF, _BART_CROSS), by_hand=True),
    "t5-crossattention-by-hand": Case(*_T5, (_T5_SELF, _T5_CROSS), by_hand=True),
}


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Of one framework: logits without the prefix and with it, and gradients by the paths of jdelta's leaves."""

    bare: np.ndarray
    logits: np.ndarray
    grads: dict[tuple[str, ...], np.ndarray]


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Numbers, Numbers]:
    """What torch and what jdelta computes."""
    case = CASES[request.param]
    torch.manual_seed(0)
    base = getattr(transformers, case.cls)(case.config).eval()
    roughen(base, case)
    folder = tmp_path_factory.mktemp("base")
    base.save_pretrained(folder)
    flax_class = getattr(transformers, "Flax" + case.cls)
    weights = flax_class.from_pretrained(folder, from_pt=True).params
    model = flax_class(case.config, _do_init=False)

    tensors = {key: torch.tensor(value) for key, value in case.inputs().items()}
    with torch.no_grad():
        bare = base.double()(**tensors).logits.numpy()
    run, leaves = by_hand(base, case, tensors) if case.by_hand else with_peft(base, case, tensors)
    logits = run()
    grads = torch.autograd.grad(loss_of(logits), [leaf.tensor for leaf in leaves.values()])

    hosts = [name.format(layer) for name in case.hosts for layer in range(2)]
    dims = {"embed_dim": 16, "mid_dim": 12} if case.projection else {}
    delta = jdelta.PrefixModel(
        model, modified_modules=hosts, prefix_token_num=TOKENS, reparameterize=case.projection, **dims
    )
    order = attachments_of(model.module)[0].generator.leaves if case.projection else ()
    values = {path: in_order_of(order, path, leaf.value()) for path, leaf in leaves.items()}
    expected = {
        path: in_order_of(order, path, leaf.gradient(g)) for (path, leaf), g in zip(leaves.items(), grads, strict=True)
    }
    shapes = {path: leaf.shape for path, leaf in flatten_dict(delta.shapes()).items()}
    assert shapes == {path: value.shape for path, value in values.items()}
    trainable = unflatten_dict({path: jnp.asarray(value, jnp.float32) for path, value in values.items()})

    @jax.jit
    def of_jax(trainable):
        def loss(trainable):
            found = model(**case.inputs(), **case.positions(), params=jdelta.graft(weights, trainable)).logits
            return loss_of(found), found

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    (_, found), gradients = of_jax(trainable)
    return Numbers(bare, logits.detach().numpy(), expected), Numbers(bare, found, flatten_dict(gradients))


def test_logits_are_those_of_torch(pair: tuple[Numbers, Numbers]) -> None:
    expected, found = pair
    assert_close(found.logits, expected.logits, "logits")
    # The comparison says something: the prefix moved the logits by much more than the tolerance.
    assert np.abs(expected.logits - expected.bare).max() > 1000 * TOLERANCE * np.abs(expected.logits).max()


def test_gradients_are_those_of_torch(pair: tuple[Numbers, Numbers]) -> None:
    expected, found = pair
    for path, gradient in expected.grads.items():
        assert_close(found.grads[path], gradient, ".".join(path))


def test_peft_feeds_the_same_rows_to_both_layers_of_an_encoder_decoder() -> None:
    """The reason why the rows are read from PEFT's cache and not from its embedding; gone, the docstring is stale."""
    wrapped = peft.get_peft_model(
        transformers.BartForConditionalGeneration(BART),
        peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=TOKENS),
    )
    cache = wrapped.get_prompt(1)
    first, second = cache.self_attention_cache.layers
    assert torch.equal(first.keys, second.keys)
    assert len(cache.cross_attention_cache.layers) == 0


# --- torch


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A tensor of torch that a leaf of jdelta stands for.

    `(batch, heads, tokens, width)` in a cache, where all sequences have the same numbers.
    """

    tensor: Any

    def value(self) -> np.ndarray:
        """Its numbers in jdelta's layout."""
        return self._laid_out(self.tensor.detach(), lambda cache: cache[0])

    def gradient(self, gradient: Any) -> np.ndarray:
        """A gradient with respect to it in jdelta's layout."""
        return self._laid_out(gradient, lambda cache: cache.sum(0))

    def _laid_out(self, tensor: Any, without_batch: Callable) -> np.ndarray:
        return without_batch(tensor).transpose(0, 1).numpy() if tensor.ndim == 4 else tensor.numpy()


class Weight(Leaf):
    """The weight of a linear layer, `(out, in)`."""

    def _laid_out(self, tensor: Any, without_batch: Callable) -> np.ndarray:
        return tensor.numpy().T


def with_peft(base: Any, case: Case, inputs: dict[str, Any]) -> tuple[Callable[[], Any], dict[tuple[str, ...], Leaf]]:
    """The model run by PEFT, and what trains in it by jdelta's paths."""
    more = {"prefix_projection": True, "encoder_hidden_size": 12} if case.projection else {}
    config = peft.PrefixTuningConfig(task_type=case.task, num_virtual_tokens=TOKENS, **more)
    wrapped = peft.get_peft_model(base, config).eval().double()
    encoder = wrapped.prompt_encoder["default"]
    if case.projection:
        down, up = encoder.transform[0], encoder.transform[2]
        leaves = {
            ("prefix", "embed", "embedding"): Leaf(encoder.embedding.weight),
            ("prefix", "down", "kernel"): Weight(down.weight),
            ("prefix", "down", "bias"): Leaf(down.bias),
            ("prefix", "up", "kernel"): Weight(up.weight),
            ("prefix", "up", "bias"): Leaf(up.bias),
        }
        return lambda: wrapped(**inputs).logits, leaves
    cache = wrapped.get_prompt(2)
    wrapped.get_prompt = lambda *args, **kwargs: cache  # so that we hold the tensors that torch differentiates
    layers = (cache.self_attention_cache if case.seq2seq else cache).layers
    leaves = leaves_of([(layer.keys, layer.values) for layer in layers], case.hosts[0])
    return lambda: wrapped(**inputs).logits, leaves


def by_hand(base: Any, case: Case, inputs: dict[str, Any]) -> tuple[Callable[[], Any], dict[tuple[str, ...], Leaf]]:
    """The torch model itself, fed with caches that hold the prefix."""
    heads = case.config.num_attention_heads
    pairs = [
        [
            tuple(torch.randn(1, heads, TOKENS, 8).double().expand(2, -1, -1, -1).requires_grad_() for _ in "kv")
            for _ in range(2)
        ]
        for _ in case.hosts
    ]
    leaves = {}
    for host, layers in zip(case.hosts, pairs, strict=True):
        leaves |= leaves_of(layers, host)
    ones = torch.ones(2, TOKENS, dtype=torch.long)
    if not case.seq2seq:
        mask = torch.cat([ones, inputs["attention_mask"]], dim=1)
        return (
            lambda: (
                base(
                    **{**inputs, "attention_mask": mask},
                    position_ids=torch.arange(LENGTH)[None],
                    past_key_values=DynamicCache(pairs[0]),
                ).logits
            ),
            leaves,
        )

    if case.config is T5:
        forget_bias_of_prefix(base)

    def run() -> Any:
        encoded = base.get_encoder()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        cache = EncoderDecoderCache(*(DynamicCache(layers) for layers in pairs))
        cache.is_updated = dict.fromkeys(cache.is_updated, False)
        return base(
            encoder_outputs=encoded,
            attention_mask=torch.cat([ones, inputs["attention_mask"]], dim=1),
            decoder_input_ids=inputs["decoder_input_ids"],
            decoder_attention_mask=torch.cat([ones, inputs["decoder_attention_mask"]], dim=1),
            past_key_values=cache,
        ).logits

    return run, leaves


def leaves_of(layers: list[tuple[Any, Any]], host: str) -> dict[tuple[str, ...], Leaf]:
    """Keys and values of a cache by jdelta's paths."""
    return {
        (*host.format(i).split("."), "prefix", name): Leaf(tensor)
        for i, layer in enumerate(layers)
        for name, tensor in zip(("keys", "values"), layer, strict=True)
    }


def roughen(model: Any, case: Case) -> None:
    """Norms and biases begin as constants, which would hide a wrong order. Run by PEFT, T5's decoder has no bias."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.05 * torch.randn_like(parameter)
            if "relative_attention_bias" in name:
                parameter.normal_()
                if name.startswith("decoder") and not case.by_hand:
                    parameter.zero_()


def forget_bias_of_prefix(model: Any) -> None:
    """Zeroes the columns of the prefix in the bias of T5's decoder."""
    attention = model.decoder.block[0].layer[0].SelfAttention
    compute = attention.compute_bias

    def compute_bias(*args: Any, **kwargs: Any) -> Any:
        bias = compute(*args, **kwargs)
        return torch.cat([torch.zeros_like(bias[..., :TOKENS]), bias[..., TOKENS:]], dim=-1)

    attention.compute_bias = compute_bias


# --- both


def in_order_of(order: tuple, path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """PEFT's numbers in jdelta's order: the outputs of `up` are those of jdelta's leaves, one after the other.

    PEFT has keys of layer 0, values of layer 0, keys of layer 1, …
    """
    if "up" not in path:
        return array
    parts = np.split(array, 4, axis=-1)
    layers = {leaf: 2 * int(leaf[2]) + (leaf[-1] == "values") for leaf, _ in order}  # transformer.h.<layer>.attn
    return np.concatenate([parts[layers[leaf]] for leaf, _ in order], axis=-1)
