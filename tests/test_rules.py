"""Rules of weights: each form in which they run gives what `update` means, forward and backward, on all linear modules.

The reference is the bare model with `W + update(W)` in the place of `W`. Sums are taken in another order: outputs and
gradients of size 1 to 10 in float32 agree to 1e-4.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from own_methods import defined
from tiers import breadth
from weight_methods import METHODS

import jdelta
from jdelta.core import weights
from jdelta.methods.lora_rules import LoraRule
from jdelta.methods.trainable_tokens import TrainableTokensRule
from jdelta.trees import surgery


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class Wrapped(nn.Module):
    """A module inside another, once or in `nn.scan` and `nn.remat`."""

    make: Any
    scan: bool = False

    @nn.compact
    def __call__(self, x):
        if not self.scan:
            return self.make(name="host")(x)

        class Body(nn.Module):
            make: Any

            @nn.compact
            def __call__(self, x, _):
                y = self.make(name="host")(x)
                return x, y

        lifted = nn.scan(nn.remat(Body), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return lifted(self.make, name="layers")(x, None)[1].sum(0)


class NnxWrapped(nnx.Module):
    """A module inside another, once or in `nnx.scan` and `nnx.remat`."""

    def __init__(self, make, scan=False, rngs=None):
        self.scan, rngs = scan, rngs or nnx.Rngs(0)
        if scan:
            self.layers = nnx.vmap(lambda rngs: NnxWrapped(make, rngs=rngs))(rngs.split(2))
        else:
            self.host = make(rngs=rngs)

    def __call__(self, x):
        if not self.scan:
            return self.host(x)
        run = nnx.scan(nnx.remat(lambda layer, x: layer(x)), in_axes=(0, None), out_axes=0)
        return run(self.layers, x).sum(0)


class Heads(nnx.Module):
    """As in tunix: an einsum whose weights are called w."""

    def __init__(self, einsum_str, shape, *, rngs):
        self.einsum_str = einsum_str
        self.w = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


def of(cls, *args, **kwargs):
    return lambda name: cls(*args, name=name, **kwargs)


HOSTS = {
    "Dense": (of(nn.Dense, 6), normal(0, 40, 5)),
    "DenseGeneral out": (of(nn.DenseGeneral, (2, 3)), normal(0, 4, 3, 5)),
    "DenseGeneral in": (of(nn.DenseGeneral, 6, axis=(-2, -1)), normal(0, 4, 2, 5)),
    "Einsum heads": (of(nn.Einsum, (5, 2, 3), "BTD,DNH->BTNH"), normal(0, 2, 3, 5)),
    "Einsum experts": (of(nn.Einsum, (2, 5, 6), "BED,EDF->BEF"), normal(0, 4, 2, 5)),
    "Conv": (of(nn.Conv, 6, (3,), strides=2), normal(0, 2, 9, 4)),
    "grouped Conv": (of(nn.Conv, 6, (3, 3), feature_group_count=2), normal(0, 2, 5, 5, 4)),
    "Embed": (of(nn.Embed, 7, 6), jnp.array([[0, 3, 3], [6, 1, 2]])),
    "nnx Linear": (functools.partial(nnx.Linear, 5, 6), normal(0, 40, 5)),
    "nnx LinearGeneral": (functools.partial(nnx.LinearGeneral, (2, 5), 6, axis=(-2, -1)), normal(0, 4, 2, 5)),
    "nnx Einsum": (functools.partial(nnx.Einsum, "BTD,DNH->BTNH", (5, 2, 3), (2, 3)), normal(0, 2, 3, 5)),
    "nnx Einsum w": (functools.partial(Heads, "BTD,DNH->BTNH", (5, 2, 3)), normal(0, 2, 3, 5)),
    "nnx Conv": (functools.partial(nnx.Conv, 4, 6, (3,), strides=2), normal(0, 2, 9, 4)),
    "nnx Embed": (functools.partial(nnx.Embed, 7, 6), jnp.array([[0, 3, 3], [6, 1, 2]])),
}
SCANNED = {host for host in HOSTS if not host.startswith("nnx")} | {"nnx Linear", "nnx Einsum w"}


RULES = {
    **{name: row.rule for name, row in METHODS.items() if row.rule},
    "dora of the docs": lambda: defined()["DoraRule"](rank=2, scale=1.5),
    "tokens": lambda: TrainableTokensRule((3, 0, 6)),
    "scale out": lambda: defined()["ScaleRule"]("out"),
    "scale in": lambda: defined()["ScaleRule"]("in"),
}
FORMS = ["in the call", "accelerator", "fused", "rewritten"]


class OneRule(jdelta.Method):
    kind: str = "lora"

    def rule(self, name):
        return RULES[self.kind]()


OneRule = dataclasses.dataclass(frozen=True)(OneRule)


def fits(rule, host):
    if rule == "tokens":
        return "Embed" in host
    if rule in METHODS and METHODS[rule].only is not None:
        return host in METHODS[rule].only
    return not (rule.startswith("scale in") and any(kind in host for kind in ("Conv", "Embed", "Einsum"))) and not (
        rule.startswith("scale") and host == "Einsum experts"
    )


EVERYWHERE = {"lora", "dora", "hira", "tokens", "scale out", "scale in"}


def is_case(host, rule, form, scan):
    """All forms of some rules; of the others one without a scan, one with it, and one that knows no call."""
    if not fits(rule, host) or (form == "rewritten" and hasattr(RULES[rule](), "side")):
        return False
    few = {("in the call", False), ("fused", host in SCANNED), ("rewritten", False)}
    return rule in EVERYWHERE or (form, scan) in few or (host, rule, form, scan) in QUICK


QUICK = [
    ("Dense", "lora", "fused", True),
    ("Dense", "hira", "in the call", False),
    ("Dense", "miss", "in the call", False),
    ("Dense", "hra", "in the call", True),
    ("DenseGeneral out", "road-2", "in the call", False),
    ("DenseGeneral in", "oft", "in the call", False),
    ("Dense", "dora", "accelerator", False),
    ("Dense", "vera", "fused", True),
    ("Dense", "randlora", "in the call", False),
    ("DenseGeneral in", "gralora", "in the call", True),
    ("Dense", "scale out", "in the call", True),
    ("Dense", "scale in", "in the call", False),
    ("DenseGeneral in", "dora", "rewritten", True),
    ("Einsum experts", "lora", "in the call", False),
    ("grouped Conv", "lora", "accelerator", False),
    ("Embed", "lora", "rewritten", False),
    ("Embed", "tokens", "in the call", True),
    ("nnx Linear", "lora", "fused", True),
    ("nnx Linear", "dora", "rewritten", False),
    ("nnx Einsum w", "hira", "in the call", False),
]
ALL = [
    (host, rule, form, scan)
    for host in HOSTS
    for rule in RULES
    for form in FORMS
    for scan in (False, True)[: 1 + (host in SCANNED)]
    if is_case(host, rule, form, scan)
]


class Model:
    """A wrapped host, of linen or of nnx, and the delta's view of it."""

    def __init__(self, host, scan=False):
        self.make, self.x = HOSTS[host]
        self.scan = scan
        if host.startswith("nnx"):
            self.backbone = NnxWrapped(self.make, scan)
            nnx.update(self.backbone, jax.tree.map(lambda leaf: leaf + 0.1, nnx.state(self.backbone)))  # biases too
            self.given = {"dummy_inputs": (self.x,)}
        else:
            module = Wrapped(self.make, scan)
            params = jax.jit(module.init)(jax.random.key(1), self.x)["params"]
            params = jax.tree.map(lambda leaf: leaf + 0.1, params)
            self.backbone, self.given = jdelta.Backbone(module, params, dummy_inputs=(self.x,)), {}

    @property
    def params(self):
        if isinstance(self.backbone, nnx.Module):
            return nnx.to_pure_dict(nnx.state(self.backbone, nnx.Param))
        return self.backbone.params

    def run(self, params):
        """With what is attached."""
        if isinstance(self.backbone, nnx.Module):
            return _merged(self.backbone, params)(self.x)
        return self.backbone(self.x, params=params)

    def run_bare(self, params):
        if isinstance(self.backbone, nnx.Module):
            return _merged(NnxWrapped(self.make, self.scan), params)(self.x)
        return Wrapped(self.make, self.scan).apply({"params": params}, self.x)


def _merged(model, params):
    graphdef, state = nnx.split(model)
    leaves = surgery.flatten(params)
    assert leaves.keys() == {path for path, _ in nnx.to_flat_state(state)}
    new = nnx.from_flat_state([(path, leaf.replace(leaves[path])) for path, leaf in nnx.to_flat_state(state)])
    return nnx.merge(graphdef, new, copy=True)


def attach(host, rules, form, scan=False):
    model = Model(host, scan)
    weight = "embedding" if "Embed" in host else "w" if host.endswith(" w") else "kernel"
    where = {"modified_parameters": [f"host.{weight}"]} if form == "rewritten" else {"modified_modules": ["host"]}
    deltas = [
        jdelta.DeltaModel(model.backbone, method=OneRule(kind=rule), name=f"d{i}", **where, **model.given)
        for i, rule in enumerate(rules)
    ]
    moved = {}
    for i, (path, leaf) in enumerate(surgery.flatten(model.params).items()):
        own = any(path in delta.paths for delta in deltas)
        moves = own and leaf.dtype != jnp.int32
        moved[path] = leaf + 0.3 * normal(i + 5, *leaf.shape) if moves else leaf
    return model, deltas, surgery.unflatten(moved)


def wanted(model, deltas, params):
    """The bare model's output with the sum of all updates, each at the stored weight, in its weights."""
    leaves = surgery.flatten(params)
    new = {path: leaf for path, leaf in leaves.items() if not any(path in delta.paths for delta in deltas)}
    for delta in deltas:
        for edit in delta._state.attachment.weight_edits:
            own = weights.own_leaves(edit, leaves)
            new[edit.leaf] = new[edit.leaf] + weights.update(edit, leaves[edit.leaf], own)
    return model.run_bare(surgery.unflatten(new))


def choose(form, monkeypatch):
    """Makes one form run wherever it can."""
    if form == "accelerator":
        monkeypatch.setattr("jdelta.core.products.on_cpu", lambda: False)
    if form in ("fused", "in the call"):
        monkeypatch.setattr("jdelta.core.products.fusing_is_cheaper", lambda *_: form == "fused")


def same(found, want):
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", breadth(ALL, *QUICK), ids=lambda case: "-".join(map(str, case)))
def test_each_form_is_what_update_means_forward_and_backward(case, monkeypatch):
    host, rule, form, scan = case
    choose(form, monkeypatch)
    model, deltas, params = attach(host, [rule], form, scan)
    edit = next(edit for edit in deltas[0]._state.attachment.weight_edits if not edit.is_bias)
    trains, frozen = deltas[0].partition(params)
    assert edit.in_call or form == "rewritten"

    def loss(run):
        return lambda own: jnp.sum(jnp.sin(run(jdelta.combine(own, frozen))))

    by_form, by_update = model.run, lambda params: wanted(model, deltas, params)
    same(jax.jit(by_form)(params), jax.jit(by_update)(params))
    jax.tree.map(same, jax.jit(jax.grad(loss(by_form)))(trains), jax.jit(jax.grad(loss(by_update)))(trains))
    same(model.run_bare(deltas[0].merge(params)), by_update(params))


PAIRS = [("lora", "lora"), ("lora", "dora"), ("dora", "scale out"), ("scale out", "scale out"), ("hira", "scale in")]


@pytest.mark.parametrize("pair", breadth(PAIRS, ("dora", "scale out"), ("lora", "lora")))
@pytest.mark.parametrize("form", breadth(["in the call", "fused"], "fused"))
def test_two_changes_of_one_weight_are_summed_and_come_off_in_either_order(pair, form, monkeypatch):
    choose(form, monkeypatch)
    model, deltas, params = attach("Dense", pair, form)
    backbone, x = model.backbone, model.x
    backbone.params = params
    both = backbone(x)
    same(both, wanted(model, deltas, params))
    for first in (0, 1):
        deltas[first].detach()
        alone = backbone(x)
        same(alone, wanted(model, [deltas[1 - first]], jdelta.prune(params, deltas[first])))
        deltas[1 - first].detach()
        deltas[1 - first].attach()
        deltas[first].attach()
        np.testing.assert_array_equal(backbone(x), both)


def test_lora_is_its_formula_in_float64():
    model, _, params = attach("Dense", ["lora"], "in the call")
    host = {key: np.asarray(leaf, np.float64) for key, leaf in params["host"].items() if key in ("kernel", "bias")}
    a, b = (np.asarray(params["host"]["d0"][key], np.float64) for key in "ab")
    x64 = np.asarray(model.x, np.float64)
    want = x64 @ host["kernel"] + host["bias"] + 1.5 * x64 @ a @ b
    np.testing.assert_allclose(model.run(params), want, rtol=1e-5, atol=1e-5)


# --- what can be wrong with a rule


@dataclasses.dataclass(frozen=True)
class BadRule:
    kind: str
    axes: ClassVar = {"d": ("in", "out")}

    def init(self, key, weight):
        if self.kind == "dtype of init":
            return {"d": jnp.zeros(weight.shape, jnp.bfloat16)}
        return {"d": jnp.zeros(weight.shape if self.kind != "axes" else (*weight.shape, 1))}

    def update(self, weight, own):
        return {
            "shape": own["d"].T,
            "dtype": own["d"].astype(jnp.bfloat16),
        }.get(self.kind, own["d"])


class NoUpdate:
    def init(self, key, weight):
        return {}


class Bad(jdelta.Method):
    kind: str = ""

    def rule(self, name):
        return NoUpdate() if self.kind == "no update" else BadRule(self.kind)


Bad = dataclasses.dataclass(frozen=True)(Bad)


@pytest.mark.parametrize("form", ["modified_modules", "modified_parameters"])
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("shape", ValueError, r"BadRule at host\.kernel: update gives shape \(6, 5\), and the weight is \(5, 6\)"),
        ("dtype", TypeError, r"BadRule at host\.kernel: update gives bfloat16"),
        ("dtype of init", TypeError, r"BadRule at host\.kernel: init gives 'd' in bfloat16"),
        ("axes", ValueError, r"BadRule at host\.kernel: axes says that 'd' has 2 axes"),
        ("no update", TypeError, r"the rule NoUpdate at host\.kernel has no init and update"),
    ],
)
def test_a_rule_that_is_wrong_is_an_error_that_names_the_leaf_and_changes_nothing(kind, error, message, form):
    make, x = HOSTS["Dense"]
    module = Wrapped(make)
    backbone = jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
    params, before = backbone.params, backbone.module
    with pytest.raises(error, match=message):
        jdelta.DeltaModel(
            backbone, method=Bad(kind=kind), **{form: ["host" if form == "modified_modules" else "host.kernel"]}
        )
    assert backbone.params is params
    assert backbone.module is before


@dataclasses.dataclass(frozen=True)
class WrongProduct(LoraRule):
    """Right as long as `b` is 0, as it is at the start."""

    def product(self, x, y, own, linear):
        return linear.low_rank(x, own["a"], own["b"])  # without the scale


@pytest.mark.parametrize("host", ["Dense", "DenseGeneral in", "Einsum experts", "grouped Conv", "Embed"])
def test_a_product_that_disagrees_with_update_is_found_and_named_on_demand(host, monkeypatch):
    make, x = HOSTS[host]
    module = Wrapped(make)
    backbone = jdelta.Backbone(module, jax.jit(module.init)(jax.random.key(0), x)["params"], dummy_inputs=(x,))
    before = backbone.module, backbone.params
    with jdelta.checking_products():
        for rule in ("lora", "dora"):
            jdelta.DeltaModel(backbone, ["host"], method=OneRule(kind=rule), name=rule).remove()
        monkeypatch.setitem(RULES, "lora", lambda: WrongProduct(rank=2, scale=1.5))
        with pytest.raises(ValueError, match=r"WrongProduct at host: on random numbers product differs"):
            jdelta.DeltaModel(backbone, ["host"], method=OneRule())
    assert backbone.module is before[0]
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, backbone.params, before[1]))
    delta = jdelta.DeltaModel(backbone, ["host"], method=OneRule())
    with pytest.raises(ValueError, match=r"WrongProduct at host: .* update is what merging adds"):
        delta.check_products()


class Quantised(nn.Module):
    """`x @ (kernel * scale)`, with a kernel of int8."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", lambda key: jax.random.randint(key, (5, 6), -99, 99, jnp.int8))
        scale = self.param("scale", nn.initializers.constant(0.01), ())
        return x @ (kernel * scale)


@pytest.mark.parametrize("rule", ["hira", "delora", "shira", "dora", "scale in"])
def test_a_rule_that_computes_with_codes_of_a_quantised_weight_is_refused(rule):
    x = normal(0, 4, 5)
    backbone = jdelta.Backbone(nn.Sequential([Quantised()]), dummy_inputs=(x,))
    with pytest.raises(TypeError, match=r"computes with the values of layers_0\.kernel, which holds int8"):
        jdelta.DeltaModel(backbone, ["layers_0"], method=OneRule(kind=rule))
    assert jdelta.DeltaModel(backbone, ["layers_0"], method=OneRule(kind="lora")).targets == ["layers_0"]
