"""tunix's models have common names, and the names of PyTorch's by which tunix itself reads their checkpoints."""

import functools
import importlib

import pytest
import tunix_models
from flax import nnx

import jdelta
from jdelta.core.linear import linear_map
from jdelta.hosts.adapting import adapt
from jdelta.names import common_names
from jdelta.names.decoders import DECODERS
from jdelta.names.table import as_tuple
from jdelta.saved.peft.torch_leaves import torch_leaves

pytestmark = pytest.mark.tunix

# tunix's loader reads of Gemma only what Gemma 2 has.
READ = {
    "gemma2": ("gemma", {}),
    "gemma2-one-einsum": ("gemma", {"num_kv_heads": 4}),
    "gemma3": ("gemma3", {}),
    "gemma4": ("gemma4", {}),
    "gemma4-keys-are-values": ("gemma4", {"k_eq_v_global": True}),
    "llama3": ("llama3", {}),
    "llama3-tied": ("llama3", {"weight_tying": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


def leaves_of(model):
    return [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]


@pytest.mark.parametrize("case", READ)
def test_the_names_in_pytorch_are_those_that_the_loader_of_tunix_maps_to_the_leaf(case):
    family, changes = READ[case]
    model = tunix_models.abstract(family, **changes)
    found = torch_leaves(type(model), leaves_of(model))
    loose = {"skip_scale", "per_layer_input_embedding"}
    assert found.keys() == {leaf for leaf in leaves_of(model) if leaf.rpartition(".")[2] not in loose}
    name = f"tunix.models.{family}.params" + ("_safetensors" if family.startswith("gemma") else "")
    mapping = importlib.import_module(name)._get_key_and_transform_mapping(tunix_models.config(family, **changes))
    rename = importlib.import_module("tunix.utils.torch_utils").torch_key_to_jax_key
    for leaf, parts in found.items():
        for part in parts:
            read, _ = rename(mapping, part)
            letter = part[-len("q_proj.weight")]
            fused = f"tmp.{leaf.rpartition('.attn.')[0]}.attn.{letter}"  # stacked with its neighbours afterwards
            assert read == (fused if read.startswith("tmp.") else leaf)


def test_other_classes_of_the_same_name_have_their_own_names():
    assert torch_leaves(type("Llama3", (), {}), ["lm_head.w"]) is None


# --- common names

_MOE = {"num_experts": 4, "num_experts_per_tok": 2}
CASES = READ | {
    "gemma1": ("gemma", {"use_post_attn_norm": False, "use_post_ffw_norm": False, "num_kv_heads": 1}),
    "gemma4-experts": ("gemma4", {"enable_moe": True, "expert_dim": 8, **_MOE}),
    "gemma4-shared-keys": ("gemma4", {"frac_shared_layers": 0.5}),
    "qwen3-experts": ("qwen3", _MOE),
}
HEADS, KEYS, WIDTH, HIDDEN = 32, 16, 16, 32  # all heads of queries, and of keys


@functools.cache
def structure_of(case):
    family, changes = CASES[case]
    return adapt(tunix_models.abstract(family, **changes), tunix_models.inputs()).structure()


def sizes(info):
    """`(d_in, d_out)` of a linear module."""
    linear = linear_map(info)
    shape = info.params[linear.weights].shape
    return linear.layout(shape).matrix_shape(shape)


@pytest.mark.parametrize("case", CASES)
def test_a_name_means_modules_that_do_what_it_says(case):
    structure = structure_of(case)

    def named(name):
        return common_names.known(structure, [name])

    fused = case == "gemma2-one-einsum"
    keys = {"gemma1": KEYS // 2, "gemma2-one-einsum": HEADS}.get(case, KEYS)
    assert [info.name for info in named("attn")] == ["layers.0.attn", "layers.1.attn"]
    assert [sizes(info) for info in named("attn.q")] == 2 * [(WIDTH, HEADS + (2 * keys if fused else 0))]
    assert [sizes(info) for info in named("attn.proj")] == 2 * [(HEADS, WIDTH)]
    wide = [(WIDTH, keys if "kv_einsum" not in info.name else 2 * keys) for info in named("attn.k")]
    assert [sizes(info) for info in named("attn.k")] == (wide if not fused else [sizes(i) for i in named("attn.q")])
    assert len(wide) == len(named("attn.v")) == (1 if case == "gemma4-shared-keys" else 2)
    same = [a.name == b.name for a, b in zip(named("attn.k"), named("attn.v"), strict=True)]
    assert all(same) == ("gemma" in case)
    assert len(named("ff")) == 2
    linears = 0 if case == "qwen3-experts" else 2  # whose experts are parameters of one module
    assert [sizes(info) for info in named("ff.w1")] == 2 * linears * [(WIDTH, HIDDEN)]
    assert [sizes(info) for info in named("ff.w2")] == linears * [(HIDDEN, WIDTH)]
    norms = named("layer_norm")
    assert {info.type.__name__ for info in norms} == {"RMSNorm"}
    assert len(norms) == 1 + 2 * (4 if "gemma" in case and case != "gemma1" else 2)
    assert norms[-1].name == "final_norm"
    assert [info.name for info in named("lm_head.proj")] == ([] if "gemma" in case or "tied" in case else ["lm_head"])


def test_no_entry_for_tunix_is_dead():
    seen, wanted = set(), set()
    for case in CASES:
        structure = structure_of(case)
        there = {*structure.modules, *structure.uncalled}
        for info in structure:
            block = f"{info.type.__module__}.{info.type.__qualname__}"
            entries = {(block, key, path) for key, paths in DECODERS.get(block, {}).items() for path in as_tuple(paths)}
            wanted |= entries
            seen |= {entry for entry in entries if ".".join((*info.path, entry[2])) in there}
    # Gemma 1 and 2 have one name of a norm, Gemma 3 and 4 another, and k_einsum and qkv_einsum are not in all of them
    by_path = {(key, path) for _, key, path in seen}
    assert {(key, path) for _, key, path in wanted} == by_path
    assert {block for block, _, _ in seen} == {name for name in DECODERS if name.startswith("tunix.")}


@pytest.mark.parametrize("family", tunix_models.FAMILIES)
def test_default_positions_are_found(family):
    delta = jdelta.LoraModel(tunix_models.build(family), lora_r=2, dummy_inputs=tunix_models.inputs())
    ends = ("q_einsum", "kv_einsum") if "gemma" in family else ("q_proj", "v_proj")
    assert delta.targets == [f"layers.{i}.attn.{end}" for i in range(2) for end in ends]
