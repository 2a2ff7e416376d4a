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
from safetensors.numpy import save_file

import jdelta

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
    (folder / "adapter_config.json").write_text(json.dumps(LORA | fields))
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
