"""Folders in PEFT's format that are written by hand: what `from_peft` makes of them, without PyTorch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh, train_deltas
from flax import linen as nn
from safetensors.numpy import save_file

import jdelta
from jdelta.hosts.adapting import adapt
from jdelta.saved.peft.keys import normalized
from jdelta.saved.peft.names import Names

BERT = "FlaxBertForSequenceClassification"
QUERY = "bert.encoder.layer.{}.attention.self.query"
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["classifier"]}


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """LoRA on BERT's queries, and its classifier, as PEFT writes them."""
    rng = np.random.default_rng(seed)
    shapes = {f"{QUERY.format(i)}.lora_{x}.weight": s for i in range(2) for x, s in (("A", (2, 16)), ("B", (16, 2)))}
    shapes |= {"classifier.weight": (2, 16), "classifier.bias": (2,)}
    return {f"base_model.model.{k}": rng.normal(0, 0.3, s).astype(np.float32) for k, s in shapes.items()}


def written(folder: Path, values: Mapping[str, np.ndarray], **fields: Any) -> Path:
    """A folder as PEFT saves one."""
    folder.mkdir(exist_ok=True)
    fields = fields if "peft_type" in fields else LORA | fields
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file({key: np.ascontiguousarray(value) for key, value in values.items()}, folder / "adapter_model.safetensors")
    return folder


def cast(values: Mapping[str, np.ndarray], dtype: Any) -> dict[str, np.ndarray]:
    return {key: value.astype(dtype) for key, value in values.items()}


# --- dtypes


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_leaves_of_half_precision_become_float32_and_the_classifier_keeps_the_models(
    tmp_path: Path, dtype: Any
) -> None:
    model = fresh("bert", BERT)
    half = cast(tensors(), dtype)
    delta = jdelta.from_peft(written(tmp_path, half), model)
    values = delta.finetuned().values
    assert {value.dtype for value in values.values()} == {np.dtype(np.float32)}
    expected = half[f"base_model.model.{QUERY.format(0)}.lora_A.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(values[f"{QUERY.format(0)}.lora.a"], expected)
    assert model.params["classifier"]["kernel"].dtype == jnp.float32


def test_the_dtype_of_the_file_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    model = fresh("bert", BERT)
    half = cast(tensors(), jnp.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta = jdelta.from_peft(written(tmp_path, half), model, keep_dtype=True)
    values = delta.finetuned().values
    dtypes = {key.rpartition(".")[2]: value.dtype for key, value in values.items()}
    assert dtypes == {"a": jnp.bfloat16, "b": jnp.bfloat16, "kernel": np.float32, "bias": np.float32}
    expected = half[f"base_model.model.{QUERY.format(1)}.lora_B.weight"].T
    np.testing.assert_array_equal(values[f"{QUERY.format(1)}.lora.b"], expected)


def test_the_backbones_own_leaves_keep_its_dtype_and_rounding_is_a_warning(tmp_path: Path) -> None:
    model = fresh("bert", BERT)
    model.params = model.to_bf16(model.params)
    with pytest.warns(UserWarning, match=r"rounds what is saved of classifier\.\w+ \(float32 to bfloat16\)"):
        delta = jdelta.from_peft(written(tmp_path, tensors()), model)
    dtypes = {key.rpartition(".")[2]: value.dtype for key, value in delta.finetuned().values.items()}
    assert dtypes == {"a": np.float32, "b": np.float32, "kernel": jnp.bfloat16, "bias": jnp.bfloat16}


def test_what_is_no_float_is_no_adapter(tmp_path: Path) -> None:
    model = fresh("bert", BERT)
    params = model.params
    with pytest.raises(ValueError, match="is int8, and no float"):
        jdelta.from_peft(written(tmp_path, cast(tensors(), np.int8)), model)
    assert model.params is params


def test_a_saved_delta_of_a_narrower_dtype_is_a_warning_and_keeps_its_bits() -> None:
    model = fresh("bert", BERT)
    delta = jdelta.LoraModel(model, ["query"], lora_r=2)
    train_deltas(delta)
    found = delta.finetuned()
    half = jdelta.Finetuned(**{**vars(found), "values": cast(found.values, jnp.bfloat16)})
    with pytest.warns(UserWarning, match=r"narrower dtype.*lora\.a \(bfloat16 in place of float32\)"):
        delta.load_finetuned(half, check_hash=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(delta.own(model.params))} == {jnp.dtype(jnp.bfloat16)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta.load_finetuned(found, check_hash=False)  # wider loses nothing


# --- keys

NAMED = {".lora_A.": ".lora_A.default.", ".lora_B.": ".lora_B.default."}


def renamed(values: Mapping[str, np.ndarray], changes: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The values by keys with something else in them; a change of `""` goes to the front."""

    def key(old: str) -> str:
        for before, after in changes.items():
            old = old.replace(before, after) if before else after + old
        return old

    return {key(old): value for old, value in values.items()}


@pytest.mark.parametrize(
    "changes",
    {
        "name": NAMED,
        "name-of-the-classifier": {**NAMED, ".classifier.": ".classifier.modules_to_save.default."},
        "named-classifier-alone": {".classifier.": ".classifier.modules_to_save.default."},
        "older": {".classifier.": ".classifier.modules_to_save."},
        "compiled": {"": "_orig_mod."},
        "compiled-inside": {"base_model.model.": "base_model.model._orig_mod."},
        "compiled-layers": {".attention.": "._orig_mod.attention."},
        "compiled-hosts": {".query.": ".query._orig_mod."},
        "data-parallel": {"": "module."},
        "data-parallel-inside": {"base_model.model.": "base_model.model.module."},
        "both": {**NAMED, "": "module._orig_mod."},
        "doubled": {"": "base_model.model."},
        "base-model-twice": {"": "base_model."},
        "absent": {"base_model.model.": ""},
        "wrapped-and-absent": {"base_model.model.": "module."},
        "everything": {**NAMED, ".attention.": ".module.attention.", "": "_orig_mod.base_model.model.module."},
        "without-the-head's-prefix": {"base_model.model.bert.": "base_model.model."},
    }.items(),
    ids=lambda change: change[0],
)
def test_names_and_wrappers_in_the_keys_are_read_past(changes: tuple[str, dict[str, str]]) -> None:
    model, plain = fresh("bert", BERT), tensors()
    names = Names.of(adapt(model).structure(), model.base_model_prefix)
    found = normalized(renamed(plain, changes[1]), "base_model.model.", names)
    found = {key.replace(".modules_to_save.", "."): value for key, value in found.items()}
    found = {key if key.startswith(("bert.", "classifier.")) else f"bert.{key}": v for key, v in found.items()}
    assert found.keys() == {key.removeprefix("base_model.model.") for key in plain}
    for key, value in found.items():
        assert value is plain[f"base_model.model.{key}"]


def test_a_file_with_names_and_wrappers_in_its_keys_becomes_a_delta(tmp_path: Path) -> None:
    plain, everything = tensors(), {**NAMED, ".classifier.": ".classifier.modules_to_save.default.", "": "module."}
    found = jdelta.from_peft(written(tmp_path, renamed(plain, everything)), fresh("bert", BERT)).finetuned().values
    for i in range(2):
        expected = plain[f"base_model.model.{QUERY.format(i)}.lora_A.weight"].T
        np.testing.assert_array_equal(found[f"{QUERY.format(i)}.lora.a"], expected)
    np.testing.assert_array_equal(found["classifier.kernel"], plain["base_model.model.classifier.weight"].T)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda t: renamed(t, NAMED) | renamed(t, {k: v.replace("default", "other") for k, v in NAMED.items()}),
            r"holds 2 adapters: 'default', 'other'\. Save one alone",
        ),
        (lambda t: t | renamed(t, NAMED), "holds 2 adapters: 'default', one without a name"),
        (
            lambda t: renamed(t, NAMED | {".classifier.": ".classifier.modules_to_save.other."}),
            "holds 2 adapters: 'default', 'other'",
        ),
        (lambda t: t | renamed(t, {".attention.": "._orig_mod.attention."}), "two keys of the file mean"),
        (
            lambda t: renamed(t, {".lora_A.": ".lora_X.", ".lora_B.": ".lora_Y."}),
            "holds no LoRA: .*It holds",
        ),
    ],
)
def test_keys_that_may_mean_two_things_are_refused(tmp_path: Path, make: Any, message: str) -> None:
    model = fresh("bert", BERT)
    params = model.params
    with pytest.raises(ValueError, match=message):
        jdelta.from_peft(written(tmp_path, make(tensors())), model)
    assert model.params is params


class Pair(nn.Module):
    """A dense layer, one in something that is called `module`, and one in something inside that."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        class Inner(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                return nn.Dense(4, name="dense")(nn.Dense(4, name="module")(x))

        return Inner(name="module")(nn.Dense(4, name="dense")(x))


@pytest.mark.parametrize("lead", ["base_model.model.", "module.base_model.model.", "", "module.", "module._orig_mod."])
def test_modules_whose_own_name_is_that_of_a_wrapper_keep_it(tmp_path: Path, lead: str) -> None:
    x = jnp.ones((1, 4))
    rng = np.random.default_rng(0)
    hosts = ["dense", "module.dense", "module.module"]
    values = {f"{lead}{h}.lora_{i}.weight": rng.normal(size=s).astype("f4") for h in hosts for i, s in SQUARE.items()}
    model = jdelta.Backbone(Pair(), Pair().init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
    found = jdelta.from_peft(written(tmp_path, values, modules_to_save=None), model).finetuned().values
    for host in hosts:
        np.testing.assert_array_equal(found[f"{host}.lora.a"], values[f"{lead}{host}.lora_A.weight"].T)


SQUARE = {"A": (2, 4), "B": (4, 2)}


def test_a_prompts_key_is_read_past_wrappers(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    head = {key: value for key, value in tensors().items() if "classifier" in key}
    fields = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "modules_to_save": ["classifier"]}
    for prompt, lead in (
        ("prompt_embeddings", "base_model."),
        ("module.prompt_embeddings", "module.base_model."),
        ("base_model.prompt_embeddings", "base_model."),
        ("_orig_mod.prompt_encoder.default.embedding.weight", "_orig_mod.base_model."),
    ):
        values = {prompt: rows} | renamed(head, {"base_model.model.": lead})
        found = jdelta.from_peft(written(tmp_path, values, **fields), fresh("bert", BERT)).finetuned().values
        np.testing.assert_array_equal(found["bert.embeddings.word_embeddings.soft_prompt.embedding"], rows)
        np.testing.assert_array_equal(found["classifier.kernel"], head["base_model.model.classifier.weight"].T)
