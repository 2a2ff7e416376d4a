"""Methods that change weights have PyTorch PEFT's numbers, from its files and back.

PEFT's model gets random values and is saved as users save it; `from_peft` reads it. Logits, and the gradients of all
that the method trains, agree to 1e-5 of their largest entry: jdelta's gradients are written by `to_peft` too, so that
they have PEFT's names and shapes. Torch computes in float64. A fresh torch model with what `to_peft` wrote of the
values has the same logits. Merging gives them too.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers  # so that it finds torch, or is not loaded
from parity import TOLERANCE, assert_close, loss_of, peft, torch
from safetensors.numpy import load_file

import jdelta
from jdelta.trees import surgery

pytestmark = pytest.mark.parity

CONFIGS = {
    "bert": (
        "BertForSequenceClassification",
        transformers.BertConfig(
            vocab_size=99,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        transformers.GPT2Config(
            vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        ),
    ),
    "llama": (
        "LlamaForCausalLM",
        transformers.LlamaConfig(
            vocab_size=99,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
        ),
    ),
}
IDS = np.random.default_rng(0).integers(1, 99, (2, 10))
MODULES = {"bert": ["query", "value", "output.dense"], "gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "down_proj"]}


@dataclasses.dataclass(frozen=True)
class Case:
    """A method of PEFT's on a model.

    Attributes:
      family: of the model.
      config: makes PEFT's configuration from `target_modules`.
      prefix: what the names of its parameters begin with, in PEFT.
      spread: of the random values that they get.
      merges: whether merging is exact.
    """

    family: str
    config: Callable[..., Any]
    prefix: str
    spread: float = 0.3
    modules: tuple[str, ...] = ()
    merges: bool = True

    def peft_config(self) -> Any:
        return self.config(target_modules=[*(self.modules or MODULES[self.family])])


def lora(family: str, *modules: str, **more: Any) -> Case:
    arguments = {"r": 3, **more}
    return Case(family, lambda **kw: peft.LoraConfig(**arguments, **kw), "lora_", modules=modules)


def oft(family: str, **more: Any) -> Case:
    arguments = {"oft_block_size": 8, **more}
    return Case(family, lambda **kw: peft.OFTConfig(**arguments, **kw), "oft_R")


def ia3(family: str, *modules: str, **more: Any) -> Case:
    return Case(family, lambda **kw: peft.IA3Config(**more, **kw), "ia3_", modules=modules)


RANDLORA = {"r": 6, "randlora_alpha": 3}
DRAWN = {"save_projection": False, "projection_prng_key": 7}  # its matrices are drawn from a seed


def norms(family: str, *modules: str) -> Case:
    return Case(family, lambda **kw: peft.LNTuningConfig(**kw), "ln_tuning_", modules=modules)


def tokens(family: str, *modules: str, **more: Any) -> Case:
    arguments = {"token_indices": [*map(int, IDS[0, :3]), 7, 98], **more}
    return Case(family, lambda **kw: peft.TrainableTokensConfig(**arguments, **kw), "trainable_tokens_", 0.3, modules)


def adalora(family: str, **more: Any) -> Case:
    arguments = {"init_r": 4, "target_r": 2, "total_step": 20, **more}
    return Case(family, lambda **kw: peft.AdaLoraConfig(**arguments, **kw), "lora_")


CASES = {
    "adalora-bert": adalora("bert", lora_alpha=16),
    "adalora-gpt2": adalora("gpt2", fan_in_fan_out=True, tinit=3, deltaT=2),
    "adalora-llama": adalora("llama", bias="lora_only", beta1=0.5),
    "dora-bert": lora("bert", use_dora=True),
    "dora-gpt2": lora("gpt2", use_dora=True, fan_in_fan_out=True),
    "dora-llama": lora("llama", use_dora=True, use_rslora=True),
    "dora-embedding": lora("bert", "word_embeddings", "key", use_dora=True),
    "pissa-bert": lora("bert", init_lora_weights="pissa"),
    "pissa-dora-bert": lora("bert", init_lora_weights="pissa", use_dora=True),
    "olora-llama": lora("llama", init_lora_weights="olora", rank_pattern={"q_proj": 5}, use_rslora=True),
    "hira-bert": Case("bert", lambda **kw: peft.HiraConfig(r=3, **kw), "hira_"),
    "hira-gpt2": Case("gpt2", lambda **kw: peft.HiraConfig(r=3, fan_in_fan_out=True, **kw), "hira_"),
    "hira-llama": Case("llama", lambda **kw: peft.HiraConfig(r=3, **kw), "hira_"),
    "loha-bert": Case("bert", lambda **kw: peft.LoHaConfig(r=3, alpha=5, **kw), "hada_"),
    "loha-patterns-llama": Case(
        "llama",
        lambda **kw: peft.LoHaConfig(
            r=6, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.*down_proj": 3}, init_weights=False, **kw
        ),
        "hada_",
    ),
    "lokr-bert": Case("bert", lambda **kw: peft.LoKrConfig(r=3, alpha=5, **kw), "lokr_"),
    "lokr-full-bert": Case(
        "bert", lambda **kw: peft.LoKrConfig(r=8, decompose_factor=8, init_weights="lycoris", **kw), "lokr_"
    ),
    "lokr-both-llama": Case(
        "llama",
        lambda **kw: peft.LoKrConfig(
            r=2,
            decompose_factor=5,
            decompose_both=True,
            rank_pattern={"q_proj": 1},
            alpha_pattern={"layers.1.*down_proj": 3},
            init_weights=False,
            **kw,
        ),
        "lokr_",
    ),
    "delora-bert": Case("bert", lambda **kw: peft.DeloraConfig(r=3, **kw), "delora_"),
    "delora-patterns-bert": Case(
        "bert",
        lambda **kw: peft.DeloraConfig(
            r=4, rank_pattern={"query": 2}, lambda_pattern={"layer.1.*value": 4.5}, init_weights=False, **kw
        ),
        "delora_",
    ),
    "delora-llama": Case("llama", lambda **kw: peft.DeloraConfig(r=2, delora_lambda=5, **kw), "delora_"),
    "shira-bert": Case("bert", lambda **kw: peft.ShiraConfig(r=3, random_seed=4, **kw), "shira_"),
    "shira-llama": Case("llama", lambda **kw: peft.ShiraConfig(r=2, **kw), "shira_"),
    "c3a-bert": Case("bert", lambda **kw: peft.C3AConfig(block_size=16, **kw), "c3a_", spread=1.0),
    "c3a-llama": Case(
        "llama",
        lambda **kw: peft.C3AConfig(block_size=16, block_size_pattern={"q_proj": 8}, init_weights=True, **kw),
        "c3a_",
        spread=1.0,
    ),
    "fourierft-bert": Case("bert", lambda **kw: peft.FourierFTConfig(n_frequency=20, **kw), "fourierft_"),
    "fourierft-gpt2": Case(
        "gpt2",
        lambda **kw: peft.FourierFTConfig(
            n_frequency=30, scaling=90.0, random_loc_seed=2**40 + 5, init_weights=True, fan_in_fan_out=True, **kw
        ),
        "fourierft_",
        spread=2.0,
    ),
    "fourierft-llama": Case(
        "llama",
        lambda **kw: peft.FourierFTConfig(
            n_frequency=40, n_frequency_pattern={"layers.1.*q_proj": 50, "down_proj": 60}, **kw
        ),
        "fourierft_",
    ),
    "miss-bert": Case("bert", lambda **kw: peft.MissConfig(r=5, **kw), "miss_", spread=0.1),
    "miss-llama": Case("llama", lambda **kw: peft.MissConfig(r=8, bias="MiSS_only", **kw), "miss_"),
    "miss-mini-bert": Case("bert", lambda **kw: peft.MissConfig(r=5, mini_r=4, init_weights="mini", **kw), "miss_"),
    "miss-bat-bert": Case("bert", lambda **kw: peft.MissConfig(r=4, init_weights="bat", **kw), "miss_"),
    "miss-random-llama": Case("llama", lambda **kw: peft.MissConfig(r=3, init_weights=False, **kw), "miss_"),
    "hra-bert": Case("bert", lambda **kw: peft.HRAConfig(r=4, **kw), "hra_"),
    "hra-odd-llama": Case("llama", lambda **kw: peft.HRAConfig(r=5, bias="hra_only", **kw), "hra_"),
    "hra-gs-bert": Case("bert", lambda **kw: peft.HRAConfig(r=4, apply_GS=True, **kw), "hra_"),
    "gralora-bert": Case("bert", lambda **kw: peft.GraloraConfig(r=6, alpha=8, **kw), "gralora_"),
    "gralora-gpt2": Case("gpt2", lambda **kw: peft.GraloraConfig(r=4, alpha=8, fan_in_fan_out=True, **kw), "gralora_"),
    "gralora-hybrid-llama": Case(
        "llama", lambda **kw: peft.GraloraConfig(r=8, alpha=8, hybrid_r=3, gralora_k=4, **kw), "gralora_"
    ),
    "randlora-bert": Case("bert", lambda **kw: peft.RandLoraConfig(**RANDLORA, **kw), "randlora_"),
    "randlora-drawn-bert": Case("bert", lambda **kw: peft.RandLoraConfig(**RANDLORA, **DRAWN, **kw), "randlora_"),
    "randlora-sparse-llama": Case(
        "llama", lambda **kw: peft.RandLoraConfig(sparse=True, **RANDLORA, **DRAWN, **kw), "randlora_"
    ),
    "randlora-very-sparse-gpt2": Case(
        "gpt2",
        lambda **kw: peft.RandLoraConfig(very_sparse=True, fan_in_fan_out=True, **RANDLORA, **DRAWN, **kw),
        "randlora_",
    ),
    "vera-bert": Case("bert", lambda **kw: peft.VeraConfig(r=5, **kw), "vera_lambda_"),
    "vera-drawn-bert": Case("bert", lambda **kw: peft.VeraConfig(r=5, **DRAWN, **kw), "vera_lambda_"),
    "vera-gpt2": Case("gpt2", lambda **kw: peft.VeraConfig(r=5, fan_in_fan_out=True, **kw), "vera_lambda_"),
    "vera-llama": Case("llama", lambda **kw: peft.VeraConfig(r=5, **kw), "vera_lambda_"),
    "oft-bert": oft("bert"),
    "oft-uneven-bert": oft("bert", oft_block_size=32),  # 48 features are two blocks of 24
    "oft-exact-bert": oft("bert", use_cayley_neumann=False, r=4, oft_block_size=0),
    "oft-small-bert": oft("bert", coft=True, eps=0.9, num_cayley_neumann_terms=7),
    "oft-shared-llama": oft("llama", block_share=True, num_cayley_neumann_terms=3, bias="oft_only"),
    "oft-short-llama": oft("llama", num_cayley_neumann_terms=2),
    "ia3-bert": ia3("bert", "key", "value", "output.dense", feedforward_modules=["output.dense"]),
    "ia3-regex-bert": ia3("bert", "query", "output.dense", feedforward_modules=r".*layer\.\d+\.output\.dense"),
    "ia3-random-gpt2": ia3(
        "gpt2", "c_attn", "mlp.c_proj", feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True, init_ia3_weights=False
    ),
    "ia3-defaults-llama": ia3("llama"),
    "ia3-out-llama": ia3("llama", "v_proj", "down_proj", feedforward_modules=[]),
    "ln-tuning-bert": norms("bert", "LayerNorm"),
    "ln-tuning-gpt2": norms("gpt2", "ln_1", "ln_2", "ln_f"),
    "ln-tuning-llama": norms("llama", "input_layernorm", "norm"),
    "tokens-bert": tokens("bert", "word_embeddings"),
    "tokens-tied-gpt2": tokens("gpt2", "wte"),
    "tokens-random-llama": tokens("llama", "embed_tokens", init_weights=False),
    "road-1-bert": Case("bert", lambda **kw: peft.RoadConfig(group_size=8, **kw), "road_"),
    "road-2-bert": Case("bert", lambda **kw: peft.RoadConfig(variant="road_2", group_size=32, **kw), "road_"),
    "road-4-llama": Case("llama", lambda **kw: peft.RoadConfig(variant="road_4", group_size=2, **kw), "road_"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any]]:
    """The torch model and the Flax model of a family, with the same weights; copies of them."""
    made: dict[str, tuple[Any, Any]] = {}

    def of(family: str) -> tuple[Any, Any]:
        if family not in made:
            name, config = CONFIGS[family]
            torch.manual_seed(0)
            base = getattr(transformers, name)(config).eval()
            with torch.no_grad():
                for parameter in base.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            folder = tmp_path_factory.mktemp(family)
            base.save_pretrained(folder)
            made[family] = base, getattr(transformers, f"Flax{name}").from_pretrained(folder, from_pt=True)
        return copy.deepcopy(made[family][0]), copy.copy(made[family][1])

    return of


class Differentiable:
    """C3A's convolution, differentiated by PyTorch: PEFT 0.21 has the gradient of another function of the input."""

    @staticmethod
    def apply(x: Any, w: Any) -> Any:
        x = x.reshape(*x.shape[:-1], *w.shape[1:])
        x = torch.einsum("...nb,mnb->...mb", torch.fft.ifft(x), torch.fft.fft(w))
        return torch.fft.fft(x).real.flatten(-2)


@pytest.fixture(autouse=True)
def mended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.c3a.layer.BlockCircularConvolution", Differentiable)


@pytest.fixture(scope="module", params=CASES)
def both(request: pytest.FixtureRequest, models: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A case, PEFT's model in float64, its folder, and jdelta's delta from that."""
    case = CASES[request.param]
    base, model = models(case.family)
    wrapped = peft.get_peft_model(base, case.peft_config()).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if case.prefix in name and parameter.requires_grad:
                parameter.add_(case.spread * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    wrapped.save_pretrained(folder)
    delta = jdelta.from_peft(folder, model)
    return case, wrapped.double(), folder, delta


def logits_of(wrapped: Any) -> Any:
    return wrapped(input_ids=torch.tensor(IDS)).logits


def test_logits_and_gradients_are_those_of_peft(both: Any, models: Any, tmp_path: Path) -> None:
    case, wrapped, _, delta = both
    model = delta.backbone_model
    expected = logits_of(wrapped)
    bare = logits_of(models(case.family)[0].double()).detach().numpy()
    assert np.abs(expected.detach().numpy() - bare).max() > 1000 * TOLERANCE * np.abs(bare).max()
    wrapped.zero_grad()
    loss_of(expected).backward()

    trains, frozen = delta.partition()

    def loss(trains: Any) -> tuple[jax.Array, jax.Array]:
        logits = model(IDS, params=jdelta.combine(trains, frozen)).logits
        return loss_of(logits), logits

    (_, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trains)
    assert_close(found, expected.detach().numpy(), "logits")

    delta.to_peft(tmp_path, jdelta.combine(grads, frozen))
    written = load_file(tmp_path / "adapter_model.safetensors")
    theirs = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in wrapped.named_parameters()
        if parameter.grad is not None and case.prefix in name
    }
    assert len(theirs) == len(surgery.flatten(delta.partition()[0]))
    scalars: dict[str, list[tuple[Any, Any]]] = {}
    for name, gradient in theirs.items():
        ours = written[name if name in written else name.removesuffix(".weight")]
        if ours.shape != gradient.shape:  # what starts with a part of the weight is written with its start behind it
            ours = ours[tuple(map(slice, gradient.shape))]
        if gradient.size == 1:  # a sum that may cancel has no precision of its own
            scalars.setdefault(name.rpartition(".")[2], []).append((ours.item(), gradient.item()))
        else:
            assert_close(ours, gradient, name)
    for kind, found_and_expected in scalars.items():
        assert_close(*map(np.array, zip(*found_and_expected, strict=True)), f"{kind} of all modules")


def test_peft_computes_the_same_with_what_is_written(both: Any, models: Any, tmp_path: Path) -> None:
    case, wrapped, folder, delta = both
    delta.to_peft(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = peft.PeftModel.from_pretrained(models(case.family)[0], tmp_path).eval()
    said = [str(warning.message) for warning in caught]
    assert not [text for text in said if "missing" in text or "nexpected" in text]
    assert_close(logits_of(again.double()).detach().numpy(), logits_of(wrapped).detach().numpy(), "logits")
    ours, theirs = (json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path, folder))
    assert ours.keys() <= theirs.keys()


def test_merged_and_saved_it_computes_the_same(both: Any, models: Any, tmp_path: Path) -> None:
    case, wrapped, _, delta = both
    expected = logits_of(wrapped).detach().numpy()
    delta.save_finetuned(tmp_path / "saved")
    model = models(case.family)[1]
    restored = jdelta.AutoDeltaModel.from_finetuned(tmp_path / "saved", model)
    assert restored.config == delta.config
    assert_close(jax.jit(lambda params: model(IDS, params=params).logits)(model.params), expected, "restored")
    if case.merges:
        restored.merge()
        assert_close(jax.jit(lambda params: model(IDS, params=params).logits)(model.params), expected, "merged")
    else:
        with pytest.raises(ValueError, match="merge"):
            restored.merge()


def test_an_option_that_is_not_known_is_refused(both: Any, models: Any, tmp_path: Path) -> None:
    case, _, folder, _ = both
    fields = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "of_the_future": 3}))
    (tmp_path / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    model = models(case.family)[1]
    with pytest.raises(ValueError, match="of_the_future=3 is an unsupported option"):
        jdelta.from_peft(tmp_path, model)
    assert jnp.array_equal(jax.tree.leaves(model.params)[0], jax.tree.leaves(models(case.family)[1].params)[0])
