"""Adapters of PyTorch PEFT go into jdelta and back: the logits stay the same.

The torch model gets random weights, saved and loaded into Flax, and PEFT an adapter with random values, saved as users
save it. Then three numbers are compared: the logits of PEFT, those of the Flax model with `jdelta.from_peft`, and those
of a fresh torch model with what `to_peft` wrote. Torch computes in float64, so that what remains is jax's float32.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers  # so that it finds torch, or is not loaded
import zoo
from flax import linen as nn
from flax.traverse_util import flatten_dict
from parity import TOLERANCE, assert_close, peft, torch
from safetensors.numpy import load_file, save_file

import jdelta
from jdelta.saved import folder, hub

pytestmark = pytest.mark.parity

TOKENS, LENGTH = 3, 7

FAMILIES = {
    "bert": "BertForSequenceClassification",
    "bert-tokens": "BertForTokenClassification",
    "roberta": "RobertaForSequenceClassification",
    "gpt2": "GPT2LMHeadModel",
    "opt": "OPTForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "vit": "ViTForImageClassification",
    "whisper": "WhisperForConditionalGeneration",
    "resnet": "ResNetForImageClassification",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of transformers and an adapter of PEFT on it."""

    family: str
    config: Callable[[], Any]
    extra: int = 0  # positions of the prompt in PEFT's logits


def lora(family: str, *targets: str, **more: Any) -> Case:
    arguments = {"r": 2, "lora_alpha": 8, "target_modules": list(targets), **more}
    return Case(family, lambda: peft.LoraConfig(**arguments))


def prefix(family: str, task: str, **more: Any) -> Case:
    return Case(family, lambda: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=TOKENS, **more))


def prompt(family: str, task: str, extra: int = TOKENS) -> Case:
    def config(**more):  # peft is not imported until it is called
        return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=TOKENS, **more)

    return Case(family, config, extra=extra)


CASES = {
    "bert": lora("bert", "query", "value"),
    "bert-task": lora("bert", "query", task_type="SEQ_CLS"),  # adds the head to modules_to_save
    "bert-bias-all": lora("bert", "query", "word_embeddings", bias="all", modules_to_save=["classifier", "pooler"]),
    "bert-bias-lora-only": lora("bert", "dense", bias="lora_only", exclude_modules=["pooler.dense"]),
    "bert-rslora": lora("bert", "query", "value", use_rslora=True),
    "bert-patterns": lora(
        "bert",
        "query",
        "value",
        "key",
        rank_pattern={"^bert.encoder.layer.0.attention.self.query": 4, "layer.1.*.(query|value)": 3},
        alpha_pattern={"value": 5, r"layer\.0.*key": 0.5},
        use_rslora=True,
    ),
    "roberta": lora("roberta", "query", "dense", modules_to_save=["classifier"]),
    "gpt2": lora("gpt2", "c_attn", "c_proj", "c_fc", fan_in_fan_out=True),
    "gpt2-embeddings": lora("gpt2", "wte", "wpe"),
    "opt": Case("opt", lambda: peft.LoraConfig(r=2, target_modules=r".*decoder.*\.(fc1|q_proj)", modules_to_save=None)),
    "opt-embeddings": lora("opt", "embed_tokens", "q_proj"),  # PEFT then saves the embedding itself too
    "t5": lora("t5", "q", "v", "wo", "lm_head"),
    "bart": lora("bart", "q_proj", "fc2", bias="lora_only"),
    "llama": Case("llama", lambda: peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")),
    "mistral": lora("mistral", "k_proj", "down_proj", layers_to_transform=[1], layers_pattern="layers"),
    "vit": lora("vit", "query", "projection", modules_to_save=["classifier"]),
    "whisper": lora("whisper", "q_proj", "fc1"),
    "llama-prefix": prefix("llama", "CAUSAL_LM"),
    "gpt2-prefix-projection": prefix("gpt2", "CAUSAL_LM", prefix_projection=True, encoder_hidden_size=12),
    "bert-prefix": prefix("bert", "SEQ_CLS"),  # with the head
    "gpt2-prompt": prompt("gpt2", "CAUSAL_LM"),
    "t5-prompt": prompt("t5", "SEQ_2_SEQ_LM", extra=0),
    "llama-prompt": prompt("llama", "CAUSAL_LM"),
    "bert-prompt": prompt("bert-tokens", "TOKEN_CLS"),
    "bert-prompt-pooled": prompt("bert", "SEQ_CLS", extra=0),
    "roberta-prompt-pooled": prompt("roberta", "SEQ_CLS", extra=0),
    "bert-tokens-prefix": prefix("bert-tokens", "TOKEN_CLS"),
    "gpt2-prefix": prefix("gpt2", "CAUSAL_LM"),
    "bert-ranks-above-the-width": lora("bert", target_modules="all-linear", r=4),
    "bert-tokens-all-linear": lora("bert-tokens", target_modules="all-linear", r=4),
}


RESNET = lora("resnet", "convolution", target_modules=r".*layer\.\d\.convolution")


@functools.cache
def models(family: str) -> tuple[Any, Any]:
    """The same weights in torch and in Flax. They are not to be changed."""
    kind = family.partition("-")[0]
    torch.manual_seed(0)
    changes = {"tie_word_embeddings": False} if family == "t5" else {}
    base = getattr(transformers, FAMILIES[family])(zoo.config(kind, **changes)).eval()
    with torch.no_grad():
        for parameter in base.parameters():  # norms and biases begin as constants, which would hide a wrong order
            if parameter.requires_grad:  # sinusoidal positions are no weights in Flax
                parameter.copy_(0.3 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        shape = {"input_shape": (1, 32, 32, 3)} if family == "resnet" else {}
        model = getattr(transformers, "Flax" + FAMILIES[family]).from_pretrained(folder, from_pt=True, **shape)
    base.config._name_or_path = model.config._name_or_path = ""
    return base, model


def inputs(model: Any) -> dict[str, np.ndarray]:
    return {key: np.array(value) for key, value in zoo.inputs(model, length=LENGTH).items()}


def torch_logits(model: Any, given: dict[str, np.ndarray]) -> np.ndarray:
    tensors = {
        key: torch.tensor(value, dtype=None if value.dtype == np.int32 else torch.double)
        for key, value in given.items()
    }
    tensors = {key: value.long() if not value.is_floating_point() else value for key, value in tensors.items()}
    with torch.no_grad():
        return model.double()(**tensors).logits.numpy()


def flax_logits(model: Any, given: dict[str, np.ndarray], params: Any = None) -> np.ndarray:
    params = model.params if params is None else params
    return np.asarray(jax.jit(lambda params: model(**given, params=params).logits)(params))


def randomized(model: Any) -> Any:
    """Everything that trains gets values far from its start: at small ones, differences hide."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def saved(case: Case, folder: Path) -> Any:
    """The torch model with the adapter, which then is in a folder too."""
    wrapped = randomized(peft.get_peft_model(copy.deepcopy(models(case.family)[0]), case.config()).eval())
    wrapped.save_pretrained(folder)
    return wrapped


def attached(case: Case, folder: Path) -> jdelta.DeltaModel:
    """The Flax model's delta, from a folder that PEFT wrote."""
    saved(case, folder)
    return jdelta.from_peft(folder, copy.copy(models(case.family)[1]))


def loaded(family: str, folder: Path) -> Any:
    """A fresh torch model with the adapter; nothing is missing, and nothing is left over."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(models(family)[0]), folder)
    said = [str(warning.message) for warning in caught]
    assert not [text for text in said if "missing" in text or "nexpected" in text]
    tensors = peft.utils.save_and_load.safe_load_file(folder / "adapter_model.safetensors")
    result = peft.set_peft_model_state_dict(wrapped, tensors)
    assert {*result.unexpected_keys} <= {"prompt_embeddings"}  # PEFT puts it in, and lists it all the same
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    return wrapped.eval()


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Of one case: the model with the delta, and logits."""

    case: Case
    delta: jdelta.DeltaModel
    given: dict[str, np.ndarray]
    folder: Path
    bare: np.ndarray
    expected: np.ndarray
    found: np.ndarray


@pytest.fixture(scope="module", params=CASES)
def exchange(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exchange:
    case = CASES[request.param]
    base, model = models(case.family)
    model, given = copy.copy(model), inputs(model)
    folder = tmp_path_factory.mktemp("peft")
    wrapped = saved(case, folder)
    expected = torch_logits(wrapped, given)[:, case.extra :]
    bare = torch_logits(copy.deepcopy(base), given)
    delta = jdelta.from_peft(folder, model)
    found = flax_logits(model, given)  # the very call that PEFT gets
    return Exchange(case, delta, given, folder, bare, expected, found)


def test_an_adapter_of_peft_gives_its_logits(exchange: Exchange) -> None:
    assert_close(exchange.found, exchange.expected, "logits")
    # The comparison says something: the adapter moved the logits by much more than the tolerance.
    assert np.abs(exchange.expected - exchange.bare).max() > 1000 * TOLERANCE * np.abs(exchange.expected).max()


def test_peft_gives_the_logits_of_what_jdelta_writes(exchange: Exchange, tmp_path: Path) -> None:
    exchange.delta.to_peft(tmp_path / "out")
    wrapped = loaded(exchange.case.family, tmp_path / "out")
    found = torch_logits(wrapped, exchange.given)[:, exchange.case.extra :]
    assert_close(exchange.found, found, "logits")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", ["gpt2-prefix", "llama-prefix", "gpt2", "llama"])
def test_peft_generates_the_same_words(case: str, padded: bool, tmp_path: Path) -> None:
    wrapped = saved(CASES[case], tmp_path)
    model = copy.copy(models(CASES[case].family)[1])
    jdelta.from_peft(tmp_path, model)
    ids = np.random.default_rng(0).integers(3, 60, (2, LENGTH))
    mask = np.ones_like(ids)
    if padded:
        ids[1, :2] = mask[1, :2] = 0
    asked = {
        "max_new_tokens": 8,
        "no_repeat_ngram_size": 1,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    with torch.no_grad():
        expected = wrapped.generate(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **asked).numpy()
    found = model.generate(ids, attention_mask=mask, **{**asked, "eos_token_id": 999}).sequences
    assert (np.asarray(found) == expected).all()
    assert len(np.unique(expected[:, LENGTH:])) >= 8  # not one word over and over


@pytest.mark.parametrize("case", ["bert-patterns", "bert-bias-all", "llama-prefix", "bert-prompt"])
def test_what_comes_from_peft_can_be_saved_and_restored(case: str, tmp_path: Path) -> None:
    delta = attached(CASES[case], tmp_path / "peft")
    delta.save_finetuned(tmp_path / "jdelta")
    model = copy.copy(models(CASES[case].family)[1])
    restored = jdelta.AutoDeltaModel.from_finetuned(tmp_path / "jdelta", model, check_hash=False)
    assert restored.config == delta.config
    assert_same_leaves(model.params, delta.backbone_model.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, restored.trainable_mask(), delta.trainable_mask()))


def test_patterns_are_checked_and_copied() -> None:
    ranks = {"query": 4}
    config = jdelta.LoraConfig(lora_r=2, rank_pattern=ranks, alpha_pattern={"0.attention.self.query": 1, "query": 8})
    ranks["query"] = 5
    assert config.to_dict()["rank_pattern"] == {"query": 4}
    config.to_dict()["rank_pattern"]["query"] = 6
    assert {jdelta.AutoDeltaConfig.from_json_string(config.to_json_string())} == {config}
    hosts = ["layer.0.attention.self.query", "layer.1.attention.self.query", "value"]
    assert [(config.rank_of(host), config.scale_of(host)) for host in hosts] == [(4, 0.25), (4, 2), (2, 8)]
    with pytest.raises(ValueError, match=r"rank_pattern\['query'\] is at least 1"):
        jdelta.LoraConfig(rank_pattern={"query": 0})
    with pytest.raises(TypeError, match="rank_pattern is a dict from strings to whole numbers, or None, got"):
        jdelta.LoraConfig(rank_pattern=["query"])  # type: ignore[arg-type]


def test_merging_keeps_the_logits(tmp_path: Path) -> None:
    delta = attached(CASES["bert-patterns"], tmp_path)
    model = delta.backbone_model
    before = flax_logits(model, inputs(model))
    delta.merge()
    assert "lora" not in {key for path in flatten_dict(model.params) for key in path}
    assert_close(flax_logits(model, inputs(model)), before, "logits")


def test_the_layers_of_resnet_have_other_names_in_torch(tmp_path: Path) -> None:
    """The names alone: transformers' two ResNets do not agree, with no delta at all."""
    attached(RESNET, tmp_path / "one").to_peft(tmp_path / "two")
    assert_same_leaves(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")))


# --- from jdelta


def test_a_delta_with_its_head_that_jdelta_trained_goes_to_peft(tmp_path: Path) -> None:
    _, model = models("bert")
    model = copy.copy(model)
    delta = jdelta.LoraModel(
        model, lora_r=2, rank_pattern={"0.attention.self.query": 3}, unfrozen_modules=["classifier"]
    )
    conftest.train_deltas(delta)
    delta.to_peft(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["rank_pattern"] == {r"^bert\.encoder\.layer\.0\.attention\.self\.query": 3}
    assert written["modules_to_save"] == ["classifier"]
    assert written["bias"] == "none"
    assert_close(flax_logits(model, inputs(model)), torch_logits(loaded("bert", tmp_path), inputs(model)), "logits")


def test_an_adapter_of_the_base_model_fits_one_with_a_head(tmp_path: Path) -> None:
    base, model = models("bert")
    alone = copy.deepcopy(base.bert)
    randomized(peft.get_peft_model(alone, CASES["bert-bias-lora-only"].config())).save_pretrained(tmp_path)
    values = jdelta.from_peft(tmp_path, copy.copy(model)).finetuned().values
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    found = values["bert.encoder.layer.1.output.dense.lora.a"]
    assert np.array_equal(found, tensors["base_model.model.encoder.layer.1.output.dense.lora_A.weight"].T)


def test_older_files_name_the_modules_to_save_in_the_middle(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    expected = jdelta.from_peft(adapter, copy.copy(models("bert")[1])).finetuned().values
    older = {key.replace(".classifier.", ".classifier.modules_to_save."): value for key, value in tensors.items()}
    save_file(older, adapter / "adapter_model.safetensors")
    assert_same_leaves(jdelta.from_peft(adapter, copy.copy(models("bert")[1])).finetuned().values, expected)


def test_bfloat16_becomes_what_peft_makes_of_it(adapter: Path, tmp_path: Path) -> None:
    base = copy.deepcopy(models("bert")[0])
    wrapped = peft.PeftModel.from_pretrained(base, adapter).to(torch.bfloat16)
    wrapped.save_pretrained(tmp_path / "half")
    values = jdelta.from_peft(tmp_path / "half", copy.copy(models("bert")[1])).finetuned().values
    own = peft.PeftModel.from_pretrained(copy.deepcopy(models("bert")[0]).float(), tmp_path / "half").state_dict()
    assert {value.dtype for value in values.values()} == {np.dtype(np.float32)}
    for name, value in values.items():
        host, _, letter = name.rpartition(".lora.")
        key = (
            f"{host}.lora_{letter.upper()}.default.weight"
            if host
            else f"classifier.modules_to_save.default.{name[11:]}"
        )
        expected = own[f"base_model.model.{key.replace('kernel', 'weight')}"]
        assert expected.dtype == torch.float32
        assert np.array_equal(value, expected.numpy().T), name


def test_bfloat16_that_is_kept_goes_back_bit_for_bit(adapter: Path, tmp_path: Path) -> None:
    base = copy.deepcopy(models("bert")[0])
    wrapped = peft.PeftModel.from_pretrained(base, adapter).to(torch.bfloat16)
    wrapped.save_pretrained(tmp_path / "half")
    model = copy.copy(models("bert")[1])
    model.params = model.to_bf16(model.params)
    jdelta.from_peft(tmp_path / "half", model, keep_dtype=True).to_peft(tmp_path / "back")
    assert_same_leaves(*(bits(tmp_path / name / "adapter_model.safetensors") for name in ("half", "back")))


def test_a_written_folder_replaces_an_earlier_one_and_leaves_other_files(adapter: Path, tmp_path: Path) -> None:
    delta = jdelta.from_peft(adapter, copy.copy(models("bert")[1]))
    (adapter / "notes.txt").write_text("mine")
    expected = load_file(adapter / "adapter_model.safetensors")
    delta.to_peft(adapter)
    assert_same_leaves(load_file(adapter / "adapter_model.safetensors"), expected)
    assert {path.name for path in adapter.iterdir()} >= {"notes.txt", "adapter_config.json"}
    assert not [path for path in adapter.iterdir() if path.name.startswith(".")]


def test_a_failed_write_changes_nothing(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delta = jdelta.from_peft(adapter, copy.copy(models("bert")[1]))
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}

    def full(file: Path, data: bytes) -> None:
        if file.name == "adapter_config.json":
            raise OSError("no space left")
        file.write_bytes(data)

    monkeypatch.setattr(folder, "write_durably", full)
    with pytest.raises(OSError, match="no space"):
        delta.to_peft(adapter)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_a_replacement_that_is_refused_changes_nothing(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delta = jdelta.from_peft(adapter, copy.copy(models("bert")[1]))
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    replace = os.replace

    def held_open(source: Path, target: Path) -> None:
        if source.name == "new.adapter_model.safetensors":
            raise PermissionError("used by another process")
        replace(source, target)

    monkeypatch.setattr(os, "replace", held_open)
    with pytest.raises(PermissionError, match="another process"):
        delta.to_peft(adapter)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


# --- a hand-built backbone: names as they are, and the tree of gemma.peft


class Heads(nn.Module):
    """What `gemma.peft` puts LoRA on: a dense layer, and projections to heads and back."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(6, name="dense")(x)
        x = nn.DenseGeneral((2, 4), name="to_heads")(x)
        return nn.DenseGeneral(5, axis=(-2, -1), name="from_heads")(x)


def heads() -> jdelta.Backbone:
    x = jnp.ones((2, 3, 5))
    return jdelta.Backbone(Heads(), Heads().init(jax.random.key(0), x)["params"], dummy_inputs=(x,))


def test_leaves_have_the_names_and_shapes_of_gemmas() -> None:
    """As `gemma.peft` 3.3 makes them: `LoRADense`, `LoRADenseGeneral`, and `LoRAEinsum` of `BTD,DNH->BTNH`."""
    delta = jdelta.LoraModel(
        heads(),
        modified_modules=["dense", "to_heads", "from_heads"],
        lora_r=2,
    )
    assert {path: leaf.shape for path, leaf in flatten_dict(delta.shapes()).items()} == {
        ("dense", "lora", "a"): (5, 2),
        ("dense", "lora", "b"): (2, 6),
        ("to_heads", "lora", "a"): (6, 2),
        ("to_heads", "lora", "b"): (2, 2, 4),
        ("from_heads", "lora", "a"): (2, 4, 2),
        ("from_heads", "lora", "b"): (2, 5),
    }


def test_a_tree_of_gemma_computes_as_gemma_does() -> None:
    backbone = heads()
    delta = jdelta.LoraModel(backbone, modified_modules=["to_heads", "from_heads"], lora_r=2, lora_alpha=2)
    tree = conftest.noisy(backbone.params)  # a checkpoint of gemma.peft: the weights with `lora/a` and `lora/b` inside
    x = jax.random.normal(jax.random.key(1), (2, 3, 5))
    y = x @ tree["dense"]["kernel"] + tree["dense"]["bias"]
    up, down = tree["to_heads"], tree["from_heads"]
    z = jnp.einsum("btd,dnh->btnh", y, up["kernel"]) + up["bias"]
    z += jnp.einsum("btd,dr,rnh->btnh", y, up["lora"]["a"], up["lora"]["b"])
    expected = jnp.einsum("btnh,nhd->btd", z, down["kernel"]) + down["bias"]
    expected += jnp.einsum("btnh,nhr,rd->btd", z, down["lora"]["a"], down["lora"]["b"])
    assert delta.attached
    assert_close(backbone(x, params=tree), np.asarray(expected), "output")


def test_heads_are_one_axis_in_torch(tmp_path: Path) -> None:
    class TorchHeads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = torch.nn.Linear(5, 6)
            self.to_heads = torch.nn.Linear(6, 8)
            self.from_heads = torch.nn.Linear(8, 5)

        def forward(self, x: Any) -> Any:
            return self.from_heads(self.to_heads(self.dense(x)))

    backbone, base = heads(), TorchHeads()
    delta = jdelta.LoraModel(backbone, modified_modules=["to_heads", "from_heads"], lora_r=2)
    conftest.train_deltas(delta)
    delta.to_peft(tmp_path)
    for name, layer in base.named_children():
        kernel, bias = (np.array(backbone.params[name][leaf]) for leaf in ("kernel", "bias"))
        layer.weight.data = torch.tensor(kernel.reshape(layer.in_features, -1).T).double()
        layer.bias.data = torch.tensor(bias.reshape(-1)).double()
    x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(base, tmp_path).double()(torch.tensor(x).double()).numpy()
    assert_close(backbone(x), expected, "output")
    again = jdelta.from_peft(tmp_path, heads())
    assert_same_leaves(again.finetuned().values, delta.finetuned().values)


# --- what does not work says why, and changes nothing


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    saved(lora("bert", "query", modules_to_save=["classifier"]), folder)
    return folder


@pytest.fixture
def adapter(original: Path, tmp_path: Path) -> Path:
    """A folder of PEFT that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "adapter"))


def refuses(folder: Any, error: type[Exception], message: str, family: str = "bert") -> None:
    model = copy.copy(models(family)[1])
    module, params = model.module, model.params
    with pytest.raises(error, match=message):
        jdelta.from_peft(folder, model)
    assert model.module is module
    assert model.params is params


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("peft_type", "P_TUNING", r"peft_type='P_TUNING' is not supported\. Supported are: LORA"),
        ("peft_type", ["LORA"], r"peft_type is a string, got \['LORA'\]"),
        ("use_dora", True, "use_dora=True"),
        ("lora_bias", True, "lora_bias=True"),
        ("layer_replication", [[0, 1]], "layer_replication="),
        ("trainable_token_indices", [1, 2], "trainable_token_indices="),
        ("target_parameters", ["experts"], "target_parameters="),
        ("of_the_future", {"a": 1}, "of_the_future="),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights='pissa_niter_4' changed the weights"),
        ("r", "8", "r is a whole number, got '8'"),
        ("r", 4, r"has rank 4 by r and rank_pattern in .*have 2 in lora_A"),
        ("rank_pattern", {"(": 4}, "is not a valid regular expression"),
        ("modules_to_save", "classifier", "modules_to_save is a list of strings, or None, got 'classifier'"),
    ],
)
def test_a_field_that_jdelta_cannot_honour_is_named(adapter: Path, field: str, value: Any, message: str) -> None:
    change(adapter, **{field: value})
    refuses(adapter, ValueError, message)


def test_missing_and_damaged_files(adapter: Path, tmp_path: Path) -> None:
    refuses(tmp_path / "none", FileNotFoundError, "there is no such folder")
    tensors, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    data, text = tensors.read_bytes(), config.read_text()
    tensors.write_bytes(data[: len(data) // 2])
    refuses(adapter, ValueError, "no whole safetensors file")
    tensors.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x02")
    refuses(adapter, FileNotFoundError, r"safetensors is missing; it holds .*adapter_model\.bin is a pickle")
    tensors.write_bytes(data)
    config.write_text(text[: len(text) // 2])
    refuses(adapter, ValueError, "adapter_config.json is no JSON file")
    config.write_text("[]")
    refuses(adapter, ValueError, "adapter_config.json holds no JSON object, but list")
    config.write_text("{}")
    refuses(adapter, ValueError, "has no 'peft_type'")
    config.write_text('{"peft_type": "LORA", "r": 2}')
    refuses(adapter, ValueError, "lacks 'lora_alpha'")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: {k.replace(".layer.1.", ".layer.7."): v for k, v in t.items()}, r"layer\.7\..* lacks\. Closest"),
        (lambda t: {k: v for k, v in t.items() if "layer.1" not in k or "lora_B" not in k}, "there is only lora_A"),
        (lambda t: {k: v[:, :7] if "lora_A" in k else v for k, v in t.items()}, r"has shape \(7, 2\), here \(16, 2\)"),
        (lambda t: {k: v[:1] if "classifier.w" in k else v for k, v in t.items()}, r"classifier.kernel has shape"),
        (lambda t: {k.replace("classifier.bias", "classifier.bush"): v for k, v in t.items()}, "has no such leaf"),
        (lambda t: {k: v for k, v in t.items() if "lora" not in k}, "holds no LoRA"),
    ],
)
def test_tensors_that_do_not_fit(adapter: Path, edit: Callable[[dict], dict], message: str) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in edit(load_file(file)).items()}, file)
    refuses(adapter, ValueError, message)


def test_a_prompt_that_does_not_fit(tmp_path: Path) -> None:
    saved(CASES["gpt2-prefix-projection"], tmp_path)
    change(tmp_path, num_virtual_tokens=4)
    refuses(tmp_path, ValueError, r"prompt_embeddings has shape \(3, 64\)", "gpt2")
    refuses(tmp_path, ValueError, "cross-attention", "t5")
    save_file({"x": np.ones(1)}, tmp_path / "adapter_model.safetensors")
    refuses(tmp_path, ValueError, "lacks 'prompt_embeddings'; it holds x", "gpt2")


def test_an_embedding_trained_apart_from_the_tied_head_is_refused(tmp_path: Path) -> None:
    saved(lora("gpt2", "c_attn", fan_in_fan_out=True, modules_to_save=["wte"]), tmp_path)
    refuses(tmp_path, ValueError, "tie_word_embeddings=False", "gpt2")


def test_a_shared_embedding_that_peft_does_not_run_is_refused(tmp_path: Path) -> None:
    saved(lora("bart", "shared", "q_proj"), tmp_path)
    refuses(tmp_path, ValueError, "changes nothing in PEFT", "bart")
    with pytest.raises(ValueError, match="changes nothing in PEFT"):
        jdelta.LoraModel(copy.copy(models("bart")[1]), modified_modules=["shared"]).to_peft(
            tmp_path / "out", allow_untrained=True
        )
    assert not (tmp_path / "out").exists()


def test_a_model_without_values_is_refused(adapter: Path) -> None:
    model = transformers.FlaxBertForSequenceClassification(models("bert")[1].config, _do_init=False)
    with pytest.raises(ValueError, match="holds no parameters"):
        jdelta.from_peft(adapter, model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: jdelta.AdapterModel(m), "PEFT has no method for 'adapter'"),
        (
            lambda m: jdelta.LoraModel(m, unfrozen_modules=["LayerNorm.scale"]),
            "whole modules .* trains .*LayerNorm.scale",
        ),
        (lambda m: jdelta.LoraModel(m, ["query"], unfrozen_modules=["query"]), "without a delta of their own"),
        (lambda m: jdelta.PrefixModel(m, ["0.attention"], reparameterize=False), "in every attention layer, 2"),
        (lambda m: jdelta.SoftPromptModel(m, soft_token_num=3), "freeze_module.exclude=.'deltas', 'classifier'"),
    ],
)
def test_what_peft_cannot_hold_is_refused(
    make: Callable[[Any], jdelta.DeltaModel], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make(copy.copy(models("bert")[1])).to_peft(tmp_path / "out", allow_untrained=True)
    assert not (tmp_path / "out").exists()


def test_a_repository_of_the_hub_is_asked_for_the_two_files(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        return str(adapter)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    delta = jdelta.from_peft("someone/adapter", copy.copy(models("bert")[1]), name="theirs", revision="v1")
    assert delta.name == "theirs"
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert asked == [("someone/adapter", {"revision": "v1", "allow_patterns": files})]


def change(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def bits(file: Path) -> dict[str, np.ndarray]:
    return {
        key: value.view(torch.int16).numpy() for key, value in peft.utils.save_and_load.safe_load_file(file).items()
    }


def assert_same_leaves(one: Any, other: Any) -> None:
    one, other = flatten_dict(dict(one)), flatten_dict(dict(other))
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        assert np.array_equal(leaf, other[path]), path
