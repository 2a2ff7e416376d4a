"""LoRA that PyTorch PEFT trained on a model of Hugging Face computes the same on tunix's, and the other way round.

transformers writes a small random checkpoint, which tunix's own loader reads: how it maps names, transposes matrices
and counts heads says what an adapter has to become.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import transformers
import tunix_models
from flax import nnx
from parity import peft, torch

import jdelta
from jdelta.saved.peft.torch_leaves import torch_leaves

pytestmark = [pytest.mark.tunix, pytest.mark.parity]

TOLERANCE = 1e-4  # of the largest logit
ATTENTION, FEED_FORWARD = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
_SIZES = {"vocab_size": tunix_models.VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32}
_ROPE = {"rope_theta": 1_000_000, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 4, "attn_implementation": "eager", "pad_token_id": 0}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model: what it is in transformers and in tunix, and what PEFT adds."""

    torch_family: str
    family: str
    torch_changes: Mapping[str, Any]
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    targets: Sequence[str] = (*ATTENTION, *FEED_FORWARD)
    lora: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def torch_model(self) -> Any:
        cls = getattr(transformers, f"{self.torch_family}ForCausalLM")
        model = cls(cls.config_class(**_SIZES | _HEADS | self.torch_changes))
        _randomise(model.parameters(), 0.3)
        return model.eval()

    def tunix_model(self, folder: Path) -> Any:
        end = "_safetensors" if self.family.startswith("gemma") else ""
        loader = importlib.import_module(f"tunix.models.{self.family}.params{end}")
        return loader.create_model_from_safe_tensors(str(folder), tunix_models.config(self.family, **self.changes))


_GEMMA_2 = Case("Gemma2", "gemma", _GEMMA)
CASES = {
    "llama3": Case("Llama", "llama3", _ROPE),
    "llama3-tied": Case("Llama", "llama3", _ROPE | {"tie_word_embeddings": True}, {"weight_tying": True}),
    "llama3-with-head": Case("Llama", "llama3", _ROPE, targets=["q_proj"], lora={"modules_to_save": ["lm_head"]}),
    "llama3-ranks": Case(
        "Llama",
        "llama3",
        _ROPE,
        targets=ATTENTION,
        lora={"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.1.self_attn.k_proj": 5}, "use_rslora": True},
    ),
    "qwen2": Case("Qwen2", "qwen2", _ROPE),
    "qwen2-biases": Case("Qwen2", "qwen2", _ROPE, targets=["q_proj", "k_proj"], lora={"bias": "lora_only"}),
    "qwen3": Case("Qwen3", "qwen3", _ROPE),
    "gemma2": _GEMMA_2,
    "gemma2-values": dataclasses.replace(_GEMMA_2, targets=["q_proj", "v_proj"]),
    "gemma2-ranks": dataclasses.replace(_GEMMA_2, lora={"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"k_proj": 5}}),
    "gemma2-one-einsum": dataclasses.replace(
        _GEMMA_2, torch_changes=_GEMMA | {"num_key_value_heads": 4}, changes={"num_kv_heads": 4}
    ),
    "gemma3": Case("Gemma3", "gemma3", _GEMMA),
}


# tunix has no loader for checkpoints of Gemma 1.
GEMMA_1 = Case("Gemma", "gemma", {}, {"use_post_attn_norm": False, "use_post_ffw_norm": False})


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def checkpoint(case, tmp_path_factory) -> Path:
    """The base model, as transformers writes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    case.torch_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(case, checkpoint, tmp_path_factory) -> Path:
    """An adapter of PEFT's whose every number is random."""
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=list(case.targets), **case.lora)
    model = peft.get_peft_model(torch_base(checkpoint), config)
    _randomise((parameter for parameter in model.parameters() if parameter.requires_grad), 0.5)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def _randomise(parameters: Any, scale: float) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(scale * torch.randn_like(parameter))


def _move(delta: jdelta.DeltaModel) -> None:
    """Gives random numbers to everything that trains."""
    random = np.random.default_rng(0)
    trainable, frozen = delta.partition()
    trained = jax.tree.map(lambda leaf: leaf + random.normal(scale=0.3, size=leaf.shape).astype("f4"), trainable)
    delta.load_finetuned(delta.finetuned(jdelta.combine(trained, frozen)))


def torch_base(checkpoint: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(np.asarray(tunix_models.inputs()[0]))).logits.numpy()


def with_adapter(checkpoint: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(torch_base(checkpoint), adapter).eval()


def tunix_logits(model: Any) -> np.ndarray:
    return np.asarray(model(*tunix_models.inputs())[0])


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"{difference:.1e}")
    assert difference < TOLERANCE


def test_an_adapter_of_peft_computes_the_same_in_tunix_and_goes_back(case, checkpoint, adapter, tmp_path):
    base, expected = torch_logits(torch_base(checkpoint)), torch_logits(with_adapter(checkpoint, adapter))
    assert np.abs(base - expected).max() > 0.1 * np.abs(base).max()
    model = case.tunix_model(checkpoint)
    assert_same(tunix_logits(model), base)
    delta = jdelta.from_peft(adapter, backbone_model=model, dummy_inputs=tunix_models.inputs())
    assert_same(tunix_logits(model), expected)
    delta.to_peft(tmp_path / "back")
    assert_same(torch_logits(with_adapter(checkpoint, tmp_path / "back")), expected)
    again = jdelta.from_peft(
        tmp_path / "back", backbone_model=case.tunix_model(checkpoint), dummy_inputs=tunix_models.inputs()
    )
    assert again.finetuned().values.keys() == delta.finetuned().values.keys()
    for key, value in delta.finetuned().values.items():
        np.testing.assert_array_equal(again.finetuned().values[key], value)
    delta.detach()
    if not case.lora.keys() & {"modules_to_save", "bias"}:
        assert_same(tunix_logits(model), base)


def test_an_adapter_that_was_made_in_tunix_computes_the_same_in_pytorch(case, checkpoint, tmp_path):
    model = case.tunix_model(checkpoint)
    delta = jdelta.LoraModel(model, lora_r=2, lora_alpha=8, dummy_inputs=tunix_models.inputs())
    _move(delta)
    delta.to_peft(tmp_path / "out")
    assert_same(torch_logits(with_adapter(checkpoint, tmp_path / "out")), tunix_logits(model))


@pytest.mark.parametrize("case", [*CASES.values(), GEMMA_1], ids=[*CASES, "gemma1"])
def test_every_tensor_of_pytorch_is_a_part_of_a_leaf(case):
    model = tunix_models.abstract(case.family, **case.changes)
    leaves = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    parts = [part for found in torch_leaves(type(model), leaves).values() for part in found]
    torch_model = case.torch_model()
    tied = {"lm_head.weight"} if torch_model.config.tie_word_embeddings else set()
    assert sorted(parts) == sorted(torch_model.state_dict().keys() - tied)


REFUSED = {
    "LoRA on an embedding": (
        dataclasses.replace(CASES["llama3"], targets=["embed_tokens"]),
        r"LoRA at 'model\.embed_tokens': in Flax, this module is not called",
    ),
    "a tied embedding that trains apart": (
        dataclasses.replace(CASES["llama3-tied"], targets=["q_proj"], lora={"modules_to_save": ["embed_tokens"]}),
        r"trains the embedding 'model\.embed_tokens\.weight' apart from the head",
    ),
    "half of an einsum": (
        dataclasses.replace(_GEMMA_2, targets=["q_proj"], lora={"modules_to_save": ["v_proj"]}),
        r"holds model\.layers\.\d\.self_attn\.v_proj\.weight and not model\.layers\.\d\.self_attn\.k_proj\.weight",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_tunix_does_not_have_is_refused_and_the_model_is_as_it_was(what, tmp_path):
    case, message = REFUSED[what]
    torch.manual_seed(0)
    case.torch_model().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=list(case.targets), **case.lora)
    peft.get_peft_model(torch_base(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    model = case.tunix_model(tmp_path / "base")
    before = nnx.graphdef(model)
    with pytest.raises(ValueError, match=message):
        jdelta.from_peft(tmp_path / "adapter", backbone_model=model, dummy_inputs=tunix_models.inputs())
    assert nnx.graphdef(model) == before


def test_a_module_that_trains_whole_goes_to_pytorch_in_its_parts(tmp_path):
    case = _GEMMA_2
    torch.manual_seed(0)
    case.torch_model().save_pretrained(tmp_path / "base")
    model = case.tunix_model(tmp_path / "base")
    delta = jdelta.LoraModel(model, modified_modules=["q_einsum"], lora_r=2, dummy_inputs=tunix_models.inputs())
    delta.freeze_module(["deltas", "kv_einsum"])
    _move(delta)
    delta.to_peft(tmp_path / "out")
    assert_same(torch_logits(with_adapter(tmp_path / "base", tmp_path / "out")), tunix_logits(model))
    again = case.tunix_model(tmp_path / "base")
    jdelta.from_peft(tmp_path / "out", backbone_model=again, dummy_inputs=tunix_models.inputs())
    assert_same(tunix_logits(again), tunix_logits(model))
