"""The operations, on linen modules of every kind that makes trouble."""

import dataclasses
import inspect
import threading

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiers import breadth

import jdelta
from jdelta.hosts.linen.instrument import attachments_of

X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)


def backbone_of(module, *inputs, **kwargs):
    inputs = inputs or (X,)
    params = module.init(jax.random.key(1), *inputs, **kwargs)["params"]
    return jdelta.Backbone(module, params, dummy_inputs=inputs, dummy_kwargs=kwargs)


class Scale(nn.Module):
    init: float = 2.0

    @nn.compact
    def __call__(self, x):
        return x * self.param("scale", nn.initializers.constant(self.init), ())


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="one")(x)
        return nn.Dense(3, name="two")(jnp.tanh(x))


def mlp(x, params, after=lambda y: y, before=lambda x: x):
    one = x @ params["one"]["kernel"] + params["one"]["bias"]
    return after(before(jnp.tanh(one)) @ params["two"]["kernel"] + params["two"]["bias"])


@pytest.mark.parametrize("where", ["after", "before"])
def test_a_sequential_layer_runs_on_its_side(where):
    backbone = backbone_of(MLP())
    base = backbone.params
    jdelta.DeltaModel(backbone, name="s").insert_sequential_module("two", Scale(), where=where)
    assert backbone.params["two"]["s"]["scale"] == 2
    chex.assert_trees_all_close(backbone(X), mlp(X, base, **{where: lambda v: 2 * v}), atol=1e-6)


def test_a_parallel_layer_adds_to_the_output():
    backbone = backbone_of(MLP())
    base = backbone.params
    jdelta.DeltaModel(backbone, name="p").insert_parallel_module("two", nn.Dense(3))
    extra = backbone.params["two"]["p"]
    hidden = jnp.tanh(X @ base["one"]["kernel"] + base["one"]["bias"])
    expected = mlp(X, base) + hidden @ extra["kernel"] + extra["bias"]
    chex.assert_trees_all_close(backbone(X), expected, atol=1e-6)


def test_a_span_goes_from_one_input_to_a_later_output():
    backbone = backbone_of(MLP())
    base = backbone.params
    jdelta.DeltaModel(backbone, name="p").insert_parallel_module("two", nn.Dense(3, use_bias=False), start="one")
    expected = mlp(X, base) + X @ backbone.params["two"]["p"]["kernel"]
    chex.assert_trees_all_close(backbone(X), expected, atol=1e-6)


def test_a_replaced_module_does_not_run():
    backbone = backbone_of(MLP())
    jdelta.DeltaModel(backbone, name="r").replace_module("two", Scale(3.0))
    base = backbone.params
    chex.assert_trees_all_close(backbone(X), 3 * jnp.tanh(X @ base["one"]["kernel"] + base["one"]["bias"]), atol=1e-6)


def test_any_linen_module_can_be_put_in():
    class Gate(nn.Module):
        def setup(self):
            self.norm = nn.LayerNorm()
            self.mlp = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(3)])

        def __call__(self, y):
            return nn.sigmoid(self.mlp(self.norm(y))) * y

    backbone = backbone_of(MLP())
    before = backbone(X)
    delta = jdelta.DeltaModel(backbone, name="gate")
    delta.insert_sequential_module("two", Gate())
    assert set(backbone.params["two"]["gate"]) == {"norm", "mlp"}
    inner = {"params": backbone.params["two"]["gate"]}
    chex.assert_trees_all_close(backbone(X), Gate().apply(inner, before), atol=1e-6)


def test_patterns_put_a_layer_on_several_modules_and_twice_on_one():
    backbone = backbone_of(MLP())
    delta = jdelta.DeltaModel(backbone, name="s")
    delta.insert_sequential_module(["one", "two"], Scale(1.0))
    before = backbone(X)
    delta.insert_sequential_module("two", Scale(5.0))
    assert delta.targets == ["one", "two"]
    assert set(backbone.params["two"]["s"]) == {"scale", "1"}
    chex.assert_trees_all_close(backbone(X), 5 * before, atol=1e-6)


def test_deltas_on_one_module_run_in_the_order_of_attaching():
    backbone = backbone_of(MLP())
    base = backbone(X)
    first, second = (jdelta.DeltaModel(backbone, name=name) for name in "ab")
    first.insert_sequential_module("two", Scale(2.0))
    second.insert_parallel_module("two", nn.Dense(3, kernel_init=nn.initializers.zeros, bias_init=nn.initializers.ones))
    chex.assert_trees_all_close(backbone(X), 2 * base + 1, atol=1e-6)
    first.detach()
    chex.assert_trees_all_close(backbone(X), base + 1, atol=1e-6)
    first.attach()  # back in its old place, not at the end: 2·base + 1, not 2·(base + 1)
    chex.assert_trees_all_close(backbone(X), 2 * base + 1, atol=1e-6)


def test_detach_and_attach_in_any_order_keep_every_bit():
    backbone = backbone_of(MLP())
    base, y = backbone.params, backbone(X)
    deltas = []
    for name in "abc":
        deltas.append(jdelta.DeltaModel(backbone, name=name))
        deltas[-1].insert_sequential_module("two", Scale(1.5))
    full, y_full = backbone.params, backbone(X)
    for i in (1, 0, 2):
        deltas[i].detach()
    chex.assert_trees_all_equal(backbone.params, base)
    assert (backbone(X) == y).all()
    for i in (2, 0, 1):
        deltas[i].attach()
    chex.assert_trees_all_equal(backbone.params, full)
    assert (backbone(X) == y_full).all()


# --- what modules take and return


@flax.struct.dataclass
class Output:
    hidden: jax.Array
    extra: jax.Array


class Returns(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, *, mask=None, hidden=None):
        y = nn.Dense(4, name="inner")(hidden)
        return {"tuple": (y, mask), "list": [y, mask], "dataclass": Output(y, mask), "array": y}[self.kind]


class Caller(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        return Returns(self.kind, name="sub")(hidden=x)


@pytest.mark.parametrize("kind", ["array", "tuple", "list", "dataclass"])
def test_tuples_model_outputs_and_keyword_only_calls(kind):
    backbone = backbone_of(Caller(kind))
    before = backbone(X)
    jdelta.DeltaModel(backbone, name="s").insert_sequential_module("sub", Scale(2.0))
    after = backbone(X)
    assert type(after) is type(before)
    chex.assert_trees_all_close(after, jax.tree.map(lambda v: 2 * v, before))


def test_the_main_input_is_the_first_array_of_the_signature_not_of_the_call():
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, hidden, mask=None):
            return nn.Dense(4)(hidden) * mask

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Attention(name="attn")(mask=jnp.ones((2, 1)), hidden=x)

    backbone = backbone_of(Model())
    base = backbone.params["attn"]["Dense_0"]
    jdelta.DeltaModel(backbone, name="s").insert_sequential_module("attn", Scale(2.0), where="before")
    chex.assert_trees_all_close(backbone(X), 2 * X @ base["kernel"] + base["bias"], atol=1e-6)


# --- lifted transforms


class Residual(nn.Module):
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dropout(self.dropout, deterministic=True)(nn.Dense(4, name="dense")(x)), None


class Stack(nn.Module):
    lift: str

    @nn.compact
    def __call__(self, x):
        inner = nn.remat(Residual) if "remat" in self.lift else Residual
        if "scan" in self.lift:
            layers = nn.scan(inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return layers(name="layers")(x, None)[0]
        for i in range(3):
            x = inner(name=f"layers_{i}")(x)[0]
        return x


@pytest.mark.parametrize("lift", breadth(["scan", "scan remat", "remat"], "scan remat"))
def test_scan_and_remat_agree_with_the_plain_loop(lift):
    backbone = backbone_of(Stack(lift))
    delta = jdelta.LoraModel(backbone, modified_modules=["dense"], lora_r=2)
    tree = jax.tree.map(lambda a: a + 0.1, backbone.params)

    layers = [tree[f"layers_{i}"] for i in range(3)] if "scan" not in lift else None
    if layers is None:
        assert tree["layers"]["dense"]["lora"]["a"].shape == (3, 4, 2)
        assert len(np.unique(backbone.params["layers"]["dense"]["lora"]["a"])) == 24  # split rngs: all differ
        layers = [jax.tree.map(lambda a, i=i: a[i], tree["layers"]) for i in range(3)]

    def plain(layers, x):
        for p in layers:
            dense = p["dense"]
            x = x + x @ dense["kernel"] + dense["bias"] + (16 / 2) * x @ dense["lora"]["a"] @ dense["lora"]["b"]
        return x

    chex.assert_trees_all_close(backbone(X, params=tree), plain(layers, X), rtol=1e-5)
    grads = jax.jit(jax.grad(lambda p: backbone(X, params=p).sum()))(tree)
    expected = jax.grad(lambda ls: plain(ls, X).sum())(layers)
    if "scan" in lift:
        grads = [jax.tree.map(lambda a, i=i: a[i], grads["layers"]) for i in range(3)]
    else:
        grads = [grads[f"layers_{i}"] for i in range(3)]
    chex.assert_trees_all_close(grads, expected, rtol=1e-4)
    assert delta.targets == (["layers.dense"] if "scan" in lift else [f"layers_{i}.dense" for i in range(3)])


def test_a_span_inside_scan():
    backbone = backbone_of(Stack("scan remat"))
    before = backbone(X)
    jdelta.DeltaModel(backbone, name="p").insert_parallel_module(
        "dense", nn.Dense(4, kernel_init=nn.initializers.zeros), start="layers"
    )
    chex.assert_trees_all_close(backbone(X), before)


def test_vmapped_modules_get_a_delta_each():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            heads = nn.vmap(
                nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3
            )
            return heads(5, name="heads")(x)

    backbone = backbone_of(Model())
    before = backbone(X)
    jdelta.LoraModel(backbone, modified_modules=["heads"], lora_r=2, lora_alpha=2)
    leaves = backbone.params["heads"]["lora"]
    assert (leaves["a"].shape, leaves["b"].shape) == ((3, 4, 2), (3, 2, 5))
    tree = jax.tree.map(lambda a: a + 0.1, leaves)
    params = {"heads": {**backbone.params["heads"], "lora": tree}}
    expected = before + jnp.einsum("bi,kir,kro->kbo", X, tree["a"], tree["b"])
    chex.assert_trees_all_close(backbone(X, params=params), expected, rtol=1e-5)


def test_a_lifted_root_and_a_lifted_method():
    class Inner(nn.Module):
        @nn.remat
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="dense")(x)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Inner(name="inner")(x)

    backbone = backbone_of(nn.remat(Model)())
    before = backbone(X)
    jdelta.DeltaModel(backbone, name="s").insert_sequential_module(["inner", "dense"], Scale(2.0))
    chex.assert_trees_all_close(backbone(X), 4 * before, rtol=1e-6)


def test_a_module_that_calls_its_super_is_edited_once():
    class Double(nn.Dense):
        def __call__(self, x):
            return 2 * super().__call__(x)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Double(4, name="d")(x)

    backbone = backbone_of(Model())
    before = backbone(X)
    jdelta.DeltaModel(backbone, name="s").insert_sequential_module("d", Scale(3.0))
    chex.assert_trees_all_close(backbone(X), 3 * before, rtol=1e-6)


def test_a_module_called_several_times_shares_one_delta():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4, name="d")
            return layer(layer(x))

    backbone = backbone_of(Model())
    base = backbone.params["d"]
    jdelta.DeltaModel(backbone, name="s").insert_sequential_module("d", Scale(3.0))

    def twice(x):
        return 3 * (x @ base["kernel"] + base["bias"])

    chex.assert_trees_all_close(backbone(X), twice(twice(X)), rtol=1e-5)


def test_a_nested_apply_is_not_taken_for_the_root_nor_its_parts_for_the_models():
    class Head(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="dense", use_bias=False)(x)

    class Model(nn.Module):
        def setup(self):
            self.dense = nn.Dense(4)
            self.head = Head()

        def __call__(self, x):
            x = self.dense(x)
            return self.head.apply({"params": {"dense": {"kernel": jnp.eye(4)}}}, x)

    backbone = backbone_of(Model())
    before = backbone(X)
    delta = jdelta.DeltaModel(backbone, name="s")
    delta.insert_sequential_module("dense", Scale(2.0))  # not the nested one of the same path
    chex.assert_trees_all_close(backbone(X), 2 * before, rtol=1e-6)
    with pytest.raises(ValueError, match=r"'head' means 'head', which cannot be a target: .*nested apply"):
        delta.insert_sequential_module("head", Scale(2.0))


# --- dropout


class Noise(nn.Module):
    """Returns what it is told of dropout."""

    @nn.compact
    def __call__(self, y, deterministic):
        return y * 0 + deterministic


class TrainNoise(nn.Module):
    @nn.compact
    def __call__(self, y, train):
        return y * 0 + train


class Told(nn.Module):
    argument: str | None = None
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic=None, train=None):
        if self.argument == "deterministic":
            return ByArgument(name="sub")(x, deterministic)
        if self.argument == "train":
            return ByTrain(name="sub")(x, train=train)
        if self.argument == "default":
            return ByDefault(name="sub")(x)
        return nn.Dense(4, name="dense")(x)


class ByArgument(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        return nn.Dense(4, name="dense")(x)


class ByTrain(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(4, name="dense")(x)


class ByDefault(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=False):
        return nn.Dense(4, name="dense")(x)


@pytest.mark.parametrize(
    ("module", "kwargs", "rngs", "expected"),
    [
        (Told("deterministic"), {"deterministic": True}, {"dropout": jax.random.key(0)}, 1),
        (Told("deterministic"), {"deterministic": False}, None, 0),
        (Told("train"), {"train": True}, None, 0),
        (Told("train"), {"train": False}, {"dropout": jax.random.key(0)}, 1),
        (Told("default"), {"deterministic": True}, None, 0),  # the nearest call decides, by its default
        (Told(None, deterministic=True), {}, {"dropout": jax.random.key(0)}, 1),  # a field
        (Told(None), {}, None, 1),  # none in sight: on exactly if a dropout rng is given
        (Told(None), {}, {"dropout": jax.random.key(0)}, 0),
    ],
)
def test_a_layer_is_told_of_dropout_by_the_nearest_enclosing_call(module, kwargs, rngs, expected):
    backbone = backbone_of(module, **kwargs)
    jdelta.DeltaModel(backbone, name="a").insert_sequential_module("dense", Noise())
    assert (backbone(X, rngs=rngs, **kwargs) == expected).all()
    jdelta.DeltaModel(backbone, name="b").insert_sequential_module("dense", TrainNoise())
    assert (backbone(X, rngs=rngs, **kwargs) == 1 - expected).all()


# --- the instrumented module


def test_the_module_keeps_name_doc_signature_and_fields():
    backbone = backbone_of(Stack("scan"))
    original = backbone.module
    delta = jdelta.LoraModel(backbone, modified_modules=["dense"], lora_r=2)
    module = backbone.module
    assert isinstance(module, nn.Module)
    assert isinstance(module, Stack)
    assert type(module).__name__ == "Stack"
    assert type(module).__qualname__ == Stack.__qualname__
    assert type(module).__doc__ == Stack.__doc__
    assert inspect.signature(module.__call__) == inspect.signature(original.__call__)
    assert inspect.signature(module.apply) == inspect.signature(original.apply)
    assert [f.name for f in dataclasses.fields(module)] == [f.name for f in dataclasses.fields(original)]
    assert module.lift == "scan"
    assert attachments_of(module)[0].name == delta.name


def test_init_and_apply_of_the_module_run_the_deltas():
    backbone = backbone_of(MLP())
    jdelta.DeltaModel(backbone, name="s").insert_sequential_module("two", Scale(2.0))
    variables = backbone.module.init(jax.random.key(0), X)
    assert variables["params"]["two"]["s"]["scale"] == 2
    y, state = backbone.module.apply(variables, X, mutable=["intermediates"], capture_intermediates=True)
    assert (y == backbone(X, params=variables["params"])).all()
    assert "intermediates" in state
    assert (backbone.module.init_with_output(jax.random.key(0), X)[0] == y).all()


def test_a_bound_module_would_run_without_the_delta_and_is_refused():
    backbone = backbone_of(MLP())
    jdelta.DeltaModel(backbone, name="s").insert_sequential_module("two", Scale(2.0))
    with pytest.raises(NotImplementedError, match=r"Use module\.apply"):
        backbone.module.bind({"params": backbone.params})


def test_a_module_with_deltas_inside_another_would_run_without_them_and_is_refused():
    class Outer(nn.Module):
        inner: nn.Module

        def __call__(self, x):
            return self.inner(x)

    backbone = backbone_of(MLP())
    delta = jdelta.DeltaModel(backbone, name="s")
    delta.insert_sequential_module("two", Scale(2.0))
    params = {"inner": backbone.params}
    with pytest.raises(ValueError, match="MLP carries deltas and cannot be a part of Outer"):
        Outer(backbone.module).apply({"params": params}, X)


def test_two_threads_with_their_own_deltas_do_not_disturb_each_other():
    scales = [2.0, 3.0]
    backbones = [backbone_of(MLP()) for _ in scales]
    expected = [scale * backbone(X) for scale, backbone in zip(scales, backbones, strict=True)]
    gate = threading.Barrier(2)
    problems = []

    def work(i):
        try:
            gate.wait(timeout=30)
            delta = jdelta.DeltaModel(backbones[i], name="s")
            delta.insert_sequential_module("two", Scale(scales[i]))
            for _ in range(20):
                chex.assert_trees_all_close(backbones[i](X), expected[i], rtol=1e-6)
                jax.jit(lambda p: backbones[i](X, params=p))(backbones[i].params).block_until_ready()
                delta.detach()
                chex.assert_trees_all_close(backbones[i](X), expected[i] / scales[i], rtol=1e-6)
                delta.attach()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads]
    [thread.join(timeout=120) for thread in threads]
    assert not problems, problems


def test_a_jitted_function_sees_attach_and_detach():
    backbone = backbone_of(MLP())
    before = backbone(X)
    call = jax.jit(lambda p: backbone(X, params=p))
    delta = jdelta.DeltaModel(backbone, name="s")
    delta.insert_sequential_module("two", Scale(2.0))
    chex.assert_trees_all_close(call(backbone.params), 2 * before, rtol=1e-6)
    delta.detach()
    chex.assert_trees_all_close(call(backbone.params), before, rtol=1e-6)
