"""nnx modules that are linear in their weights are known or found out, and others are refused with the reason."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy
from flax import nnx
from tiers import breadth

import jdelta
from jdelta.core import axes, linear, probing
from jdelta.core.linear_maps import ConvMap, EinsumMap, LookupMap, MatrixMap
from jdelta.core.structure import Structure
from jdelta.hosts.adapting import adapt

D_IN, D_OUT = 6, 10
RNGS = nnx.Rngs(0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class Holder(nnx.Module):
    """A model of one module, which it may give an equation too."""

    def __init__(self, host, *equation):
        self.host, self.equation = host, equation

    def __call__(self, x):
        return self.host(*self.equation, x)


def seen(module, *args):
    """What a trace of a model sees of a module."""
    *equation, x = args
    return adapt(Holder(module, *equation), (x,)).structure()["host"]


class Own(nnx.Module):
    """A module of one's own, which computes `f(x, kernel)`."""

    def __init__(self, f, shape=(D_IN, D_OUT), **static):
        self.kernel = nnx.Param(normal(1, *shape))
        self.f = f
        for name, value in static.items():
            setattr(self, name, value)

    def __call__(self, x):
        return self.f(x, self.kernel[...])


class Einsum(nnx.Module):
    """As in tunix: an einsum whose weights are called w."""

    def __init__(self, einsum_str, shape, f=lambda y: y):
        self.einsum_str, self.shape, self.f = einsum_str, shape, f
        self.w = nnx.Param(normal(1, *shape))

    def __call__(self, x):
        return self.f(jnp.einsum(self.einsum_str, x, self.w.value))


class Called(nnx.Module):
    """An einsum whose equation is an argument of the call."""

    def __init__(self, f=lambda y: y):
        self.f = f
        self.w = nnx.Param(normal(1, 2, D_IN, 5))

    def __call__(self, equation, x):
        return self.f(jnp.einsum(equation, x, self.w.value))


class WeightNorm(nnx.Linear):
    def __call__(self, x):
        return x @ (self.kernel[...] / jnp.linalg.norm(self.kernel[...], axis=0))


class Renamed(nnx.Linear):
    """Computes what `nnx.Linear` does."""


class Dropped(nnx.Module):
    """Linear as long as it is not trained, which a module inside it says."""

    def __init__(self, deterministic=True):
        self.kernel = nnx.Param(normal(1, D_IN, D_OUT))
        self.dropout = nnx.Dropout(0.5, deterministic=deterministic, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.dropout(x) @ self.kernel[...]


class Told(nnx.Module):
    """Linear as long as it is not trained, which its call says."""

    def __init__(self):
        self.kernel = nnx.Param(normal(1, D_IN, D_OUT))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x, deterministic=True):
        return self.dropout(x, deterministic=deterministic) @ self.kernel[...]


class Standardised(nnx.Module):
    """Subtracts a mean that it keeps in a variable of another kind."""

    def __init__(self):
        self.kernel, self.mean = nnx.Param(normal(1, D_IN, D_OUT)), nnx.BatchStat(jnp.zeros(D_IN))

    def __call__(self, x):
        return (x - self.mean[...]) @ self.kernel[...]


class Noted(Own):
    """Linear, and keeps a note of its output."""

    def __call__(self, x):
        y = super().__call__(x)
        self.sow(nnx.Intermediate, "y", y)
        return y


class OneMore(nnx.Module):
    """Linear in its kernel, beside a module inside it that is not."""

    def __init__(self, f=nnx.relu):
        self.kernel, self.beside = nnx.Param(normal(1, D_IN, D_OUT)), nnx.Linear(D_IN, D_OUT, rngs=RNGS)
        self.inside = nnx.List([Own(f, ())])

    def __call__(self, x):
        return x @ self.kernel[...] + nnx.relu(self.beside(x))


X, IDS, IMAGE = normal(2, 2, 3, D_IN), jnp.array([[0, 3, 3], [6, 1, 2]]), normal(3, 2, 5, 5, 4)


def of(cls, *args, **kwargs):
    return lambda: cls(*args, rngs=RNGS, **kwargs)


KNOWN = {
    "Linear": (of(nnx.Linear, D_IN, D_OUT), X, MatrixMap),
    "Linear without bias": (of(nnx.Linear, D_IN, D_OUT, use_bias=False, precision="highest"), X, MatrixMap),
    "Linear in bfloat16": (of(nnx.Linear, D_IN, D_OUT, param_dtype=jnp.bfloat16, dtype=jnp.float32), X, MatrixMap),
    "LinearGeneral out": (of(nnx.LinearGeneral, D_IN, (2, 5)), X, MatrixMap),
    "LinearGeneral in": (of(nnx.LinearGeneral, (3, D_IN), D_OUT, axis=(-2, -1)), X, MatrixMap),
    "LinearGeneral in, in another order": (of(nnx.LinearGeneral, (3, D_IN), D_OUT, axis=(-1, -2)), X, MatrixMap),
    "LinearGeneral in the middle": (of(nnx.LinearGeneral, 3, D_OUT, axis=1), X, MatrixMap),
    "Einsum": (of(nnx.Einsum, "btd,ndh->btnh", (2, D_IN, 5), (2, 5)), X, EinsumMap),
    "Einsum of a matrix": (of(nnx.Einsum, "btd,dh->bth", (D_IN, 5), (5,)), X, MatrixMap),
    "Conv": (of(nnx.Conv, 4, 6, (3, 3)), IMAGE, ConvMap),
    "Conv in groups with strides and dilation": (
        of(nnx.Conv, 4, 6, (2, 2), strides=2, kernel_dilation=(1, 2), padding=[(1, 0), (0, 1)], feature_group_count=2),
        IMAGE,
        ConvMap,
    ),
    "causal Conv": (of(nnx.Conv, D_IN, 5, 2, padding="CAUSAL"), X, ConvMap),
    "circular Conv": (of(nnx.Conv, D_IN, 5, 2, None, padding="CIRCULAR", input_dilation=None), X, ConvMap),
    "Embed": (of(nnx.Embed, 7, D_OUT), IDS, LookupMap),
}


def adds_the_product(module, args, found):
    """Whether a change of the leaf changes the output by the product that was found."""
    x = next(a for a in args if isinstance(a, jax.Array))
    weight = getattr(module, found.weights)
    before, change = module(*args), normal(9, *weight.shape).astype(weight.dtype)
    weight.set_value(weight.get_value() + change)
    np.testing.assert_allclose(module(*args) - before, found.product(x, change), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("what", breadth(KNOWN, "Linear", "LinearGeneral in", "Einsum", "Conv", "Embed"))
def test_flaxs_own_are_linear_as_they_are_described_and_are_not_tried(what, monkeypatch):
    make, x, kind = KNOWN[what]
    module = make()
    monkeypatch.setattr(probing, "problem", None)
    host = seen(module, x)
    found = linear.linear_map(host)
    assert type(found) is kind
    assert linear.runs_alone(host)
    if what != "Linear in bfloat16":
        adds_the_product(module, (x,), found)


@functools.cache
def product():
    return functools.partial(jax.lax.dot_general)


NOT_ALONE = ("an equation in the call", "one that keeps notes", "one with more beside")
TRIED = {
    "a module of one's own": (lambda: Own(jnp.matmul), (X,)),
    "one that keeps its kernel transposed": (lambda: Own(lambda x, k: x @ k.T, (D_OUT, D_IN)), (X,)),
    "a square one, transposed": (lambda: Own(lambda x, k: x @ k.T, (D_IN, D_IN)), (X,)),
    "a subclass that computes the same": (of(Renamed, D_IN, D_OUT), (X,)),
    "a Linear with a dot_general that is one": (of(nnx.Linear, D_IN, D_OUT, dot_general=product()), (X,)),
    "a Linear that gives bfloat16": (of(nnx.Linear, D_IN, D_OUT, preferred_element_type=jnp.bfloat16), (X,)),
    "tunix's einsum": (lambda: Einsum("BTD,NDH->BTNH", (2, D_IN, 5)), (X,)),
    "tunix's einsum with a new first axis": (lambda: Einsum("BSD,CKDH->CBSKH", (2, 3, D_IN, 5)), (X,)),
    "tunix's einsum of a matrix": (lambda: Einsum("BTD,DV->BTV", (D_IN, 5)), (X,)),
    "an equation in the call": (lambda: Called(), ("btd,ndh->btnh", X)),
    "one that keeps notes": (lambda: Noted(jnp.matmul), (X,)),
    "one with more beside": (lambda: OneMore(), (X,)),
}


@pytest.mark.parametrize("what", breadth(TRIED, "a module of one's own", "tunix's einsum", "an equation in the call"))
def test_modules_of_ones_own_are_tried(what):
    make, args = TRIED[what]
    module = make()
    host = seen(module, *args)
    found = linear.linear_map(host)
    assert linear.runs_alone(host) == (what not in NOT_ALONE)
    if what != "a Linear that gives bfloat16":
        adds_the_product(module, args, found)


ALL = {what: (make, (x,)) for what, (make, x, _) in KNOWN.items()} | TRIED


@pytest.mark.parametrize(
    "what", breadth(ALL, "Linear", "LinearGeneral in", "tunix's einsum with a new first axis", "Embed")
)
def test_running_with_lora_is_merging_for_any_number_of_rows(what):
    make, (*equation, x) = ALL[what]
    model = Holder(make(), *equation)
    bare = nnx.clone(model)
    delta = jdelta.LoraModel(model, ["host"], lora_r=2, dummy_inputs=(x,))
    nnx.update(model, noisy(nnx.state(model, delta.filter)))
    merged = nnx.clone(bare)
    nnx.update(merged, delta.merge(nnx.state(model)))
    run, want, base = (nnx.jit(lambda m, x: m(x)) for _ in range(3))
    for times in (1, 100):
        xs = jnp.concatenate([x] * times)
        found, of_merged, of_bare = run(model, xs), want(merged, xs), base(bare, xs)
        tolerance = 2e-2 if "bfloat16" in what else 1e-4
        np.testing.assert_allclose(found, of_merged, rtol=0, atol=tolerance * float(jnp.abs(of_merged).max()))
        assert jnp.abs(found - of_bare).max() > 1e-3
    delta.detach()
    np.testing.assert_array_equal(model(x), bare(x))


OTHER = "changed the output by something else than x·D: .* off, where x·D is up to .* for an input of shape"
NOT_LINEAR = {
    "a ReLU after it": (lambda: Own(lambda x, k: nnx.relu(x @ k)), (X,), OTHER),
    "a tanh before it": (lambda: Own(lambda x, k: jnp.tanh(x) @ k), (X,), OTHER),
    "a norm of its columns": (of(WeightNorm, D_IN, D_OUT), (X,), OTHER),
    "a soft cap far out": (lambda: Own(lambda x, k: 50 * jnp.tanh(x @ k / 50)), (X,), OTHER),
    "dropout inside": (Dropped, (X,), f"{OTHER}.*deterministic=False"),
    "dropout inside that is on": (lambda: Dropped(False), (X,), f"{OTHER}.*deterministic=False"),
    "dropout that the call turns on": (Told, (X,), f"{OTHER}.*deterministic=False"),
    "statistics in another variable": (Standardised, (X,), OTHER),
    "a dot_general of one's own": (
        of(nnx.Linear, D_IN, D_OUT, dot_general=lambda *a, **k: nnx.relu(product()(*a))),
        (X,),
        OTHER,
    ),
    "a promotion of one's own": (
        of(nnx.Linear, D_IN, D_OUT, promote_dtype=lambda arrays, dtype: (arrays[0] ** 2, *arrays[1:])),
        (X,),
        OTHER,
    ),
    "tunix's einsum with a scale": (lambda: Einsum("BTD,NDH->BTNH", (2, D_IN, 5), lambda y: y * 3), (X,), OTHER),
    "an equation in the call, with a ReLU": (lambda: Called(nnx.relu), ("btd,ndh->btnh", X), OTHER),
}


@pytest.mark.parametrize("what", breadth(NOT_LINEAR, "a ReLU after it", "a norm of its columns", "dropout inside"))
def test_what_is_not_linear_is_refused_with_the_reason(what):
    make, (*equation, x), reason = NOT_LINEAR[what]
    model = Holder(make(), *equation)
    before, graph = nnx.state(nnx.clone(model), nnx.Param), nnx.graphdef(model)
    remedy = r"Name a linear module .* an adapter.* jdelta\.register_linear\(\w+\)"
    with pytest.raises(
        TypeError, match=rf"LoraModel at host \(\w+\): .*not known to be linear in '\w+'.*{reason}.*{remedy}"
    ):
        jdelta.LoraModel(model, ["host"], lora_r=2, dummy_inputs=(x,))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.Param), before)
    assert nnx.graphdef(model) == graph


@pytest.mark.parametrize(
    ("make", "x", "message"),
    [
        (of(nnx.LinearGeneral, D_IN, D_OUT, batch_axis={0: 2}), X, "LinearGeneral with batch_axis"),
        (of(nnx.Conv, 4, 6, (2, 2), mask=jnp.ones((2, 2, 4, 6))), IMAGE, "masked convolutions"),
        (of(nnx.ConvTranspose, 4, 6, (2, 2)), IMAGE, "transposed convolution"),
        (of(nnx.LayerNorm, D_IN), X, "no kernel of its own"),
    ],
)
def test_what_is_not_supported_is_said(make, x, message):
    with pytest.raises(TypeError, match=message):
        linear.linear_map(seen(make(), x))


def test_a_type_that_is_registered_is_taken_as_it_is_said_and_no_other():
    class Mine(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(normal(1, D_OUT, D_IN))

        def __call__(self, x):
            return jnp.sin(x @ self.w.value.T)

    class Below(Mine):
        pass

    with pytest.raises(TypeError, match="no kernel of its own"):
        linear.linear_map(seen(Mine(), X))
    jdelta.register_linear(Mine, weights="w", equation="...i,oi->...o")
    assert linear.linear_map(seen(Mine(), X)) == MatrixMap("w", transposed=True)
    with pytest.raises(TypeError, match="is not known to be linear in 'w'"):
        linear.linear_map(seen(Below(), X))


def test_modules_are_alike_if_they_and_all_inside_them_are(monkeypatch):
    tried = []
    problem = probing.problem
    monkeypatch.setattr(probing, "problem", lambda *a: tried.append(a) or problem(*a))
    linear._tried.clear()

    def count(*modules):
        tried.clear()
        for module in modules:
            linear.linear_map(seen(module, X))
        return len(tried)

    def alike():  # with a function of its own
        return Own(lambda x, k: x @ k)

    assert count(alike(), alike(), alike()) == 1
    assert count(Own(jnp.matmul, note=1), Own(jnp.matmul, note=2), Own(jnp.matmul, note=2)) == 2
    assert count(OneMore(nnx.relu), OneMore(nnx.gelu), OneMore(nnx.relu)) == 2


class Large(nnx.Module):
    """Says how large it is in static attributes, or nowhere but in its code."""

    def __init__(self, d_in, d_out, f=jnp.matmul, says=True):
        self.sizes, self.f, self.says = (d_in, d_out), f, says
        self.kernel = nnx.Param(jax.ShapeDtypeStruct((d_in, d_out), jnp.float32))

    def __call__(self, x):
        return self.f(x.reshape(-1, self.sizes[0] if self.says else 300), self.kernel[...]).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize(("says", "sizes", "largest"), [(True, (2**17, 2**15), 50_000), (False, (300, 300), 90_000)])
def test_a_large_module_is_tried_in_a_smaller_copy_where_there_can_be_one(says, sizes, largest, monkeypatch):
    drawn = []
    draw = probing._random
    monkeypatch.setattr(probing, "_random", lambda *a: [out := draw(*a), drawn.append(out.size)][0])
    linear._tried.clear()
    x = jnp.zeros((1, 3, sizes[0]))
    assert linear.linear_map(seen(Large(*sizes, says=says), x)) == MatrixMap()
    assert max(drawn) <= largest
    with pytest.raises(TypeError, match=OTHER):
        linear.linear_map(seen(Large(*sizes, lambda x, k: nnx.relu(x @ k), says), x))


def test_a_module_that_computes_in_half_precision_is_tried_in_float32():
    class Half(nnx.Module):
        def __init__(self):
            self.dtype, self.inside = jnp.bfloat16, nnx.Linear(D_OUT, D_OUT, dtype=jnp.bfloat16, rngs=RNGS)
            self.kernel = nnx.Param(normal(1, D_IN, D_OUT))

        def __call__(self, x):
            y = x.astype(self.dtype) @ self.kernel.astype(self.dtype)
            return y + self.inside(jnp.zeros_like(y))

    assert linear.linear_map(seen(Half(), X)) == MatrixMap()


class Scale(nnx.Module):
    """As in tunix: a norm whose scale is called w."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones(D_IN))

    def __call__(self, x):
        return self.w[...] * x


AXES = {
    "Linear": (of(nnx.Linear, D_IN, D_OUT), X, "kernel", [0], [1]),
    "LinearGeneral": (of(nnx.LinearGeneral, D_IN, (2, 5)), X, "kernel", [0], [1, 2]),
    "heads": (lambda: Einsum("BTD,NDH->BTNH", (2, D_IN, 5)), X, "w", [1], [0, 2]),
    "keys and values": (lambda: Einsum("BSD,CKDH->CBSKH", (2, 3, D_IN, 5)), X, "w", [2], [1, 3]),
    "out of heads": (lambda: Einsum("BNH,NHD->BD", (3, D_IN, 5)), X, "w", [0, 1], [2]),
    "a matrix": (lambda: Einsum("BTD,DV->BTV", (D_IN, 5)), X, "w", [0], [1]),
    "a scale": (Scale, X, "w", [0], [0]),
    "a LayerNorm": (of(nnx.LayerNorm, D_IN), X, "scale", [0], [0]),
}


@pytest.mark.parametrize("what", breadth(AXES, "heads", "a scale"))
def test_features_have_the_axes_of_the_weights_that_they_meet_and_come_from(what):
    make, x, leaf, d_in, d_out = AXES[what]
    host = seen(make(), x)
    structure = Structure({"host": host}, {}, {})
    assert list(axes.of_input(host, structure)) == [axes.Axis(("host", leaf), i) for i in d_in]
    assert list(axes.of_output(host, structure)) == [axes.Axis(("host", leaf), i) for i in d_out]


def test_a_module_that_shares_another_parameter_is_tried_with_it():
    class Biased(nnx.Module):
        def __init__(self, bias):
            self.kernel, self.bias = nnx.Param(normal(1, D_IN, D_IN)), bias

        def __call__(self, x):
            return x @ self.kernel[...] + self.bias[...]

    bias = nnx.Param(normal(2, D_IN))
    model = nnx.Sequential(Biased(bias), Biased(bias))
    for name in ("layers.0", "layers.1"):
        host = adapt(model, (X,)).structure()[name]
        assert linear.linear_map(host) == MatrixMap()
        assert linear.runs_alone(host) == ("bias" in host.params)
