"""LoRA takes modules that are linear in their weights, and says of others why it does not."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, noisy, train_deltas
from flax import linen as nn
from flax.linen import fp8_ops
from tiers import breadth

import jdelta
from jdelta.core import linear, probing, products

D_IN, D_OUT = 6, 10
KERNEL = nn.initializers.lecun_normal()


class Own(nn.Module):
    """A module of one's own, which computes `f(x, kernel)`."""

    f: object
    shape: tuple = (D_IN, D_OUT)
    dtype: object = None

    @nn.compact
    def __call__(self, x):
        return self.f(x, self.param("kernel", KERNEL, self.shape))


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", KERNEL, (D_IN, D_OUT))
        return x @ kernel * self.param("scale", nn.initializers.ones, (D_OUT,))


class WeightNorm(nn.Dense):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        return x @ (kernel / jnp.linalg.norm(kernel, axis=0))


class Doubled(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class ScaledEmbed(nn.Embed):
    def __call__(self, ids):
        return super().__call__(ids) * 3


class Shifted(nn.Conv):
    @nn.compact
    def __call__(self, x):
        return nn.relu(super().__call__(x))


class Dropped(nn.Module):
    """Linear as long as it is not trained."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.Dropout(0.5)(x, deterministic=deterministic)
        return x @ self.param("kernel", KERNEL, (D_IN, D_OUT))


class Standardised(nn.Module):
    """Subtracts a mean that it keeps in another collection."""

    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(x.shape[-1]))
        return (x - mean.value) @ self.param("kernel", KERNEL, (D_IN, D_OUT))


class Renamed(nn.Dense):
    """Computes what `nn.Dense` does."""


class Transposed(nn.Dense):
    """Stores its kernel the other way round."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", self.kernel_init, (self.features, x.shape[-1])).T


class Trained(nn.Module):
    """Linear as long as it is not trained, which its field says."""

    training: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=not self.training)(x)
        return x @ self.param("kernel", KERNEL, (D_IN, D_OUT))


class Gain(nn.Module):
    """Has a field that ends like an initialiser, and is none."""

    gain_init: float = 1.0

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", KERNEL, (D_IN, D_OUT)) + self.gain_init * x.sum(-1, keepdims=True)


class Noted(nn.Module):
    """Linear, and keeps a note of its output."""

    @nn.compact
    def __call__(self, x):
        y = x @ self.param("kernel", KERNEL, (D_IN, D_OUT))
        self.sow("intermediates", "y", y)
        return y


class OneMore(nn.Module):
    """Linear in its kernel, beside something that is not."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", KERNEL, (D_IN, D_OUT))
        return x @ kernel + nn.relu(nn.Dense(D_OUT, name="beside")(x))


class Heads(nn.Module):
    """As in Gemma: an einsum whose weights are called w."""

    f: object = staticmethod(lambda y: y)
    equation: str = "btd,ndh->btnh"

    @nn.compact
    def __call__(self, x):
        return self.f(jnp.einsum(self.equation, x, self.param("w", KERNEL, (2, D_IN, 5))))


class WithEquation(nn.Module):
    f: object = staticmethod(lambda y: y)

    @nn.compact
    def __call__(self, x):
        return _Einsum(self.f, name="einsum")("btd,ndh->btnh", x)


class _Einsum(nn.Module):
    f: object

    @nn.compact
    def __call__(self, equation, x):
        return self.f(jnp.einsum(equation, x, self.param("w", KERNEL, (2, D_IN, 5))))


class Quantised(nn.Module):
    """Keeps its kernel as int8, with a scale for each column."""

    f: object = staticmethod(lambda y: y)

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", lambda *_: jnp.arange(D_IN * D_OUT, dtype=jnp.int8).reshape(D_IN, D_OUT))
        return self.f(x @ (kernel.astype(x.dtype) * self.param("scale", nn.initializers.constant(0.1), (D_OUT,))))


class Switches(nn.Module):
    """Another function from 100 rows on."""

    @nn.compact
    def __call__(self, x):
        y = x @ self.param("kernel", KERNEL, (D_IN, D_OUT))
        return nn.relu(y) if x.size // x.shape[-1] >= 100 else y


def x_of(rows, width=D_IN):
    return jax.random.normal(jax.random.key(rows), (1, rows, width))


HEADED = jax.random.normal(jax.random.key(0), (1, 3, 2, D_IN))
IDS = jnp.arange(7)[None]
IMAGE = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))


def attached(module, x=None, method=jdelta.LoraModel, **arguments):
    x = x_of(3) if x is None else x
    root = nn.Sequential([module])
    params = root.init(jax.random.key(1), x)
    backbone = jdelta.Backbone(root, params if len(params) > 1 else params["params"], dummy_inputs=(x,))
    return backbone, method(
        backbone, ["layers_0.einsum" if isinstance(module, WithEquation) else "layers_0"], **arguments
    )


@functools.cache
def low(dtype=jnp.float32):
    return functools.partial(jax.lax.dot_general, preferred_element_type=dtype)


LINEAR = {
    "a Dense": (nn.Dense(D_OUT), None),
    "a Dense with a precision": (nn.Dense(D_OUT, precision="highest"), None),
    "a Dense with a dot_general that is one": (nn.Dense(D_OUT, dot_general=low()), None),
    "a subclass that computes the same": (Renamed(D_OUT), None),
    "a Dense in nn.remat": (nn.remat(nn.Dense)(D_OUT), None),
    "a module of one's own": (Own(jnp.matmul), None),
    "one that keeps its kernel transposed": (Own(lambda x, k: x @ k.T, (D_OUT, D_IN)), None),
    "a square one": (Own(jnp.matmul, (D_IN, D_IN)), None),
    "a square one, transposed": (Own(lambda x, k: x @ k.T, (D_IN, D_IN)), None),
    "one that makes heads": (Own(lambda x, k: jnp.einsum("...d,dnh->...nh", x, k), (D_IN, 2, 5)), None),
    "one that joins heads": (Own(lambda x, k: jnp.einsum("...nh,nhd->...d", x, k), (2, D_IN, D_OUT)), HEADED),
    "a subclass that is transposed": (Transposed(D_OUT), None),
    "a square subclass that is transposed": (Transposed(D_IN), None),
    "one with a field that is no initialiser": (Gain(2.0), None),
    "a Dense in nn.vmap": (
        nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})(D_OUT),
        None,
    ),
    "one that keeps notes": (Noted(), None),
    "one with more beside": (OneMore(), None),
    "an einsum with a field": (nn.Einsum((2, D_IN, 5), "btd,ndh->btnh"), None),
    "an einsum of one's own": (WithEquation(), None),
    "an embedding": (nn.Embed(9, D_OUT), IDS),
    "a convolution": (nn.Conv(D_OUT, (2, 2)), IMAGE),
}


@pytest.mark.parametrize(
    "what",
    breadth(
        LINEAR,
        "a Dense",
        "one that keeps its kernel transposed",
        "an einsum with a field",
    ),
)
def test_running_is_merging_for_any_number_of_rows(what):
    module, x = LINEAR[what]
    backbone, delta = attached(module, x, lora_r=2)
    train_deltas(delta)
    merged = delta.merge(backbone.params)
    attached_params = backbone.params
    delta.detach()
    plain = backbone.module
    delta.attach()
    for rows in (1, 200):
        x = x_of(rows) if LINEAR[what][1] is None else jnp.repeat(LINEAR[what][1], rows, 0)[:20]
        run = backbone(x, params=attached_params)
        want = plain.apply({"params": merged}, x)
        np.testing.assert_allclose(run, want, rtol=0, atol=1e-4 * float(jnp.abs(want).max()))
        base = plain.apply({"params": jdelta.prune(attached_params, delta)}, x)
        assert jnp.abs(run - base).max() > 1e-3


OTHER = "changed the output by something else than x·D: .* off, where x·D is up to .* for an input of shape"
NOT_LINEAR = {
    "a ReLU after it": (Own(lambda x, k: nn.relu(x @ k)), None, OTHER),
    "a tanh before it": (Own(lambda x, k: jnp.tanh(x) @ k), None, OTHER),
    "a ReLU on heads": (Own(lambda x, k: nn.relu(jnp.einsum("...d,dnh->...nh", x, k)), (D_IN, 2, 5)), None, OTHER),
    "a norm of its columns": (WeightNorm(D_OUT), None, OTHER),
    "weights that are cut off": (Own(lambda x, k: x @ jnp.clip(k, -2, 2)), None, OTHER),
    "an output that is cut off": (Own(lambda x, k: jnp.clip(x @ k, -50, 50)), None, OTHER),
    "a soft cap far out": (Own(lambda x, k: 50 * jnp.tanh(x @ k / 50)), None, OTHER),
    "a scale that is a leaf": (Scaled(), None, OTHER),
    "twice a Dense": (Doubled(D_OUT), None, OTHER),
    "a kernel and its transpose": (Own(lambda x, k: x @ k + x @ k.T, (D_IN, D_IN)), None, OTHER),
    "a mean over rows": (Own(lambda x, k: (x - x.mean(1, keepdims=True)) @ k), None, OTHER),
    "another function of many rows": (Switches(), None, r"of shape \(1, 256, 6\)"),
    "dropout inside that a field turns on": (Trained(), None, f"{OTHER}.*training=True"),
    "dropout inside": (Dropped(), None, f"{OTHER}.*deterministic=False"),
    "statistics in another collection": (Standardised(), None, OTHER),
    "a product in float8": (
        nn.Dense(D_OUT, dot_general_cls=fp8_ops.Fp8DotGeneralOp),
        None,
        OTHER,
    ),
    "a dot_general of one's own": (nn.Dense(D_OUT, dot_general=lambda *a, **k: nn.relu(low()(*a))), None, OTHER),
    "an embedding with a factor": (ScaledEmbed(9, D_OUT), IDS, OTHER),
    "a convolution with a ReLU": (Shifted(D_OUT, (2, 2)), IMAGE, OTHER),
    "an einsum with a ReLU": (WithEquation(nn.relu), None, OTHER),
    "int8 with a ReLU": (Quantised(nn.relu), None, "not linear in its input either"),
    "its kernel alone": (Own(lambda x, k: jnp.zeros((*x.shape[:-1], D_OUT))), None, OTHER),
}


@pytest.mark.parametrize(
    "what",
    breadth(
        NOT_LINEAR,
        "a ReLU after it",
        "a tanh before it",
        "a norm of its columns",
        "another function of many rows",
        "a product in float8",
    ),
)
def test_what_is_not_linear_is_refused_with_the_reason(what):
    module, x, reason = NOT_LINEAR[what]
    root = nn.Sequential([module])
    x = x_of(3) if x is None else x
    backbone = jdelta.Backbone(root, root.init(jax.random.key(1), x), dummy_inputs=(x,))
    before, carrier = backbone.params, backbone.module
    name = "layers_0.einsum" if isinstance(module, WithEquation) else "layers_0"
    remedy = r"Name a linear module .* an adapter.* jdelta\.register_linear"
    with pytest.raises(
        TypeError, match=rf"LoraModel at {name} \(\w+\): .*not known to be linear in '\w+'.*{reason}.*{remedy}"
    ):
        jdelta.LoraModel(backbone, [name], lora_r=2)
    assert backbone.params is before
    assert backbone.module is carrier


def test_a_type_that_is_registered_is_taken_as_it_is_said_and_no_other():
    class Mine(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.sin(x @ self.param("w", KERNEL, (D_OUT, D_IN)).T)

    class Below(Mine):
        pass

    with pytest.raises(TypeError, match="no kernel of its own"):
        attached(Mine())
    jdelta.register_linear(Mine, weights="w", equation="...i,oi->...o")
    backbone, delta = attached(Mine(), lora_r=2)
    assert backbone.params["layers_0"]["lora"]["a"].shape == (D_IN, 2)
    train_deltas(delta)
    own = backbone.params["layers_0"]["lora"]
    want = backbone.params["layers_0"]["w"] + 8 * (own["a"] @ own["b"]).T
    np.testing.assert_allclose(delta.merge()["layers_0"]["w"], want, atol=1e-6)
    with pytest.raises(TypeError, match="is not known to be linear in 'w'"):
        attached(Below())


def test_an_einsum_whose_equation_is_in_its_field_or_call_can_be_registered():
    class Field(nn.Module):
        einsum_str: str

        @nn.compact
        def __call__(self, x):
            return jnp.einsum(self.einsum_str, x, self.param("w", KERNEL, (2, D_IN, 5)))

    jdelta.register_linear(Field, weights="w", equation=None)
    backbone, _ = attached(Field("btd,ndh->btnh"), lora_r=2)
    assert backbone.params["layers_0"]["lora"]["b"].shape == (2, 2, 5)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((3,), TypeError),
        ((dict,), TypeError),
        ((Own, ""), TypeError),
        ((Own, "kernel", "i->o"), ValueError),
        ((Own, "kernel", "...i,iq->...o"), ValueError),
    ],
)
def test_what_cannot_be_registered(arguments, error):
    with pytest.raises(error, match="register_linear"):
        jdelta.register_linear(*arguments)


def test_modules_that_are_alike_are_tried_once_and_those_of_flax_never(monkeypatch):
    tried = []
    problem = probing.problem
    monkeypatch.setattr(probing, "problem", lambda *a: tried.append(a) or problem(*a))
    linear._tried.clear()

    def layer():  # each with initialisers and functions of its own
        return Own(lambda x, k: x @ k, (D_IN, D_IN))

    for module in (nn.Sequential([layer() for _ in range(5)]), nn.Sequential([nn.Dense(D_IN) for _ in range(5)])):
        backbone = jdelta.Backbone(module, dummy_inputs=(x_of(3),))
        jdelta.LoraModel(backbone, [f"layers_{i}" for i in range(5)], lora_r=2)
    assert len(tried) == 1
    model = build("gpt2", "FlaxGPT2LMHeadModel", _do_init=False)
    jdelta.LoraModel(model, ["c_attn", "mlp.c_proj"])
    assert len(tried) == 1


def test_a_module_that_keeps_notes_still_does_with_many_rows():
    backbone, delta = attached(Noted(), lora_r=2)
    train_deltas(delta)
    for rows in (2, 300):
        _, kept = backbone.module.apply({"params": backbone.params}, x_of(rows), mutable=["intermediates"])
        assert kept["intermediates"]["layers_0"]["y"][0].shape == (1, rows, D_OUT)


@pytest.mark.parametrize("lift", breadth(["scan", "vmap"], "scan"))
@pytest.mark.parametrize("f", [jnp.matmul, lambda x, k: nn.relu(x @ k)])
def test_modules_inside_lifted_transforms_are_tried_as_they_see_themselves(lift, f):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + Own(f, (D_IN, D_IN), name="own")(x), None

    class Lifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            if lift == "scan":
                return nn.scan(nn.remat(Layer), **axes, length=3)(name="layers")(x, None)[0]
            return nn.vmap(Layer, **axes, in_axes=(0, None), axis_size=1)(name="layers")(x, None)[0]

    backbone = jdelta.Backbone(Lifted(), dummy_inputs=(x_of(3),))
    if f is not jnp.matmul:
        with pytest.raises(TypeError, match=r"layers\.own \(Own\): .*not known to be linear in 'kernel'"):
            jdelta.LoraModel(backbone, ["own"], lora_r=2)
        return
    delta = jdelta.LoraModel(backbone, ["own"], lora_r=2)
    params = noisy(Lifted().init(jax.random.key(0), x_of(3))["params"])
    grafted = jdelta.graft(params, noisy(delta.init(0)))
    for rows in (2, 200):
        want = Lifted().apply({"params": delta.merge(grafted)}, x_of(rows))
        np.testing.assert_allclose(backbone(x_of(rows), params=grafted), want, rtol=1e-4, atol=1e-4)


def test_trying_allocates_nothing_of_the_model_and_draws_from_no_key_of_the_users():
    module = Own(jnp.matmul)
    shapes = jax.eval_shape(nn.Sequential([module]).init, jax.random.key(0), x_of(3))["params"]
    backbone = jdelta.Backbone(nn.Sequential([module]), shapes, dummy_inputs=(x_of(3),))
    state = np.random.get_state()[1].copy()
    delta = jdelta.LoraModel(backbone, ["layers_0"], lora_r=2)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(backbone.params))
    chex.assert_trees_all_equal(delta.init(3), attached(module, lora_r=2)[1].init(3))


def test_a_module_of_ones_own_that_computes_in_half_precision_is_tried_in_float32():
    class Half(nn.Module):
        dtype: object = jnp.bfloat16

        @nn.compact
        def __call__(self, x):
            return x.astype(self.dtype) @ self.param("kernel", KERNEL, (D_IN, D_OUT)).astype(self.dtype)

    backbone, _ = attached(Half(), lora_r=2)
    assert backbone(x_of(3)).dtype == jnp.bfloat16


def test_an_update_beside_an_int8_kernel_is_its_formula_for_any_number_of_rows():
    backbone, delta = attached(Quantised(), lora_r=2)
    train_deltas(delta)
    own = backbone.params["layers_0"]["lora"]
    for rows in (2, 300):
        x = x_of(rows)
        want = Quantised().apply({"params": {k: backbone.params["layers_0"][k] for k in ("kernel", "scale")}}, x)
        np.testing.assert_allclose(backbone(x), want + 8 * x @ own["a"] @ own["b"], rtol=1e-5, atol=1e-4)


def test_arithmetic_knows_the_axes_of_weights_of_any_name():
    class Pairs(nn.Module):
        @nn.compact
        def __call__(self, equation, x):
            return jnp.einsum(equation, x, self.param("w", KERNEL, (2, 3, 2, 5)))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Pairs(name="pairs")("bij,ijop->bop", x)

    x = jnp.ones((4, 2, 3))
    backbone = jdelta.Backbone(Net(), Net().init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
    delta = jdelta.LoraModel(backbone, ["pairs"], lora_r=2)  # as many ranks as there are in two other axes
    train_deltas(delta)
    found = delta.finetuned()
    total = jdelta.weighted_sum([found, found], [0.5, 0.5], "svd", rank=2)

    def update(delta, scale):
        return scale * np.tensordot(delta.values["pairs.lora.a"], delta.values["pairs.lora.b"], 1)

    np.testing.assert_allclose(update(total, 1), update(found, 8), rtol=1e-4, atol=1e-5)


class HardCoded(nn.Module):
    """Says nowhere but in its code how large it is."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", KERNEL, (300, 300))


@pytest.mark.parametrize(
    ("module", "largest"),
    [(Own(jnp.matmul, (2**17, 2**15)), 50_000), (Renamed(2**15), 50_000), (HardCoded(), 300 * 300)],
)
def test_a_large_module_is_tried_in_a_smaller_copy_where_there_can_be_one(module, largest, monkeypatch):
    sizes = []
    draw = probing._random
    monkeypatch.setattr(probing, "_random", lambda *a: [out := draw(*a), sizes.append(out.size)][0])
    linear._tried.clear()
    width = 300 if isinstance(module, HardCoded) else 2**17
    x = jax.ShapeDtypeStruct((1, 3, width), jnp.float32)
    backbone = jdelta.Backbone(nn.Sequential([module]), dummy_inputs=(x,))
    delta = jdelta.LoraModel(backbone, ["layers_0"], lora_r=2)
    assert delta.shapes()["layers_0"]["lora"]["a"].shape == (width, 2)
    assert max(sizes) <= largest


def test_a_large_module_that_is_not_linear_is_refused_too():
    x = jax.ShapeDtypeStruct((1, 3, 2**17), jnp.float32)
    root = nn.Sequential([Own(lambda x, k: nn.relu(x @ k), (2**17, 2**15))])
    with pytest.raises(TypeError, match=OTHER):
        jdelta.LoraModel(jdelta.Backbone(root, dummy_inputs=(x,)), ["layers_0"], lora_r=2)


def test_a_module_that_is_too_large_and_has_no_smaller_copy_is_to_be_registered(monkeypatch):
    monkeypatch.setattr(probing, "_LARGEST", 1000)
    linear._tried.clear()
    x = jax.ShapeDtypeStruct((1, 3, 300), jnp.float32)
    with pytest.raises(TypeError, match=r"too large to try that: kernel has shape \(300, 300\).*register_linear"):
        jdelta.LoraModel(jdelta.Backbone(nn.Sequential([HardCoded()]), dummy_inputs=(x,)), ["layers_0"], lora_r=2)
    linear._tried.clear()


@pytest.mark.slow
def test_gradients_past_a_module_with_a_non_linearity_beside_its_product(monkeypatch):
    backbone, delta = attached(Own(lambda x, k: x @ k + nn.relu(x), (D_IN, D_IN)), lora_r=2)
    train_deltas(delta)
    x = x_of(200)
    folds = []
    folded = products.fused
    monkeypatch.setattr("jdelta.core.products.fused", lambda *a: folds.append(1) or folded(*a))

    def gradients():
        return jax.grad(lambda p, x: jnp.sum(jnp.sin(backbone(x, params=p))), (0, 1))(backbone.params, x)

    found = gradients()
    assert bool(folds) == jdelta.core.products.on_cpu()
    monkeypatch.setattr("jdelta.core.products.fusing_is_cheaper", lambda *_: False)
    chex.assert_trees_all_close(found, gradients(), rtol=1e-4, atol=1e-3)


def test_an_einsum_with_weights_for_each_row_does_not_go_to_peft(tmp_path):
    x = jax.random.normal(jax.random.key(0), (2, 3, D_IN))
    delta = attached(nn.Einsum((2, D_IN, 5), "bed,bdf->bef", use_bias=False), x, lora_r=2)[1]  # 2 rows, and rank 2
    train_deltas(delta)
    with pytest.raises(ValueError, match=r"layers_0: PEFT has no module with weights for each row, as 'bed,bdf->bef'"):
        delta.to_peft(tmp_path)
    assert not list(tmp_path.iterdir())


class Shifted(nn.Module):
    """A linear module whose bias has a name of its own."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(1.0), (x.shape[-1], 6))
        return x @ w + self.param("shift", nn.initializers.normal(1.0), (6,))


@pytest.mark.parametrize("rows", [4, 64])
def test_a_bias_of_another_name_is_no_part_of_what_the_weight_makes(rows):
    jdelta.register_linear(Shifted, weights="w")
    x, module = jax.random.normal(jax.random.key(0), (rows, 8)), nn.Sequential([Shifted()])
    backbone = jdelta.Backbone(module, module.init(jax.random.key(1), x)["params"], (x,))
    for method in (jdelta.IA3Config(feedforward_modules=[]), jdelta.RoadConfig(group_size=2)):
        with pytest.raises(TypeError, match=r"'shift' besides 'w'"):
            jdelta.DeltaModel(backbone, ["layers_0"], method=method)
    delta = jdelta.LoraModel(backbone, ["layers_0"], lora_r=2, use_dora=True)  # its product reads the output
    trains, frozen = delta.partition()
    backbone.params = jdelta.combine(jax.tree.map(lambda leaf: leaf + 0.3, trains), frozen)
    out = backbone(x)
    delta.merge()
    np.testing.assert_allclose(backbone(x), out, rtol=1e-5, atol=1e-5)
