"""Every way to run a module with deltas runs them, or says how to."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy
from flax import core, nnx
from flax import linen as nn
from test_composition import IDS, METHODS, attach, backbone

import jdelta

X = np.linspace(-1.0, 1.0, 8, dtype=np.float32).reshape(2, 4)
KEY = jax.random.key(0)


class Net(nn.Module):
    def setup(self):
        self.one = nn.Dense(6)
        self.two = nn.Dense(3)

    def __call__(self, x):
        return self.two(self.encode(x))

    def encode(self, x):
        return jnp.tanh(self.one(x))

    def twice(self, x):
        again = self.clone().apply(self.variables, x)  # a run inside a run
        return self(x) + again


def by_hand(params, x, encoded=False):
    """The net with LoRA, its formula."""
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def dense(name, x):
        own = w[name]
        return x @ own["kernel"] + own["bias"] + 8 * x @ own["lora"]["a"] @ own["lora"]["b"]

    hidden = np.tanh(dense("one", x))
    return hidden if encoded else dense("two", hidden)


@pytest.fixture(scope="module")
def model():
    shapes = jax.eval_shape(Net().init, KEY, X)["params"]
    params = noisy(jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes))
    model = jdelta.Backbone(Net(), params, dummy_inputs=(X,))
    jdelta.LoraModel(model, modified_modules=["one", "two"], lora_r=2)
    model.params = noisy(model.params)
    return model


def called(self, x):
    return self(x)


RUNS = {
    "apply": lambda m, v: m.apply(v, X),
    "a method of a name": lambda m, v: m.apply(v, X, method="__call__"),
    "a function as method": lambda m, v: m.apply(v, X, method=called),
    "captured intermediates": lambda m, v: m.apply(v, X, capture_intermediates=True)[0],
    "clone": lambda m, v: m.clone().apply(v, X),
    "copy": lambda m, v: m.copy(parent=None).apply(v, X),
    "copy.copy": lambda m, v: copy.copy(m).apply(v, X),
    "copy.deepcopy": lambda m, v: copy.deepcopy(m).apply(v, X),
    "its class": lambda m, v: type(m)().apply(v, X),
    "unbind": lambda m, v: (lambda bare, own: bare.apply(own, X))(*m.apply(v, method=type(m).unbind)),
    "a subclass": lambda m, v: type("Derived", (type(m),), {})().apply(v, X),
    "nn.remat": lambda m, v: nn.remat(type(m))().apply(v, X),
    "nn.jit": lambda m, v: nn.jit(type(m))().apply(v, X),
    "nn.vmap": lambda m, v: nn.vmap(type(m), variable_axes={"params": None}, split_rngs={"params": False})().apply(
        v, X[None]
    )[0],
    "jax.jit of apply": lambda m, v: jax.jit(m.apply)(v, X),
    "init": lambda m, v: m.apply(jax.tree.map(lambda _, leaf: leaf, m.init(KEY, X), v), X),
    "lazy_init": lambda m, v: m.apply(
        jax.tree.map(lambda _, leaf: leaf, m.lazy_init(KEY, jax.ShapeDtypeStruct(X.shape, X.dtype)), v), X
    ),
}


@pytest.mark.parametrize("way", RUNS)
def test_what_runs_runs_with_the_deltas(model, way):
    y = RUNS[way](model.module, {"params": model.params})
    np.testing.assert_allclose(y, by_hand(model.params, X), atol=1e-5)


def test_another_method_runs_with_the_deltas(model):
    y = model.module.apply({"params": model.params}, X, method="encode")
    np.testing.assert_allclose(y, by_hand(model.params, X, encoded=True), atol=1e-5)


def test_a_part_runs_with_the_deltas(model):
    y = model.module.apply({"params": model.params}, X, method=lambda module, x: jnp.tanh(module.one(x)))
    np.testing.assert_allclose(y, by_hand(model.params, X, encoded=True), atol=1e-5)


def test_a_run_inside_a_run_has_the_deltas_once(model):
    y = model.module.apply({"params": model.params}, X, method="twice")
    np.testing.assert_allclose(y, 2 * by_hand(model.params, X), atol=1e-5)


def test_an_nnx_wrapper_runs_with_the_deltas(model):
    wrapped = nnx.bridge.ToNNX(model.module, rngs=nnx.Rngs(0)).lazy_init(X)
    params = {}
    for name in ("one", "two"):
        part = getattr(wrapped, name)
        values = {"kernel": part["kernel"], "bias": part["bias"], "lora": {k: part["lora"][k] for k in "ab"}}
        params[name] = jax.tree.map(
            lambda leaf: np.asarray(leaf[...]), values, is_leaf=lambda v: hasattr(v, "get_value")
        )
    np.testing.assert_allclose(wrapped(X), by_hand(params, X), atol=1e-5)


BOUND = {
    "nn.apply": lambda m, v: nn.apply(called, m)(v, X),
    "nn.apply of a part": lambda m, v: nn.apply(lambda module, x: module.one(x), m)(v, X),
    "nn.init": lambda m, v: nn.init(called, m)(KEY, X),
    "nn.init_with_output": lambda m, v: nn.init_with_output(called, m)(KEY, X),
    "bind": lambda m, v: m.bind(v),
    "the original's apply": lambda m, v: Net.apply(m, v, X),
    "nn.Module.bind": lambda m, v: nn.Module.bind(m, v),
    "a clone with a scope": lambda m, v: m.clone(parent=core.bind(v)),
    "a class with a scope": lambda m, v: type(m)(parent=core.bind(v)),
    "another's method": lambda m, v: Net().apply({}, method=lambda _: nn.apply(called, m)(v, X)),
}


@pytest.mark.parametrize("way", BOUND)
@pytest.mark.parametrize("jit", [False, True])
def test_what_would_run_without_them_says_how_to(model, way, jit):
    def run(variables):
        return BOUND[way](model.module, variables)

    with pytest.raises(NotImplementedError, match=r"module\.apply\(.*method=fn.*module\.init\(.*method=fn"):
        (jax.jit(run) if jit else run)({"params": model.params})


class OwnGradient(nn.Module):
    """A Dense whose gradients are doubled, beside another."""

    @nn.compact
    def __call__(self, x):
        def forward(dense, x):
            y, pull = nn.vjp(lambda dense, x: dense(x), dense, x)
            return y, pull

        def backward(pull, g):
            return jax.tree.map(lambda leaf: 2 * leaf, pull(g))

        doubled = nn.custom_vjp(lambda dense, x: dense(x), forward, backward)
        return nn.Dense(4, name="plain")(x) + doubled(nn.Dense(4, name="own"), x)


def test_a_gradient_of_the_models_own_is_that_of_the_deltas_too_or_an_error():
    net = OwnGradient()
    shapes = jax.eval_shape(net.init, KEY, X)["params"]
    params = noisy(jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes))
    model = jdelta.Backbone(net, params, dummy_inputs=(X,))

    def loss(params):
        return model(X, params=params).sum()

    lora = jdelta.LoraModel(model, modified_modules=["plain"], lora_r=2)  # beside it, nothing is lost
    grads = jax.grad(jax.jit(loss))(model.params)
    np.testing.assert_allclose(grads["own"]["bias"], 2 * grads["plain"]["bias"])
    lora.remove()
    jdelta.LoraModel(model, modified_modules=["own"], lora_r=2)
    model.params = noisy(model.params)
    a, b = (np.asarray(model.params["own"]["lora"][leaf], np.float64) for leaf in "ab")
    ones = np.ones((2, 4))
    for grad in (jax.grad(loss), jax.jit(jax.grad(loss))):
        found = grad(model.params)["own"]["lora"]
        np.testing.assert_allclose(found["a"], 2 * 8 * X.T @ (ones @ b.T), rtol=1e-4)
        np.testing.assert_allclose(found["b"], 2 * 8 * (X @ a).T @ ones, rtol=1e-4)
    with pytest.raises(NotImplementedError, match=r"jax\.jit\(jax\.grad\(loss\)\) in place of"):
        jax.grad(jax.jit(loss))(model.params)


def test_what_a_run_leaves_cannot_be_called_afterwards(model):
    escaped = model.module.apply({"params": model.params}, method=lambda module: module)
    with pytest.raises(Exception, match="scope"):
        escaped(X)


def test_a_bare_module_is_bound_as_ever(model):
    bare = jdelta.prune(model.params, "lora")
    assert np.array_equal(nn.apply(called, Net())({"params": bare}, X), Net().bind({"params": bare})(X))


PLAIN = {"console_kwargs": {"width": 200, "force_terminal": False}}


def test_flax_tables_have_the_rows_of_the_deltas(model):
    for table in (nn.tabulate(model.module, KEY, **PLAIN)(X), model.module.tabulate(KEY, X, **PLAIN)):
        assert all(row in table for row in ("one/lora", "two/lora", "a: float32[4,2]", "b: float32[2,3]"))
    assert [*model.module.module_paths(KEY, X)] == ["", "one", "one/lora", "two", "two/lora"]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_in_the_tables_with_its_cost(name):
    with_delta = backbone()
    delta = attach(with_delta, [name])[name]
    table = with_delta.module.tabulate(KEY, IDS, compute_flops=True, compute_vjp_flops=True, **PLAIN)
    rows = [line.split("│")[1].strip() for line in table.splitlines() if "│" in line]
    for path in delta.paths:
        assert any("/".join(path[:i]) in rows for i in range(path.index(name) + 1, len(path))), path
    if name != "mine":  # flax counts twice what lies two scopes below a module
        numbers = sum(leaf.size for leaf in jax.tree.leaves(with_delta.params))
        assert f"Total Parameters: {numbers:,} " in table
    assert "children" not in table  # modules among the inputs, written out


@pytest.mark.slow
def test_a_model_of_transformers_is_in_the_tables_with_its_deltas_and_their_cost(bert, ids):
    jdelta.LoraModel(bert, lora_r=2)
    jdelta.AdapterModel(bert, bottleneck_dim=2)
    keys = {"params": KEY, "dropout": KEY}
    inputs = (ids, ids * 0 + 1, ids * 0, ids * 0, None)

    def table_with_total(**options):
        table = bert.module.tabulate(keys, *inputs, **options, **PLAIN)
        assert f"{sum(leaf.size for leaf in jax.tree.leaves(bert.params)):,} " in table
        return table

    assert "flops" in table_with_total(compute_flops=True)
    jdelta.SoftPromptModel(bert, soft_token_num=2)
    rows = ("self/query/lora", "output/dense/adapter", "word_embeddings/soft_prompt")
    assert all(row in table_with_total() for row in rows)
