"""LoRA on leaves by their names: what no call of a module reaches."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy, train_deltas
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import jdelta

SCALE = 3.0  # lora_alpha / lora_r below


class Experts(nn.Module):
    """Each row of the input goes through its expert, `ids`; by a product with all of them, or in groups."""

    ragged: bool = False

    @nn.compact
    def __call__(self, x, ids):
        wi = self.param("wi", nn.initializers.lecun_normal(batch_axis=0), (3, 4, 5))
        wo = self.param("wo", nn.initializers.lecun_normal(batch_axis=0), (3, 5, 4))
        return (ragged if self.ragged else by_einsum)(x, ids, wi, wo)


def by_einsum(x, ids, wi, wo):
    h = nn.gelu(jnp.einsum("bi,eio->beo", x, wi))
    y = jnp.einsum("beo,eoi->bei", h, wo)
    return jnp.einsum("bei,be->bi", y, jax.nn.one_hot(ids, 3))


def ragged(x, ids, wi, wo):
    order, sizes = jnp.argsort(ids), jnp.bincount(ids, length=3)
    h = nn.gelu(jax.lax.ragged_dot(x[order], wi, sizes))
    return jnp.zeros_like(x).at[order].set(jax.lax.ragged_dot(h, wo, sizes))


class Mixture(nn.Module):
    ragged: bool = False

    @nn.compact
    def __call__(self, x, ids):
        return nn.Dense(4, name="head")(Experts(self.ragged, name="moe")(x, ids))


class Tied(nn.Module):
    """Its embedding's rows are those of the head; both are methods other than `__call__`."""

    def setup(self):
        self.embed = nn.Embed(7, 4)

    def __call__(self, ids):
        return self.embed.attend(jnp.tanh(self.embed(ids)))


class Table(nn.Module):
    def setup(self):
        self.table = self.param("table", nn.initializers.normal(1.0), (7, 4))

    def encode(self, ids):
        return self.table[ids]

    def decode(self, x):
        return x @ self.table.T


class ByMethods(nn.Module):
    def setup(self):
        self.embedder = Table()

    def __call__(self, ids):
        return self.embedder.decode(jnp.tanh(self.embedder.encode(ids)))


class Layer(nn.Module):
    """A weight that goes through a non-linearity: no module around it is linear in it."""

    @nn.compact
    def __call__(self, x, _):
        w = self.param("w", nn.initializers.lecun_normal(), (4, 4))
        return x + jnp.tanh(x @ jnp.tanh(w)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


class Part(nn.Module):
    """A product with a weight that is put into the scope of the module around it."""

    leaf: str
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param(self.leaf, nn.initializers.lecun_normal(), self.shape))


class FeedForward(nn.Module):
    """As Gemma's: two products share its scope."""

    @nn.compact
    def __call__(self, x):
        gating, linear = Part("gating", (2, 4, 6)), Part("linear", (6, 4))
        nn.share_scope(self, gating)
        gate = gating("...F,NFH->...NH", x)
        nn.share_scope(self, linear)
        return linear("...H,HF->...F", nn.gelu(gate[..., 0, :]) * gate[..., 1, :])


class Gated(nn.Module):
    @nn.compact
    def __call__(self, x):
        return FeedForward(name="mlp")(x)


X = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32))
IDS = jnp.array([2, 0, 1, 0, 2, 2])

CASES = {  # module, its input, and the leaves that are named
    "experts by einsum": (Mixture(), (X, IDS), ("moe.wi", "moe.wo")),
    "experts by ragged_dot": (Mixture(ragged=True), (X, IDS), ("moe.wi", "moe.wo")),
    "tied embedding": (Tied(), (IDS,), ("embed.embedding",)),
    "read by other methods": (ByMethods(), (IDS,), ("embedder.table",)),
    "in a scan": (Scanned(), (X,), ("layers.w",)),
    "shared scope": (Gated(), (X,), ("mlp.gating", "mlp.linear")),
}


@pytest.fixture(scope="module")
def backbones():
    return {
        name: jdelta.Backbone(module, noisy(jax.jit(module.init)(jax.random.key(0), *inputs)["params"]), inputs)
        for name, (module, inputs, _) in CASES.items()
    }


def attached(backbones, case, **arguments):
    """The bare backbone, a copy of it with a trained LoRA on the leaves of the case, and the delta."""
    model = copy.copy(backbones[case])
    named = arguments.pop("modified_parameters", CASES[case][2])
    delta = jdelta.LoraModel(model, modified_parameters=list(named), lora_r=2, lora_alpha=2 * SCALE, **arguments)
    train_deltas(delta)
    return backbones[case], model, delta


def leaves_of(tree):
    return {".".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(dict(tree))}


def factors(params, delta, leaf):
    """The two factors that a delta has for a leaf of this name."""
    owner, _, key = leaf.rpartition(".")
    own = {name: value for name, value in leaves_of(params).items() if name.startswith(f"{owner}.{delta.name}.")}
    single = len({name.rpartition(".")[0] for name in own}) == 1
    found = {name.rpartition(".")[2]: value for name, value in own.items() if single or f".{key}." in name}
    assert set(found) == {"a", "b"}
    return found["a"], found["b"]


def updated(params, delta, backbone_params, leaves):
    """The backbone's own tree with `W + scale · a b` in place of each of the leaves."""
    tree = jax.tree.map(lambda leaf: leaf, dict(backbone_params))
    for leaf in leaves:
        a, b = factors(params, delta, leaf)
        *above, key = leaf.split(".")
        at = tree
        for part in above:
            at = at[part]
        at[key] = at[key] + SCALE * jnp.matmul(a, b)  # leaves (…, in, out), factors (…, in, r) and (…, r, out)
    return tree


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_updated_leaves(backbones, case):
    bare, model, delta = attached(backbones, case)
    _, inputs, leaves = CASES[case]
    trainable, frozen = delta.partition()

    def loss(trainable, run):
        return jnp.sum(jnp.sin(run(jdelta.combine(trainable, frozen))))

    def of_jdelta(params):
        return model(*inputs, params=params)

    def by_hand(params):
        return bare.module.apply({"params": updated(params, delta, bare.params, leaves)}, *inputs)

    found, wanted = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(trainable, f) for f in (of_jdelta, by_hand))
    assert abs(wanted[0] - jnp.sum(jnp.sin(bare(*inputs)))) > 1e-3  # the delta makes a difference
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    found, wanted = leaves_of(found[1]), leaves_of(wanted[1])
    assert len(wanted) == 2 * len(leaves)
    for name, gradient in wanted.items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("grouped", [False, True], ids=["einsum", "ragged_dot"])
def test_experts_are_those_of_a_hand_written_low_rank_mixture(backbones, grouped):
    _, model, delta = attached(backbones, "experts by ragged_dot" if grouped else "experts by einsum")
    moe, head = model.params["moe"], model.params["head"]
    (a1, b1), (a2, b2) = (factors(model.params, delta, f"moe.{leaf}") for leaf in ("wi", "wo"))

    def hand_written(x, expert):  # one row: no update of a weight is formed
        h = nn.gelu(x @ moe["wi"][expert] + SCALE * (x @ a1[expert]) @ b1[expert])
        y = h @ moe["wo"][expert] + SCALE * (h @ a2[expert]) @ b2[expert]
        return y @ head["kernel"] + head["bias"]

    np.testing.assert_allclose(model(X, IDS), jax.vmap(hand_written)(X, IDS), rtol=1e-6, atol=1e-6)


def test_factors_of_experts_have_the_experts_axis(backbones):
    _, model, delta = attached(backbones, "experts by einsum")
    assert [leaf.shape for leaf in factors(model.params, delta, "moe.wi")] == [(3, 4, 2), (3, 2, 5)]


def test_factors_in_a_scan_have_the_layers_axis_and_differ(backbones):
    model = copy.copy(backbones["in a scan"])
    delta = jdelta.LoraModel(model, modified_parameters=["layers.w"], lora_r=2)
    a, b = factors(model.params, delta, "layers.w")
    assert (a.shape, b.shape) == ((3, 4, 2), (3, 2, 4))
    assert not b.any()
    assert not np.allclose(a[0], a[1])


def test_a_tied_embedding_changes_in_both_places(backbones):
    bare, model, delta = attached(backbones, "tied embedding")
    a, b = factors(model.params, delta, "embed.embedding")
    old = bare.params["embed"]["embedding"]
    new = old + SCALE * a @ b
    np.testing.assert_allclose(model(IDS), jnp.tanh(new[IDS]) @ new.T, rtol=1e-6, atol=1e-6)
    assert not np.allclose(model(IDS), jnp.tanh(new[IDS]) @ old.T, atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_merging_is_exact_and_comes_off(backbones, case):
    bare, model, delta = attached(backbones, case)
    _, inputs, leaves = CASES[case]
    before, wanted = model(*inputs), updated(model.params, delta, bare.params, leaves)
    delta.merge()
    np.testing.assert_allclose(model(*inputs), before, rtol=1e-6, atol=1e-6)
    merged = leaves_of(model.params)
    for name, leaf in leaves_of(wanted).items():
        np.testing.assert_allclose(merged[name], leaf, rtol=1e-6, atol=1e-7, err_msg=name)
    delta.unmerge()
    np.testing.assert_array_equal(model(*inputs), before)


def test_a_new_delta_changes_nothing_and_only_it_trains(backbones):
    model = copy.copy(backbones["experts by einsum"])
    before = model(X, IDS)
    delta = jdelta.LoraModel(model, modified_parameters=["moe.wi"], lora_r=2)
    np.testing.assert_array_equal(model(X, IDS), before)
    trainable, _ = delta.partition()
    assert {name.rpartition(".")[2] for name in leaves_of(trainable)} == {"a", "b"}
    assert len(leaves_of(trainable)) == 2


def test_modules_and_parameters_go_together(backbones):
    bare, model, delta = attached(
        backbones, "experts by einsum", modified_parameters=["moe.wi"], modified_modules=["head"]
    )
    tree = updated(model.params, delta, bare.params, ["moe.wi", "head.kernel"])
    np.testing.assert_allclose(model(X, IDS), bare(X, IDS, params=tree), rtol=1e-5, atol=1e-6)


def test_a_saved_delta_of_leaves_loads(backbones, tmp_path):
    bare, model, delta = attached(backbones, "shared scope")
    delta.save_finetuned(tmp_path)
    other = copy.copy(bare)
    jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=other)
    np.testing.assert_array_equal(other(X), model(X))


def test_deltas_of_one_leaf_add_up_and_come_off_in_any_order(backbones):
    bare, model, first = attached(backbones, "experts by einsum", modified_parameters=["moe.wi"])
    alone = model(X, IDS)
    second = jdelta.LoraModel(model, modified_parameters=["moe.wi"], lora_r=1, lora_alpha=SCALE, name="second")
    train_deltas(second, seed=1)
    tree = updated(model.params, second, updated(model.params, first, bare.params, ["moe.wi"]), ["moe.wi"])
    np.testing.assert_allclose(model(X, IDS), bare(X, IDS, params=tree), rtol=1e-5, atol=1e-6)
    second.detach()
    np.testing.assert_array_equal(model(X, IDS), alone)
    second.attach()
    first.detach()
    np.testing.assert_allclose(
        model(X, IDS), bare(X, IDS, params=updated(model.params, second, bare.params, ["moe.wi"])), rtol=1e-5, atol=1e-6
    )


# --- bad input


class Odd(nn.Module):
    """Leaves that cannot change anything: whole numbers, and one that nothing reads."""

    @nn.compact
    def __call__(self, x):
        codes = self.param("codes", lambda key: jnp.arange(12, dtype=jnp.int8).reshape(4, 3))
        self.param("spare", nn.initializers.lecun_normal(), (4, 3))
        w = self.param("w", nn.initializers.lecun_normal(), (4, 3))
        return nn.Dense(2, name="head")(x @ (w + codes))


@pytest.fixture(scope="module")
def odd():
    return jdelta.Backbone(Odd(), Odd().init(jax.random.key(0), X)["params"], (X,))


@pytest.mark.parametrize(
    ("parameters", "error", "words"),
    [
        (["head"], ValueError, ["module 'head'", "head.kernel", "modified_modules"]),
        (["hed.kernel"], ValueError, ["'hed.kernel'", "head.kernel"]),
        (["codes"], TypeError, ["'codes'", "int8"]),
        (["spare"], ValueError, ["'spare'", "reads"]),
        ("w", TypeError, ["modified_parameters", "'w'"]),
    ],
    ids=["a module", "nothing", "whole numbers", "unread", "a string"],
)
def test_leaves_that_cannot_be_named_are_errors(odd, parameters, error, words):
    model = copy.copy(odd)
    with pytest.raises(error) as raised:
        jdelta.LoraModel(model, modified_parameters=parameters, lora_r=2)
    for word in words:
        assert word in str(raised.value)
    assert model.module is odd.module
    assert model.params is odd.params


def test_dropout_on_a_leaf_whose_input_is_unknown_is_an_error(odd):
    with pytest.raises(ValueError, match=r"lora_dropout.*'?w"):
        jdelta.LoraModel(copy.copy(odd), modified_parameters=["w"], lora_r=2, lora_dropout=0.1)


def test_exclusion_takes_leaves_out(backbones):
    _, model, delta = attached(
        backbones, "shared scope", modified_parameters=["[r]mlp\\..*"], exclude_modules=["linear"]
    )
    assert [leaf.shape for leaf in factors(model.params, delta, "mlp.gating")] == [(2, 4, 2), (2, 2, 6)]


def test_the_log_says_which_leaves_are_rewritten_and_what_that_costs(capsys):
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8, name="dense")(x)
            return jnp.einsum("bi,eio->beo", x, self.param("wi", nn.initializers.lecun_normal(), (3, 8, 4)))

    backbone = jdelta.Backbone(Experts(), dummy_inputs=(jnp.ones((2, 8)),))
    delta = jdelta.LoraModel(backbone, modified_parameters=["wi", "dense.kernel"], lora_r=2)
    delta.log()
    printed = " ".join(capsys.readouterr().out.split())
    assert "rewritten before each run: wi. A training step computes the full gradient" in printed
    assert "each of their 96 numbers" in printed
    delta.detach()
    delta.log()
    assert "rewritten" not in capsys.readouterr().out


# --- the same names elsewhere


def test_freeze_module_and_partition_rules_speak_the_names_of_experts(backbones):
    _, _, delta = attached(backbones, "experts by einsum", modified_parameters=["moe.wi"])
    delta.freeze_module(exclude=["deltas", "moe.wo"])
    trainable = {name for name in leaves_of(delta.partition()[0]) if delta.name not in name.split(".")}
    assert trainable == {"moe.wo"}
    specs = jdelta.match_partition_rules([("moe.wi", P("expert"))], backbones["experts by einsum"].params, P())
    assert {name for name, spec in leaves_of(specs).items() if spec == P("expert")} == {"moe.wi"}


def test_two_deltas_on_two_leaves_of_one_module_are_no_twins(recwarn):
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            wi, wo = (self.param(name, nn.initializers.lecun_normal(), (2, 4, 4)) for name in ("wi", "wo"))
            return jnp.einsum("bi,eio,eoj->bj", x, wi, wo)

    backbone = jdelta.Backbone(Experts(), dummy_inputs=(jnp.ones((2, 4)),))
    for name in ("wi", "wo"):
        jdelta.LoraModel(backbone, modified_parameters=[name], lora_r=2)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="'lora' of the same arguments is attached to the same modules"):
        jdelta.LoraModel(backbone, modified_parameters=["wi"], lora_r=2)
