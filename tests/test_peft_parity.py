"""LoRA's numbers are those of PyTorch PEFT for the same weights: logits, and gradients of `a` and `b`.

The torch model gets random weights, PEFT's LoRA random `lora_A` and `lora_B`; the same numbers go into the Flax model
and into jdelta's leaves, all of them float32. PEFT then computes in float64, so that what remains is the rounding of
jax's float32 alone. The tolerance is 1e-5 of the largest entry of the logits and of each gradient. Entry by entry it
would mean nothing: a sum whose terms cancel has no relative precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers  # so that it finds torch, or is not loaded
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from parity import TOLERANCE, assert_close, loss_of, peft, torch

import jdelta

pytestmark = pytest.mark.parity

RANK, ALPHA = 4, 16

BERT = transformers.BertConfig(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=37,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
GPT2 = transformers.GPT2Config(
    vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
)
T5 = transformers.T5Config(
    vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of transformers, and the modules that get LoRA: PEFT takes the end of a name as jdelta does."""

    family: str
    config: Any
    targets: Sequence[str]

    @property
    def conv1d(self) -> bool:
        """Whether the targets are GPT-2's Conv1D, a linear layer that keeps its kernel as (in, out)."""
        return self.config is GPT2

    def inputs(self) -> dict[str, np.ndarray]:
        """Two sequences, the second of them padded."""
        ids = np.random.default_rng(0).integers(1, 99, (2, 10))
        mask = np.ones((2, 10), np.int64)
        mask[1, 7:] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        return {**inputs, "decoder_input_ids": ids[:, :6]} if self.config is T5 else inputs


CASES = {
    "bert-query-value": Case("BertForSequenceClassification", BERT, ["query", "value"]),
    "bert-every-dense": Case("BertForSequenceClassification", BERT, ["query", "key", "value", "dense"]),
    "bert-embedding": Case("BertForSequenceClassification", BERT, ["word_embeddings"]),
    "gpt2-conv1d": Case("GPT2LMHeadModel", GPT2, ["c_attn"]),
    "gpt2-every-conv1d": Case("GPT2LMHeadModel", GPT2, ["c_attn", "c_proj", "c_fc"]),
    "t5-q-v": Case("T5ForConditionalGeneration", T5, ["q", "v"]),
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same function in both frameworks, and LoRA's weights by jdelta's paths."""

    torch_logits: Callable[[], Any]
    torch_leaves: dict[tuple[str, ...], Any]
    flax_logits: Callable[[Any], jax.Array]
    params: Any  # with PEFT's numbers in the leaves of the delta
    bare: Any  # as it was attached


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case = CASES[request.param]
    torch.manual_seed(0)
    base = getattr(transformers, case.family)(case.config)
    add_noise(base)
    folder = tmp_path_factory.mktemp("base")
    base.save_pretrained(folder)
    flax_model = getattr(transformers, "Flax" + case.family).from_pretrained(folder, from_pt=True)
    jdelta.LoraModel(flax_model, modified_modules=case.targets, lora_r=RANK, lora_alpha=ALPHA)

    wrapped, leaves = with_peft(base, case.targets, fan_in_fan_out=case.conv1d)
    inputs = case.inputs()
    return Pair(
        torch_logits=lambda: wrapped(**{key: torch.tensor(value) for key, value in inputs.items()}).logits,
        torch_leaves=leaves,
        flax_logits=jax.jit(lambda params: flax_model(**inputs, params=params).logits),
        params=filled(flax_model.params, leaves),
        bare=flax_model.params,
    )


@pytest.fixture(scope="module")
def conv_pair() -> Pair:
    """A convolution, then a mean and a linear layer. (Not dilated: PEFT 0.21 forgets the dilation of its host.)"""

    class TorchNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(5, 8, 3, stride=2, padding=1)
            self.head = torch.nn.Linear(8, 6)

        def forward(self, x: Any) -> Any:
            return self.head(torch.relu(self.conv(x)).mean((2, 3)))

    class FlaxNet(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.Conv(8, (3, 3), strides=2, padding=1, name="conv")(x)
            return nn.Dense(6, name="head")(nn.relu(x).mean((1, 2)))

    torch.manual_seed(0)
    base = TorchNet()
    params = {
        name: {"kernel": to_flax(layer.weight), "bias": jnp.asarray(layer.bias.detach().numpy())}
        for name, layer in base.named_children()
    }
    x = np.random.default_rng(0).standard_normal((2, 12, 9, 5), np.float32)
    backbone = jdelta.Backbone(FlaxNet(), params, dummy_inputs=(x,))
    jdelta.LoraModel(backbone, modified_modules=["conv", "head"], lora_r=RANK, lora_alpha=ALPHA)
    wrapped, leaves = with_peft(base, ["conv", "head"])
    return Pair(
        torch_logits=lambda: wrapped(torch.tensor(x.transpose(0, 3, 1, 2)).double()),
        torch_leaves=leaves,
        flax_logits=jax.jit(lambda params: backbone(x, params=params)),
        params=filled(backbone.params, leaves),
        bare=backbone.params,
    )


def test_logits_are_those_of_peft(pair: Pair) -> None:
    check_logits(pair)


def test_gradients_of_a_and_b_are_those_of_peft(pair: Pair) -> None:
    check_gradients(pair)


def test_the_outputs_of_a_convolution_are_those_of_peft(conv_pair: Pair) -> None:
    check_logits(conv_pair)


def test_the_gradients_in_a_convolution_are_those_of_peft(conv_pair: Pair) -> None:
    check_gradients(conv_pair)


def check_logits(pair: Pair) -> None:
    with torch.no_grad():
        expected = pair.torch_logits().numpy()
    found = np.asarray(pair.flax_logits(pair.params))
    assert_close(found, expected, "logits")
    # The comparison says something: LoRA moved the logits by much more than the tolerance.
    assert np.abs(found - pair.flax_logits(pair.bare)).max() > 1000 * TOLERANCE * np.abs(expected).max()


def check_gradients(pair: Pair) -> None:
    expected_loss = loss_of(pair.torch_logits())
    expected = torch.autograd.grad(expected_loss, list(pair.torch_leaves.values()))
    loss, grads = jax.value_and_grad(lambda params: loss_of(pair.flax_logits(params)))(pair.params)
    assert float(loss) == pytest.approx(expected_loss.item(), rel=TOLERANCE)
    found = flatten_dict(grads)
    for path, gradient in zip(pair.torch_leaves, expected, strict=True):
        assert_close(found[path], to_flax(gradient).reshape(found[path].shape), ".".join(path))


def add_noise(model: Any) -> None:
    """Norms and biases begin as constants, which would hide a wrong order."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


def with_peft(base: Any, targets: Sequence[str], **more: Any) -> tuple[Any, dict[tuple[str, ...], Any]]:
    """The model wrapped by PEFT, with random LoRA weights; and these by the paths of jdelta's leaves."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets), **more)
    wrapped = peft.get_peft_model(base, config).eval()
    leaves = {}
    for name, parameter in wrapped.named_parameters():
        # base_model.model.<module>.lora_A.default.weight, or lora_embedding_A.default
        host, found, rest = name.removeprefix("base_model.model.").partition(".lora_")
        if found:
            torch.nn.init.normal_(parameter, std=0.1)
            letter = rest.removeprefix("embedding_")[0].lower()
            leaves[(*host.split("."), "lora", letter)] = parameter
    return wrapped.double(), leaves


def filled(params: Any, leaves: dict[tuple[str, ...], Any]) -> Any:
    """The grafted tree with PEFT's numbers in the delta's leaves: all of them, and no others."""
    flat = flatten_dict(params)
    assert leaves.keys() == {path for path in flat if "lora" in path}
    for path, parameter in leaves.items():
        flat[path] = to_flax(parameter).reshape(flat[path].shape)
    return unflatten_dict(flat)


def to_flax(parameter: Any) -> jax.Array:
    """In Flax order. PyTorch puts the output axis first: (out, in), and (out, in, *window) for a convolution."""
    array = parameter.detach().float().numpy()
    return jnp.asarray(array.transpose(*range(2, array.ndim), 1, 0))
