"""tunix's models have common names, and the names of PyTorch's by which tunix itself reads their checkpoints."""

import importlib

import pytest
import tunix_models
from flax import nnx

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
