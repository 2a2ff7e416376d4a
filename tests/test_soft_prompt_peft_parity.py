"""Soft prompts agree with PyTorch PEFT's prompt tuning: logits, and the gradient of the prompt.

The torch model gets random weights, saved and loaded into Flax; PEFT's random prompt goes into jdelta's leaf. Torch
computes in float64, so that what remains is the rounding of jax's float32: the tolerance is 1e-5 of the largest entry.
PEFT returns the prompt's positions too, jdelta the caller's alone: the others are compared. Sequence classification is
not among the tasks, since PEFT pools at the first position, which is the prompt's, and jdelta at the caller's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import transformers  # so that it finds torch, or is not loaded
import zoo
from flax.traverse_util import flatten_dict, unflatten_dict
from parity import peft, torch

import jdelta

pytestmark = pytest.mark.parity

TOKENS = 3
LENGTH = 7

CAUSAL = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "opt": "OPTForCausalLM",
    "bloom": "BloomForCausalLM",
}
SEQ2SEQ = {"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}
ENCODERS = {
    "bert": "BertForTokenClassification",
    "roberta": "RobertaForTokenClassification",
    "distilbert": "DistilBertForTokenClassification",
    "albert": "AlbertForTokenClassification",
}
TASKS = {"CAUSAL_LM": CAUSAL, "SEQ_2_SEQ_LM": SEQ2SEQ, "TOKEN_CLS": ENCODERS}
CASES = {family: (task, classes[family]) for task, classes in TASKS.items() for family in classes}


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Of one framework: logits without the prompt and with it, and the prompt's gradient."""

    bare: np.ndarray
    logits: np.ndarray
    gradient: np.ndarray


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Numbers, Numbers]:
    """What PEFT and what jdelta computes."""
    task, name = CASES[request.param]
    config = zoo.config(request.param)
    torch.manual_seed(0)
    base = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():  # norms and biases begin as constants, which would hide a wrong order
            if parameter.requires_grad:  # sinusoidal positions are no weights in Flax
                parameter += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("base")
    base.save_pretrained(folder)
    model = getattr(transformers, "Flax" + name).from_pretrained(folder, from_pt=True)
    weights = model.params

    inputs = inputs_of(request.param, task)
    tensors = {key: torch.tensor(value) for key, value in inputs.items()}
    with torch.no_grad():
        bare = base.double()(**tensors).logits.numpy()
    prompt_config = peft.PromptTuningConfig(
        task_type=task,
        num_virtual_tokens=TOKENS,
        num_transformer_submodules=1,  # the encoder alone
        token_dim=base.get_input_embeddings().weight.shape[1],  # ALBERT's is not the hidden size
        num_attention_heads=2,  # PEFT does not know DistilBERT's name for it
    )
    wrapped = peft.get_peft_model(base, prompt_config).eval().double()
    prompt = wrapped.prompt_encoder["default"].embedding.weight
    logits = wrapped(**tensors).logits[:, 0 if task == "SEQ_2_SEQ_LM" else TOKENS :]
    (gradient,) = torch.autograd.grad(loss_of(logits), [prompt])

    delta = jdelta.SoftPromptModel(model, soft_token_num=TOKENS)
    ((path, shape),) = flatten_dict(delta.shapes()).items()
    assert shape.shape == tuple(prompt.shape)

    @jax.jit
    def of_jax(prompt):
        def loss(prompt):
            params = jdelta.graft(weights, unflatten_dict({path: prompt}))
            found = model(**inputs, params=params).logits
            return loss_of(found), found

        return jax.value_and_grad(loss, has_aux=True)(prompt)

    (_, found), found_gradient = of_jax(jnp.asarray(prompt.detach().numpy(), jnp.float32))
    return Numbers(bare, logits.detach().numpy(), gradient.numpy()), Numbers(bare, found, found_gradient)


def test_logits_are_those_of_peft(pair: tuple[Numbers, Numbers]) -> None:
    expected, found = pair
    assert_close(found.logits, expected.logits, "logits")
    # The comparison says something: the prompt moved the logits by much more than the tolerance.
    assert np.abs(expected.logits - expected.bare).max() > 1000 * parity.TOLERANCE * np.abs(expected.logits).max()


def test_the_gradient_of_the_prompt_is_that_of_peft(pair: tuple[Numbers, Numbers]) -> None:
    expected, found = pair
    assert_close(found.gradient, expected.gradient, "gradient")


def inputs_of(family: str, task: str) -> dict[str, np.ndarray]:
    """Two sequences, the second of them padded; token types where the model has them."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 60, (2, LENGTH))
    mask = np.ones((2, LENGTH), np.int64)
    mask[1, 5:] = 0
    inputs = {"input_ids": np.where(mask, ids, 0), "attention_mask": mask}
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = ids[:, :5]
    if family in ("bert", "albert"):
        inputs["token_type_ids"] = rng.integers(0, 2, (2, LENGTH))
    return inputs


def loss_of(logits: Any) -> Any:
    """A scalar with a different weight for each logit, in either framework; without the padded positions' logits,
    where the frameworks differ in the positions they give them."""
    real = np.ones(tuple(logits.shape), np.float32)
    real[1, 5:] = 0
    weights = real * np.cos(np.arange(np.prod(logits.shape), dtype=np.float32)).reshape(tuple(logits.shape))
    if isinstance(logits, torch.Tensor):
        return (logits * torch.tensor(weights) + 0.1 * torch.tensor(real) * logits**2).mean()
    return (logits * weights + 0.1 * real * logits**2).mean()


def assert_close(found: Any, expected: np.ndarray, what: str) -> None:
    found, expected = np.array(found), np.array(expected)
    if what == "logits":
        found[1, 5:] = expected[1, 5:] = 0
    parity.assert_close(found, expected, what)
