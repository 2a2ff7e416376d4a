"""The cheaper forms of the layers' products give what the textbook's give, in every kind of derivative."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiers import breadth
from transformers.models.gpt2.modeling_flax_gpt2 import FlaxConv1D

import jdelta
from jdelta.core import products

SCALE, RANK = 2.0, 2
TOKENS = 64  # many for these widths: the update is folded
HOSTS = {
    "Dense": (nn.Dense(6), (2, TOKENS // 2, 8)),
    "square Dense": (nn.Dense(8), (TOKENS, 8)),
    "Conv1D, output first": (FlaxConv1D(6), (2, TOKENS // 2, 8)),
    "DenseGeneral to heads": (nn.DenseGeneral((2, 5)), (TOKENS, 8)),
    "DenseGeneral from heads": (nn.DenseGeneral(7, axis=(-2, -1)), (TOKENS, 2, 4)),
}


def plain(monkeypatch):
    """From here on nothing is folded."""
    monkeypatch.setattr("jdelta.core.products.fusing_is_cheaper", lambda *_: False)


def attached(host, shape, **arguments):
    x = jax.random.normal(jax.random.key(0), shape)
    module = nn.Sequential([host])
    backbone = jdelta.Backbone(module, module.init(jax.random.key(1), x)["params"], dummy_inputs=(x,))
    arguments = {"lora_r": RANK, "lora_alpha": SCALE * RANK, **arguments}
    jdelta.LoraModel(backbone, modified_modules=["layers_0"], **arguments)
    leaves, treedef = jax.tree.flatten(backbone.params)
    draw = np.random.default_rng(2)
    return backbone, jax.tree.unflatten(treedef, [jnp.asarray(draw.normal(size=v.shape), v.dtype) for v in leaves]), x


def same(one, other, tolerance=1e-5):
    """Equal to a share of the largest entry: float32, and another order of sums."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(float(jnp.abs(b).max()), 1e-30))


@pytest.mark.parametrize("kind", breadth(HOSTS, "DenseGeneral from heads"))
def test_a_folded_update_is_its_formula_in_float64_forward_and_backward(kind, monkeypatch):
    backbone, params, x = attached(*HOSTS[kind])
    folds = []
    before = products.fusing_is_cheaper
    monkeypatch.setattr("jdelta.core.products.fusing_is_cheaper", lambda *s: folds.append(before(*s)) or folds[-1])
    y, pull = jax.vjp(lambda p, x: backbone(x, params=p), params, x)
    assert folds == [True]
    g = jax.random.normal(jax.random.key(3), y.shape)
    dparams, dx = pull(g)

    host = jax.tree.map(lambda v: np.asarray(v, np.float64), params["layers_0"])
    a, b = host["lora"]["a"].reshape(-1, RANK), host["lora"]["b"].reshape(RANK, -1)
    flat, out = np.asarray(x, np.float64).reshape(-1, len(a)), np.asarray(g, np.float64).reshape(-1, b.shape[1])
    kernel = host["kernel"].T if kind.startswith("Conv1D") else host["kernel"].reshape(len(a), -1)
    want = flat @ kernel + host["bias"].reshape(-1) + SCALE * flat @ a @ b
    same(y, want.reshape(y.shape))
    same(dx, (out @ kernel.T + SCALE * out @ b.T @ a.T).reshape(x.shape))
    own = dparams["layers_0"]["lora"]
    same(own["a"], (SCALE * flat.T @ out @ b.T).reshape(own["a"].shape))
    same(own["b"], (SCALE * a.T @ flat.T @ out).reshape(own["b"].shape))
    dkernel = flat.T @ out
    same(
        dparams["layers_0"]["kernel"], (dkernel.T if kind.startswith("Conv1D") else dkernel).reshape(kernel_shape(host))
    )
    same(dparams["layers_0"]["bias"], out.sum(0).reshape(host["bias"].shape))


def kernel_shape(host):
    return host["kernel"].shape


def loss(backbone, x):
    return lambda params: jnp.sum(jnp.tanh(backbone(x, params=params)))


def derivatives(backbone, params, x):
    """Second derivatives in both orders, forward mode, and gradients under vmap, remat and scan over the input."""
    f = loss(backbone, x)
    direction = jax.tree.map(jnp.sin, params)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), params)
    return {
        "forward mode": jax.jvp(f, (params,), (direction,)),
        "forward over reverse": jax.jvp(jax.grad(f), (params,), (direction,))[1],
        "reverse over reverse": jax.grad(
            lambda p: sum(
                jnp.vdot(u, v) for u, v in zip(*map(jax.tree.leaves, (jax.grad(f)(p), direction)), strict=True)
            )
        )(params),
        "a delta for each": jax.vmap(jax.grad(f))(many),
        "with remat": jax.grad(jax.checkpoint(f))(params),
        "of the input": jax.grad(lambda x: loss(backbone, x)(params))(x),
    }


@pytest.mark.slow
def test_all_kinds_of_derivatives_of_a_folded_update_are_those_of_the_sum(monkeypatch):
    backbone, params, x = attached(*HOSTS["Dense"])
    folded = derivatives(backbone, params, x)
    plain(monkeypatch)
    want = derivatives(backbone, params, x)
    for kind in want:
        same(folded[kind], want[kind])


def flops(backbone, params, x):
    host = params["layers_0"]

    def run(own, x):
        return loss(backbone, x)({"layers_0": {**host, "lora": own}})

    step = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))
    return step.lower(host["lora"], x).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(("tokens", "cheaper"), [(256, True), (8, False)])
def test_an_update_is_folded_exactly_where_that_takes_fewer_operations(tokens, cheaper, monkeypatch):
    backbone, params, x = attached(nn.Dense(64), (tokens, 32), lora_r=4)
    chosen = flops(backbone, params, x)
    plain(monkeypatch)
    never = flops(backbone, params, x)
    assert chosen < 0.99 * never if cheaper else chosen == never
    monkeypatch.setattr("jdelta.core.products.fusing_is_cheaper", lambda *_: True)
    assert chosen <= flops(backbone, params, x)


@pytest.mark.parametrize("why", ["bfloat16", "computes in bfloat16", "dropout", "another delta before it"])
def test_an_update_is_added_where_it_cannot_be_folded(why, monkeypatch):
    host, shape = HOSTS["Dense"]
    if why == "computes in bfloat16":  # as Llama does with float32 parameters, after norms that return float32
        host = host.clone(dtype=jnp.bfloat16)
    backbone, params, x = attached(host, shape, lora_dropout=0.5 if why == "dropout" else 0.0)
    rngs = {"dropout": jax.random.key(0)} if why == "dropout" else None
    if why == "bfloat16":
        x = x.astype(jnp.bfloat16)
        params = {"layers_0": {**jax.tree.map(lambda v: v.astype(x.dtype), params["layers_0"])}}
    if why == "another delta before it":
        second = jdelta.LoraModel(backbone, modified_modules=["layers_0"], name="second", lora_r=RANK)
        params = jdelta.graft(params, second.shapes() and second.init(jax.random.key(5)))
        params["layers_0"]["second"]["b"] += 1
    folded, fused = [], products.fused
    monkeypatch.setattr("jdelta.core.products.fused", lambda *a: folded.append(1) or fused(*a))
    y = backbone(x, params=params, rngs=rngs)
    jax.eval_shape(jax.grad(lambda p: backbone(x, params=p, rngs=rngs).astype(jnp.float32).sum()), params)
    assert len(folded) == 2 * (why == "another delta before it")  # both of them in one product
    plain(monkeypatch)
    same(y, backbone(x, params=params, rngs=rngs))


def test_the_gradient_of_thin_weights_is_computed_with_its_long_axis_last():
    if not products.on_cpu():
        pytest.skip("only XLA:CPU is slow at it")
    x, w = jnp.ones((40, 24)), jnp.ones((24, 3))
    text = jax.jit(jax.grad(lambda w: jnp.sum(jnp.sin(products.down(x, w))))).lower(w).compile().as_text()
    assert re.search(r"f32\[3,24\]\S* dot\(", text)
    assert not re.search(r"f32\[24,3\]\S* dot\(", text)
    np.testing.assert_allclose(
        jax.grad(lambda w: jnp.sum(jnp.sin(products.down(x, w))))(w),
        jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(w),
        1e-5,
    )
