"""Modules that share a scope, or run by other methods than `__call__`, or return their output in another place.

Google's gemma has them all: its feed-forward's two einsums share one scope, its embedder is run by `encode` and
`decode`, its attention returns `(cache, y)`, and it makes every parameter in a dtype of its own.
"""

from typing import Any, NamedTuple
from unittest import mock

import chex
import flax
import jax
import jax.numpy as jnp
import pytest
from conftest import noisy, train_deltas
from flax import linen as nn
from flax import nnx
from tiers import breadth

import jdelta

IDS = jnp.array([[1, 2, 3], [4, 5, 6]])


class Einsum(nn.Module):
    shape: tuple[int, ...]
    weight_name: str = "w"

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param(self.weight_name, nn.initializers.normal(), self.shape))


class FeedForward(nn.Module):
    @nn.compact
    def __call__(self, x):
        gating = Einsum((2, 4, 6), "gating")
        nn.share_scope(self, gating)
        gate = gating("...F,NFH->...NH", x)
        linear = Einsum((6, 4), "linear")
        nn.share_scope(self, linear)
        return linear("...H,HF->...F", nn.gelu(gate[..., 0, :]) * gate[..., 1, :])


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, cache=None):
        q = Einsum((2, 4, 3), name="q_einsum")("BTD,NDH->BTNH", x)
        k, v = Einsum((2, 2, 4, 3), name="kv_einsum")("BSD,CKDH->CBSKH", x)
        weights = nn.softmax(jnp.einsum("BTNH,BSNH->BNTS", q, k))
        y = Einsum((2, 3, 4), name="out_einsum")("BTNH,NHD->BTD", jnp.einsum("BNTS,BSNH->BTNH", weights, v))
        return None if cache is None else {"k": k, "v": v}, y


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, cache=None):
        cache, y = Attention(name="attn")(nn.LayerNorm(name="norm_1")(x), cache)
        return cache, x + y + FeedForward(name="mlp")(nn.LayerNorm(name="norm_2")(x))


class Embedder(nn.Module):
    def setup(self):
        self.table = self.param("table", nn.initializers.normal(1.0), (9, 4))
        self.norm = nn.LayerNorm()

    def encode(self, ids):
        return self.normed(self.table[ids])

    def decode(self, x):
        return x @ self.table.T

    def normed(self, x):
        return self.norm(x)


class Head(nn.Module):
    embedder: Any

    def __call__(self, x):
        return self.embedder.decode(x)


class Model(nn.Module):
    cached: bool = False

    def setup(self):
        self.embedder = Embedder()
        self.blocks = [Block(name=f"layer_{i}") for i in range(2)]
        self.head = Head(self.embedder)

    def __call__(self, ids):
        x = self.embedder.encode(ids)
        for block in self.blocks:
            _, x = block(x, {} if self.cached else None)
        return self.head(x)


def backbone_of(module, *inputs):
    inputs = inputs or (IDS,)
    return jdelta.Backbone(module, noisy(module.init(jax.random.key(0), *inputs)["params"]), dummy_inputs=inputs)


@pytest.fixture(scope="module")
def model():
    return backbone_of(Model())


# --- other methods than __call__


def test_a_module_run_by_other_methods_is_listed_with_them_and_the_way_out(model):
    structure = model.structure()
    reason = structure.uncalled["embedder"]
    for part in ("encode", "decode", "unfrozen_modules=['embedder']", "'embedder.norm'"):
        assert part in reason
    assert "normed" not in reason
    assert structure["embedder.norm"].y.shape == (2, 3, 4)
    with pytest.raises(ValueError, match=r"'embedder', which cannot be a target: .*encode, decode.* by __call__"):
        jdelta.LoraModel(model, modified_modules=["embedder"])


def test_its_parts_can_be_named_and_its_parameters_train(model):
    delta = jdelta.AdapterModel(
        model, modified_modules=["embedder.norm"], bottleneck_dim=2, unfrozen_modules=["embedder.table"]
    )
    trainable, _ = delta.partition()
    assert trainable["embedder"].keys() == {"table", "norm"}
    delta.remove()


class Both(nn.Module):
    """Its kernel is used by its calls and by another method."""

    @nn.compact
    def weights(self):
        return self.param("kernel", nn.initializers.normal(1.0), (4, 4))

    def __call__(self, x):
        return x @ self.weights()

    def back(self, y):
        return y @ self.weights().T


class UsesBoth(nn.Module):
    def setup(self):
        self.both = Both()
        self.inside = Inside()

    def __call__(self, x):
        return self.both.back(jnp.tanh(self.inside(self.both(x))))


class Inside(nn.Module):
    """Its other method is part of its calls."""

    @nn.compact
    def __call__(self, x):
        return x @ self.weights()

    def weights(self):
        return self.param("kernel", nn.initializers.normal(1.0), (4, 4))


def test_weights_that_another_method_uses_are_not_merged_into():
    x = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
    backbone = backbone_of(UsesBoth(), x)
    assert backbone.structure().tied == {"both"}
    delta = jdelta.LoraModel(backbone, modified_modules=["both"], lora_r=2)
    train_deltas(delta)
    with pytest.raises(ValueError, match=r"cannot be merged at both: .*another method"):
        delta.merge()
    delta.remove()
    delta = jdelta.LoraModel(backbone, modified_modules=["inside"], lora_r=2)
    train_deltas(delta)
    y = backbone(x)
    delta.merge()
    chex.assert_trees_all_close(backbone(x), y, atol=1e-5)


# --- shared scopes


def test_modules_in_the_scope_of_another_are_listed_with_the_way_out(model):
    structure = model.structure()
    assert [cls.__name__ for cls in structure["layer_1.mlp"].sharing.values()] == ["Einsum", "Einsum"]
    assert "'layer_1.mlp'" in structure.uncalled["layer_1.mlp.Einsum_1"]
    assert structure["layer_1.attn"].sharing == {}
    with pytest.raises(TypeError) as caught:
        jdelta.LoraModel(model, modified_modules=["mlp"])
    for part in ("no kernel", "share_scope: Einsum, Einsum", "adapter", "unfrozen_modules=['layer_0.mlp']"):
        assert part in str(caught.value)
    with pytest.raises(TypeError, match=r"at layer_0 \(Block\): .*inside it, such as 'layer_0\.attn\.q_einsum'"):
        jdelta.LoraModel(model, modified_modules=["layer_0"])


def test_what_stands_around_a_shared_scope_takes_a_layer_and_its_parameters_train(model):
    base = model(IDS)
    delta = jdelta.AdapterModel(model, modified_modules=["mlp"], bottleneck_dim=2, unfrozen_modules=["mlp.gating"])
    trainable, _ = delta.partition()
    assert trainable["layer_0"]["mlp"].keys() == {"adapter", "gating"}
    delta.remove()
    chex.assert_trees_all_equal(model(IDS), base)


class Twice(nn.Module):
    """Calls a module, and then another in its scope."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4, name="dense")
        norm = nn.LayerNorm(use_bias=False, name="norm")
        nn.share_scope(norm, dense)
        return norm(dense(x))


def test_a_scope_in_which_two_modules_run_in_turn_is_closed():
    backbone = backbone_of(Twice(), jnp.ones((2, 4)))
    (name,) = backbone.params
    with pytest.raises(ValueError, match=r"cannot be a target: two modules .*Dense and LayerNorm.*exclude_modules"):
        jdelta.AdapterModel(backbone, modified_modules=[name])


class SharesWithNnx(nn.Module):
    @nn.compact
    def __call__(self, x):
        inner = nnx.bridge.ToLinen(nnx.Linear, args=(4, 4))
        nn.share_scope(self, inner)
        return inner(x)


class AroundNnx(nn.Module):
    @nn.compact
    def __call__(self, x):
        return SharesWithNnx(name="shares")(x)


def test_a_scope_shared_with_an_nnx_module_is_closed():
    backbone = backbone_of(AroundNnx(), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"'shares' cannot be a target: .*nnx"):
        jdelta.AdapterModel(backbone, modified_modules=["shares"])


# --- where the output is


class Named(NamedTuple):
    state: Any
    y: Any


@flax.struct.dataclass
class Output:
    cache: Any
    hidden: Any


RETURNS = {
    "(cache, y)": lambda y: ({"k": y[..., :2]}, y),
    "(None, y)": lambda y: (None, y),
    "[state, y]": lambda y: [{"a": y, "b": y}, y],
    "a named tuple": lambda y: Named(("c", "h"), y),
    "a dataclass": lambda y: Output(None, y),
    "a dict": lambda y: {"y": y, "pooled": y.mean(-1)},
    "(none, other, y)": lambda y: (None, y.mean(-1), y),
}


class Returns(nn.Module):
    make: Any

    @nn.compact
    def __call__(self, x):
        return self.make(nn.Dense(4, name="dense")(x))


class Returning(nn.Module):
    make: Any

    @nn.compact
    def __call__(self, x):
        return Returns(self.make, name="inner")(x)


@pytest.mark.parametrize("how", RETURNS)
@pytest.mark.parametrize("put", ["after", "parallel"])
def test_the_one_array_of_the_inputs_shape_is_the_output(how, put):
    x = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
    backbone = backbone_of(Returning(RETURNS[how]), x)
    base = backbone(x)
    delta = jdelta.DeltaModel(backbone, name="extra")
    if put == "after":
        delta.insert_sequential_module("inner", nn.Dense(4))
    else:
        delta.insert_parallel_module("inner", nn.Dense(4))
    train_deltas(delta)
    own, dense = backbone.params["inner"]["extra"], backbone.params["inner"]["dense"]
    y = x @ dense["kernel"] + dense["bias"]
    new = y @ own["kernel"] + own["bias"] if put == "after" else y + x @ own["kernel"] + own["bias"]
    plain = Returning(lambda _: RETURNS[how](y)).apply({"params": backbone.params}, x)
    wanted = jax.tree.map(lambda leaf: new if getattr(leaf, "shape", None) == y.shape else leaf, plain)
    if how == "[state, y]":  # what is deeper is left alone
        wanted = [plain[0], new]
    changed = backbone(x)
    assert type(changed) is type(base)
    assert jax.tree.structure(changed) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(changed), jax.tree.leaves(wanted), strict=True):
        assert one == other if isinstance(one, str) else jnp.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (
            lambda y: (None, y, y),
            r"tuple\(0: NoneType, 1: float32\[2, 4\], 2: float32\[2, 4\]\).* \(2, 4\), which 2 have",
        ),
        (lambda y: ({}, y[:1], y[:, :1]), r"which 0 have"),
        (lambda y: {"a": y, "b": y}, r"dict\(a: float32\[2, 4\], b: float32\[2, 4\]\)"),
    ],
)
def test_which_element_is_meant_is_said_where_it_is_not_clear(make, shown):
    backbone = backbone_of(Returning(make), jnp.ones((2, 4)))
    with pytest.raises(TypeError, match=rf"inner \(Returns\) cannot be a target: it returns .*{shown}.*'around'"):
        jdelta.AdapterModel(backbone, modified_modules=["inner"])


def test_an_around_layer_chooses_the_element():
    class Second(nn.Module):
        @nn.nowrap
        def __call__(self, host, *args):
            first, y, z = host(*args)
            return first, self.scaled(y), z

        @nn.compact
        def scaled(self, y):
            return y * self.param("scale", nn.initializers.constant(3.0), ())

    class ChosenConfig(jdelta.Method):
        delta_type = "chosen"

        def edits(self, host, structure):
            yield jdelta.CallEdit(host.path, "around", Second())

    class Chosen(jdelta.DeltaModel):
        method_class = ChosenConfig

    x = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
    backbone = backbone_of(Returning(lambda y: (None, y, y)), x)
    base = backbone(x)
    Chosen(backbone, modified_modules=["inner"])
    chex.assert_trees_all_close(backbone(x), (None, 3 * base[1], base[2]))


@pytest.mark.parametrize("cached", breadth([False, True], True))
def test_an_adapter_after_an_attention_that_returns_its_cache(cached, tmp_path):
    backbone = backbone_of(Model(cached))
    base = backbone(IDS)
    delta = jdelta.AdapterModel(backbone, modified_modules=["attn"], bottleneck_dim=2)
    train_deltas(delta)
    changed = backbone(IDS)
    assert jnp.abs(changed - base).max() > 1e-3
    delta.detach()
    chex.assert_trees_all_equal(backbone(IDS), base)


# --- a dtype for every parameter


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (jdelta.LoraModel, {"modified_modules": ["q_einsum"], "lora_r": 2}),
        (jdelta.AdapterModel, {"modified_modules": ["attn"], "bottleneck_dim": 2}),
        (jdelta.ParallelAdapterModel, {"modified_modules": ["mlp", "mlp"], "bottleneck_dim": 2}),
        (jdelta.LowRankAdapterModel, {"modified_modules": ["mlp"], "reduction_factor": 2}),
        (jdelta.CompacterModel, {"modified_modules": ["mlp"], "reduction_factor": 2, "hypercomplex_division": 2}),
        (jdelta.BitFitModel, {"modified_modules": ["norm_1"]}),
    ],
)
def test_own_leaves_are_float32_where_the_model_makes_parameters_of_another_dtype(method, arguments):
    param = nn.Module.param

    def in_bfloat16(self, name, init, shape, dtype=None, **kwargs):
        return param(self, name, init, shape, **{**kwargs, "dtype": jnp.bfloat16})

    with mock.patch.object(nn.Module, "param", in_bfloat16):
        backbone = jdelta.Backbone(Model(), dummy_inputs=(IDS,))
        assert backbone.params["layer_0"]["mlp"]["gating"].dtype == jnp.bfloat16
        delta = method(backbone, **arguments)
        own = jax.tree.leaves(delta.shapes()) + jax.tree.leaves(jax.eval_shape(delta.init, jax.random.key(0)))
    assert {leaf.dtype for leaf in own} <= {jnp.dtype(jnp.float32)}
