"""nnx modules with deltas under the transformations and tools of flax.nnx, of which other tests have no case."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_models import train_deltas
from tiers import breadth

import jdelta

X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
KINDS = {
    "lora": (jdelta.LoraModel, {"modified_modules": ["up"], "lora_r": 2}),
    "adapter": (jdelta.AdapterModel, {"modified_modules": ["up"], "bottleneck_dim": 2}),
    "parameters": (jdelta.LoraModel, {"modified_parameters": ["scale"], "lora_r": 2}),
}


class Tiny(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 4, rngs=rngs)
        self.scale = nnx.Param(jax.random.normal(rngs.params(), (2, 4, 4)))

    def __call__(self, x):
        return jnp.einsum("...d,edf->...f", nnx.relu(self.up(x)), self.scale[...])


def attached(kind, **more):
    model = Tiny(nnx.Rngs(0))
    method, arguments = KINDS[kind]
    delta = method(model, dummy_inputs=(X,), **arguments, **more)
    train_deltas(model)
    return model, delta


@pytest.fixture(params=KINDS)
def model(request):
    return attached(request.param)[0]


def close(one, other):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def call(model, x):
    return model(x)


def again(held):
    model, x, i = held
    return model, model(x), i + 1


RUNS = {
    "vmap": (1, lambda m: nnx.vmap(call, in_axes=(None, 0))(m, X)),
    "cond": (1, lambda m: nnx.cond(True, call, lambda m, x: x, m, X)),
    "switch": (1, lambda m: nnx.switch(1, [lambda m, x: x, call], m, X)),
    "fori_loop": (2, lambda m: nnx.fori_loop(0, 2, lambda i, held: (held[0], held[0](held[1])), (m, X))[1]),
    "while_loop": (2, lambda m: nnx.while_loop(lambda held: held[2] < 2, again, (m, X, 0))[1]),
    "remat": (1, lambda m: nnx.remat(call)(m, X)),
    "jit with donation": (1, lambda m: nnx.jit(call, donate_argnums=0)(nnx.clone(m), X)),
    "jit without updates": (1, lambda m: nnx.jit(call, graph_updates=False)(m, X)),
    "jit of a tree": (1, lambda m: nnx.jit(call, graph=False)(m, X)),
    "vmap of a tree": (1, lambda m: nnx.vmap(call, in_axes=(None, 0), graph=False)(m, X)),
    "jax.jit": (1, lambda m: jax.jit(call)(m, X)),
    "jax.vmap": (1, lambda m: jax.vmap(call, in_axes=(None, 0))(m, X)),
    "jax.tree.map": (1, lambda m: jax.tree.map(lambda leaf: leaf, m)(X)),
    "view": (1, lambda m: nnx.view(m)(X)),
}


@pytest.mark.parametrize("name", breadth(RUNS, "vmap", "fori_loop", "view"))
def test_transformations_run_the_deltas(model, name):
    times, run = RUNS[name]
    expected = X
    for _ in range(times):
        expected = model(expected)
    graphdef = nnx.graphdef(model)
    close(run(model), expected)
    assert nnx.graphdef(model) == graphdef


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_cached_partial_trains(kind):
    model, delta = attached(kind)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=delta.filter)
    before = nnx.state(nnx.clone(model), nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda m: (m(x) ** 2).sum(), argnums=nnx.DiffState(0, delta.filter))(model)
        optimizer.update(model, grads)

    cached = nnx.cached_partial(step, model, optimizer)
    for _ in range(2):
        cached(X)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, nnx.state(model, nnx.Param))
    assert all(jax.tree.leaves(delta.partition(moved)[0]))
    assert not any(jax.tree.leaves(delta.partition(moved)[1]))


@pytest.mark.slow
def test_split_rngs_draws_other_dropout_for_each():
    model, _ = attached("lora", lora_dropout=0.5)
    model.train()

    @nnx.split_rngs(splits=3, only="dropout")
    @nnx.vmap(in_axes=(nnx.StateAxes({nnx.RngState: 0, ...: None}), None))
    def run(model, x):
        return model(x)

    assert len(np.unique(np.asarray(run(model, X)).sum((1, 2)))) == 3
    assert model.up.lora.rngs.key.shape == ()


def test_states_of_the_deltas_alone_are_taken_out_and_put_in(model):
    expected = model(X)
    own = jax.tree.map(jnp.array, nnx.state(model, nnx.LoRAParam))
    nnx.update(model, jax.tree.map(lambda leaf: 2 * leaf, own))
    assert jnp.abs(model(X) - expected).max() > 1e-2
    nnx.update(model, own)
    np.testing.assert_array_equal(model(X), expected)
    nnx.pop(model, nnx.LoRAParam)
    with pytest.raises(ValueError, match="the model's state lacks"):
        model(X)


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_of_shapes_takes_the_values_of_another(kind):
    model, _ = attached(kind)
    abstract = nnx.eval_shape(lambda: Tiny(nnx.Rngs(0)))
    method, arguments = KINDS[kind]
    method(abstract, dummy_inputs=(X,), **arguments)
    assert nnx.graphdef(abstract) == nnx.graphdef(model)
    nnx.update(abstract, nnx.state(model))
    np.testing.assert_array_equal(abstract(X), model(X))


def test_tables_and_pictures_show_the_leaves(capsys):
    model, _ = attached("lora")
    nnx.display(model)
    assert "lora=" in capsys.readouterr().out
    assert "DeltaParam" in nnx.tabulate(model, X)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="this flax has no modes")
@pytest.mark.parametrize("kind", KINDS)
def test_all_verbs_work_where_modules_are_trees(kind):
    with nnx.set_graph_mode(False):
        model, delta = attached(kind)
        graphdef, own, rest = nnx.split(model, delta.filter, ...)
        grads = jax.grad(lambda own: nnx.merge(graphdef, own, rest, copy=True)(X).sum())(own)
        nnx.Optimizer(model, optax.sgd(0.1), wrt=delta.filter).update(model, grads)
        expected = model(X)
        delta.detach()
        bare = model(X)
        delta.attach()
        np.testing.assert_array_equal(model(X), expected)
        if kind != "adapter":
            delta.merge()
            close(model(X), expected)
            delta.unmerge()
        delta.remove()
        np.testing.assert_array_equal(model(X), bare)
        assert nnx.graphdef(model) == nnx.graphdef(Tiny(nnx.Rngs(0)))
