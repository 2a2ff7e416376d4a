"""LoRA starts from data as in PyTorch PEFT: its own EVA, CorDA and LoRA-GA on the same model and batches."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import transformers  # so that it finds torch, or is not loaded
from parity import Late, assert_close, loss_of, peft, torch

import jdelta
from jdelta.trees import surgery

pytestmark = pytest.mark.parity

of_lora = Late("peft.tuners.lora.config")
of_corda, of_lora_ga = Late("peft.tuners.lora.corda"), Late("peft.tuners.lora.loraga")

SMALL = {"vocab_size": 99, "num_attention_heads": 4, "num_hidden_layers": 2}
FAMILIES = {
    "bert": (
        "BertForSequenceClassification",
        lambda: transformers.BertConfig(
            **SMALL, hidden_size=32, intermediate_size=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ),
        ["query", "key", "attention.output.dense", "intermediate.dense"],
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        ),
        ["c_attn", "c_fc"],
    ),
    "llama": (
        "LlamaForCausalLM",
        lambda: transformers.LlamaConfig(
            **SMALL, num_key_value_heads=2, hidden_size=32, intermediate_size=48, max_position_embeddings=64
        ),
        ["q_proj", "v_proj", "up_proj", "down_proj"],
    ),
}
RNG = np.random.default_rng(0)
IDS = RNG.integers(1, 99, (2, 30))
MASK = np.ones_like(IDS)
MASK[0, 20:] = 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any, list[str]]]:
    """The torch model and the Flax model of a family, with the same weights, and modules of them."""
    made: dict[str, Any] = {}

    def of(family: str) -> tuple[Any, Any, list[str]]:
        name, config, modules = FAMILIES[family]
        if family not in made:
            torch.manual_seed(0)
            base = getattr(transformers, name)(config()).eval()
            with torch.no_grad():
                for parameter in base.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            folder = tmp_path_factory.mktemp(family)
            base.save_pretrained(folder)
            made[family] = base, getattr(transformers, f"Flax{name}").from_pretrained(folder, from_pt=True)
        base, model = made[family]
        return copy.deepcopy(base), copy.copy(model), list(modules)

    return of


def batch_of(**arrays: Any) -> dict[str, Any]:
    return {key: torch.tensor(value) for key, value in arrays.items()}


def theirs_of(wrapped: Any, model: Any, tmp_path: Any) -> tuple[Any, dict[str, Any]]:
    """What PEFT has, as jdelta reads it: the configuration, and `a` and `b` by module."""
    wrapped.peft_config["default"].init_lora_weights = True  # so that the factors are read as they are
    wrapped.save_pretrained(tmp_path)
    model = copy.copy(model)
    delta = jdelta.from_peft(tmp_path, model)
    return delta.config, factors_of(delta, model)


def factors_of(delta: Any, model: Any) -> dict[str, Any]:
    leaves = surgery.parameters_of(model.params)
    at = [name.split(".") for name in delta.targets]
    return {
        ".".join(host): {key: np.asarray(leaves[(*host, delta.name, key)]) for key in "ab"} for host in map(tuple, at)
    }


@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_eva(family: str, whiten: bool, rho: float, models: Any, tmp_path: Any) -> None:
    base, model, modules = models(family)
    if whiten and "key" in modules:
        modules.remove("key")  # PEFT whitens once for each module that has the same inputs
    eva = peft.EvaConfig(rho=rho, whiten=whiten)
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=modules, init_lora_weights="eva", eva_config=eva)
    if family == "gpt2":
        config.fan_in_fan_out = True
    wrapped = peft.get_peft_model(base, config)
    batch = batch_of(input_ids=IDS, attention_mask=MASK)
    peft.initialize_lora_eva_weights(wrapped, [batch], show_progress_bar=False)
    theirs, factors = theirs_of(wrapped, model, tmp_path)

    delta = jdelta.LoraModel(model, modules, lora_r=8, lora_alpha=8, init_lora_weights="eva")
    ours = {"input_ids": IDS, "attention_mask": MASK}
    delta.init_from_data([ours, ours], rho=rho, whiten=whiten)  # as PEFT reads it, to see that nothing changes any more
    ours = factors_of(delta, model)
    assert ours.keys() == factors.keys()
    for host, found in ours.items():
        assert delta.config.rank_of(host) == theirs.rank_of(host)
        assert delta.config.scale_of(host) == pytest.approx(theirs.scale_of(host))
        a, b = (x / np.linalg.norm(x, axis=0) for x in (found["a"], factors[host]["a"]))
        assert np.linalg.svd(a.T @ b)[1].min() > 1 - 1e-3  # angles of what they span; PEFT's SVDs are random
        if rho == 2:  # and there it takes 32 of 32 vectors, and is exact
            np.testing.assert_allclose(found["a"], factors[host]["a"], atol=2e-3 * np.abs(found["a"]).max())


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_corda(family: str, mode: str, models: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "attr", dataclasses)  # PEFT 0.21 takes `dataclass` of it and does not require it
    base, model, modules = models(family)
    config = peft.LoraConfig(
        r=4, target_modules=modules, init_lora_weights="corda", corda_config=of_lora.CordaConfig(corda_method=mode)
    )
    if family == "gpt2":
        config.fan_in_fan_out = True
    rows = [IDS[:1], IDS[1:], IDS[:1, ::-1].copy()]  # PEFT takes one row at a time
    of_corda.preprocess_corda(base, config, run_model=lambda: [base(torch.tensor(row)) for row in rows])
    _, factors = theirs_of(peft.get_peft_model(base, config), model, tmp_path)

    delta = jdelta.LoraModel(model, modules, lora_r=4, lora_alpha=8, init_lora_weights="corda")
    before = model(IDS).logits
    delta.init_from_data([{"input_ids": row} for row in rows], mode=mode)
    for host, found in factors_of(delta, model).items():
        want = factors[host]["a"] @ factors[host]["b"]
        assert np.abs(found["a"] @ found["b"] - want).max() < 2e-3 * np.abs(want).max(), host
    assert_close(model(IDS).logits, np.asarray(before), "logits")


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("scale", ["stable", "unit", "gd_scale", "weight_svd"])
def test_lora_ga(scale: str, direction: str, models: Any, tmp_path: Any) -> None:
    base, model, modules = models("llama")
    ga = peft.LoraGAConfig(direction=direction, scale=scale)
    config = peft.LoraConfig(r=8, target_modules=modules, init_lora_weights="lora_ga", lora_ga_config=ga)
    halves = [IDS[:, :15], IDS[:, 15:]]

    def train_step() -> None:
        for ids in halves:
            loss_of(base(torch.tensor(ids)).logits).backward()

    of_lora_ga.preprocess_loraga(base, config, train_step)
    _, factors = theirs_of(peft.get_peft_model(base, config), model, tmp_path)

    delta = jdelta.LoraModel(model, modules, lora_r=8, lora_alpha=8, init_lora_weights="lora_ga")
    delta.init_from_data(
        halves, lambda params, ids: loss_of(model(ids, params=params).logits), direction=direction, scale=scale
    )
    rtol = 5e-2 if scale == "weight_svd" else 1e-3  # of the weight, PEFT's SVD is random
    for host, found in factors_of(delta, model).items():
        for key, axis in (("a", 0), ("b", 1)):
            theirs, norms = factors[host][key], np.linalg.norm(found[key], axis=axis)
            np.testing.assert_allclose(norms, np.linalg.norm(theirs, axis=axis), rtol=rtol, err_msg=host)
            cosines = np.sum(found[key] * theirs, axis=axis) / norms / np.linalg.norm(theirs, axis=axis)
            assert np.abs(np.abs(cosines) - 1).max() < 1e-3, host  # singular vectors have no sign


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga"])
def test_a_started_delta_is_exchanged_both_ways(start: str, models: Any, tmp_path: Any) -> None:
    base, model, modules = models("bert")
    delta = jdelta.LoraModel(model, modules, lora_r=4, init_lora_weights=start)
    loss = (lambda p, b: loss_of(model(**b, params=p).logits)) if start == "lora_ga" else None
    delta.init_from_data([{"input_ids": IDS}], loss)
    trains, frozen = delta.partition()
    draw = np.random.default_rng(1)
    moved = surgery.unflatten({k: v + draw.normal(0, 0.2, v.shape) for k, v in surgery.flatten(trains).items()})
    model.params = delta.combine(moved, frozen)
    want = np.asarray(model(IDS).logits)
    delta.to_peft(tmp_path)
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path).eval().double()
    assert_close(wrapped(torch.tensor(IDS)).logits.detach().numpy(), want, "PEFT's logits")
    again = models("bert")[1]
    read = jdelta.from_peft(tmp_path, again)
    assert read.config.init_lora_weights is True
    assert_close(jnp.asarray(again(IDS).logits), want, "read again")
