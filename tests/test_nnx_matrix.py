"""Every method on every kind of nnx module, on layers in a scan, and on tunix's models.

The rows are printed at the end of the run: how many modules a method changed, or why it makes no sense there.
"""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tunix_models
from flax import nnx
from jax.interpreters.partial_eval import dce_jaxpr
from matrix import FROZEN, METHODS, WEIGHT_METHODS
from nnx_kinds import KINDS
from tiers import breadth

import jdelta

METHODS = {**METHODS, "compacter": (jdelta.CompacterModel, {**METHODS["compacter"][1], "hypercomplex_division": 2})}
ALL = METHODS | WEIGHT_METHODS
CHANGES_AT_ONCE = ("prefix", "soft_prompt", "c3a", "fourierft")
NO_KERNEL, NO_BIAS = "no kernel of its own", "gets a change from it|none of the common names"
NO_NORM, NO_EMBEDDING = "gets a change from it|the method changes modules", "it is no embedding"
NO_FEATURES = {"Conv": "features", "Embed": "features", "experts": "features"}
NO_ATTENTION, NO_TOKENS, TAKES_TOKENS = "computes no attention", "take no token ids", "an array of int32"
# kind -> method -> what the error says; for all others, of every kind, what it says of prefix and soft_prompt
REASONS = {
    **{kind: {"lora": NO_KERNEL} for kind in ("LayerNorm", "RMSNorm", "GroupNorm")},
    "ConvTranspose": {"lora": "transposed convolution"},
    "Embed": {"parallel_adapter": TAKES_TOKENS, "bitfit": NO_BIAS, "soft_prompt": None},
    "MultiHeadAttention": {"lora": NO_KERNEL, "prefix": None},
    "einsum of the user's": {"bitfit": NO_BIAS},
    "experts": {"bitfit": NO_BIAS},
    # its layers hand keys and values to later ones; its tokens are looked up in several tables
    "gemma4": {"prefix": NO_ATTENTION, "soft_prompt": "in several ways"},
}


def reason(kind, method):
    if method == "ln_tuning":
        return None if kind.endswith("Norm") else NO_NORM
    if method == "trainable_tokens":
        return None if kind == "Embed" else reason(kind, "lora") or NO_EMBEDDING
    if method in ("miss_bat", "c3a", "gralora") and kind == "Embed":
        return "7"  # rows are no multiple of their blocks
    if method in ("hra", "oft", "ia3", "road") and kind in NO_FEATURES:
        return NO_FEATURES[kind] if method in ("hra", "oft") or kind == "experts" else None
    if method in WEIGHT_METHODS:
        return reason(kind, "lora")
    return REASONS.get(kind, {}).get(method, {"prefix": NO_ATTENTION, "soft_prompt": NO_TOKENS}.get(method))


def bits(model):
    arrays = [leaf for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    return [np.asarray(leaf).tobytes() for leaf in arrays]


def unreached(model, delta, inputs):
    """The names of leaves that train and on which no output depends. Nothing is computed."""
    graphdef, own, rest = nnx.split(model, delta.filter, ...)
    closed = jax.make_jaxpr(lambda own: nnx.merge(graphdef, own, rest, copy=True)(*inputs))(own)
    floats = [jnp.issubdtype(leaf.aval.dtype, jnp.floating) for leaf in closed.jaxpr.outvars]
    _, used = dce_jaxpr(closed.jaxpr, floats)
    paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(own)]
    return [path for path, is_used in zip(paths, used, strict=True) if not is_used]


def check(model, inputs, method, **where):
    """Attaches a delta and looks at all that has to hold; returns the names of the modules that it is on."""
    cls, arguments = ALL[method]
    before, base = nnx.graphdef(model), bits(model)
    bare = model(*inputs)
    delta = cls(model, dummy_inputs=inputs, **arguments, **where)
    if method not in CHANGES_AT_ONCE:
        chex.assert_trees_all_close(model(*inputs), bare, atol=1e-6)
    trainable = {tuple(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, delta.filter))}
    own = {path for path in delta.paths if path[-1] not in FROZEN.get(method, ())}
    assert trainable >= own
    assert trainable - own == set(delta._state.attachment.unfrozen_backbone)
    assert unreached(model, delta, inputs) == []
    targets = delta.targets
    delta.remove()
    assert nnx.graphdef(model) == before
    assert bits(model) == base
    chex.assert_trees_all_equal(model(*inputs), bare)
    return targets


CASES = [(kind, group) for kind in KINDS for group in ("layers", "weights")]


@pytest.mark.parametrize("kind_and_group", breadth(CASES, ("scan stack", "layers")))
def test_every_method_on_every_kind_of_module(kind_and_group, record_property):
    kind, group = kind_and_group
    case, row = KINDS[kind], {}
    for method, (cls, arguments) in (METHODS if group == "layers" else WEIGHT_METHODS).items():
        model = case.build()
        where = {"modified_modules": [n for n in case.names for _ in range(1 + (method == "parallel_adapter"))]}
        if case.parameter is not None and method in ("lora", *WEIGHT_METHODS):
            where = {"modified_parameters": [case.parameter]}
        if (why := reason(kind, method)) is None:
            found = check(model, (case.x,), method, **where)
            inside = ("host.query", "host.key", "host.value", "host.out")
            wanted = inside if (kind, method) == ("MultiHeadAttention", "bitfit") else case.names
            assert found == ([f"host.{case.parameter}"] if "modified_parameters" in where else list(wanted))
            row[method] = len(found)
        else:
            before = nnx.graphdef(model)
            with pytest.raises((TypeError, ValueError), match=why):
                cls(model, dummy_inputs=(case.x,), **arguments, **where)
            assert nnx.graphdef(model) == before
            row[method] = why
    record_property("matrix", (f"nnx {kind}", row))


POSITIONS = {
    "lora": r"attn\.(q_proj|v_proj|q_einsum|kv_einsum)",
    "adapter": r"attn\.(o_proj|attn_vec_einsum)|mlp\.down_proj",
    "low_rank_adapter": r"attn\.(o_proj|attn_vec_einsum)|mlp\.down_proj",
    "compacter": r"attn\.(o_proj|attn_vec_einsum)|mlp\.down_proj",
    "parallel_adapter": r"attn|mlp(\.down_proj)?",
    "bitfit": r".*",
    "prefix": r"attn",
}


@pytest.mark.tunix
@pytest.mark.parametrize("family", tunix_models.FAMILIES)
def test_every_method_at_its_default_positions_in_tunix(family, record_property):
    inputs, row = tunix_models.inputs(), {}
    model = tunix_models.build(family)
    for method, (cls, arguments) in METHODS.items():
        if (why := REASONS.get(family, {}).get(method)) is not None:
            with pytest.raises((TypeError, ValueError), match=why):
                cls(model, dummy_inputs=inputs, **arguments)
            row[method] = why
            continue
        found = check(model, inputs, method)
        layers = [re.fullmatch(r"layers\.(\d)\.(.*)", name) for name in found]
        if method == "soft_prompt":
            assert found == ["embedder"]
        else:
            assert {match[1] for match in layers if match} == {"0", "1"}
        assert all(re.fullmatch(POSITIONS[method], match[2]) for match in layers if match)
        row[method] = len(found)
    record_property("matrix", (f"tunix {family}", row))
