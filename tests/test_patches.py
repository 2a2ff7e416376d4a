"""Names of other files mean something else for a call, and nothing of it is left, whatever happens meanwhile."""

import contextlib
import importlib
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh, noisy
from flax.linen import attention as flax_attention
from flax.linen import transforms
from tiers import breadth

import jdelta
from jdelta.hosts.patches import original_of, patched

X = np.linspace(-1.0, 1.0, 24, dtype=np.float32).reshape(1, 3, 8)
FILE = """
import jax.numpy
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.attention import dot_product_attention_weights


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((2, 4), name=name)(x) for name in ("query", "key", "value"))
        weights = dot_product_attention_weights(q, k)
        y = jnp.einsum("...hqk,...khd->...qhd", weights, v)
        return nn.Dense(8, name="out")(y.reshape(x.shape))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(Attention(name="attention")(x))
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file of a model, as somebody has it open beside a notebook."""
    (tmp_path / "a_model_file.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield importlib.import_module("a_model_file")
    del sys.modules["a_model_file"]


def backbone(file):
    net = file.Net()
    shapes = jax.eval_shape(net.init, jax.random.key(0), X)["params"]
    params = noisy(jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes))
    return jdelta.Backbone(net, params, dummy_inputs=(X,))


def with_prefix(model):
    return jdelta.PrefixModel(model, modified_modules=["attention"], prefix_token_num=2, reparameterize=False)


def bound(*namespaces):
    return [(namespace, dict(vars(namespace))) for namespace in namespaces]


def require_unchanged(before):
    for namespace, names in before:
        assert vars(namespace).keys() == names.keys()
        for name, value in names.items():
            assert vars(namespace)[name] is value, name


def program(model):
    return str(jax.make_jaxpr(lambda params: model(X, params=params))(model.params))


def test_between_calls_and_after_undo_every_name_means_what_it_meant(file):
    before = bound(file, flax_attention, transforms._HashableProxy)
    model = backbone(file)
    base, plain = model(X), program(model)
    delta = with_prefix(model)
    require_unchanged(before)
    fused = jdelta.fused_attention(model)
    assert not np.allclose(model(X), base, atol=1e-3)
    require_unchanged(before)
    delta.detach()
    assert program(model) != plain
    fused.undo()
    assert program(model) == plain
    assert np.array_equal(model(X), base)
    require_unchanged(before)


@pytest.mark.parametrize("again", breadth(["reloaded", "imported anew"], "reloaded"))
def test_prefixes_and_fused_attention_outlive_their_file(file, again):
    model = backbone(file)
    with_prefix(model)
    expected = model(X)
    jdelta.fused_attention(model)
    fused = program(model)
    if again == "imported anew":
        del sys.modules[file.__name__]
        file = importlib.import_module(file.__name__)
    else:
        importlib.reload(file)
    before = bound(file, flax_attention)
    assert program(model) == fused  # that of before, whose class is no longer in the file
    newer = backbone(file)
    assert type(newer.module) is not type(model.module)
    delta = with_prefix(newer)
    np.testing.assert_allclose(newer(X), expected, atol=1e-6)
    alteration = jdelta.fused_attention(newer)
    assert alteration.targets == ["attention"]
    assert program(newer) == fused
    np.testing.assert_allclose(newer(X), expected, atol=1e-5)
    np.testing.assert_allclose(model(X), expected, atol=1e-5)
    alteration.undo()
    delta.detach()
    require_unchanged(before)
    assert file.dot_product_attention_weights is flax_attention.dot_product_attention_weights
    assert file.jnp is jnp


@pytest.mark.slow
def test_a_class_that_is_defined_again_as_by_a_cell_that_runs_twice():
    scope = {"__name__": __name__}
    for _ in range(2):
        exec(FILE, scope)  # a cell of a notebook
        model = backbone(type("cell", (), scope))
        base = model(X)
        delta = with_prefix(model)
        assert not np.allclose(model(X), base, atol=1e-3)
        delta.detach()
        assert np.array_equal(model(X), base)
    assert scope["jnp"] is jnp


def test_threads_that_run_at_the_same_time_do_not_hear_each_other(file):
    models = [backbone(file) for _ in range(3)]
    with_prefix(models[0])
    jdelta.fused_attention(models[1])
    before, programs = bound(file, flax_attention, transforms._HashableProxy), list(map(program, models))
    assert len(set(programs)) == 3
    found: list[set[str]] = [set(), set(), set()]
    barrier = threading.Barrier(3)

    def work(i):
        barrier.wait()
        for _ in range(15):
            found[i].add(program(models[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{text} for text in programs]
    require_unchanged(before)


def test_a_run_that_fails_leaves_nothing(file):
    before = bound(file, flax_attention, transforms._HashableProxy)
    model = backbone(file)
    with_prefix(model)
    jdelta.fused_attention(model)
    with pytest.raises(Exception, match=r"shape|size|expected"):
        model(X[..., :5])
    require_unchanged(before)


@pytest.mark.slow
@pytest.mark.parametrize("cls", ["FlaxBertModel", "FlaxGPT2Model", "FlaxDistilBertModel"])
def test_models_of_transformers_and_their_activations(cls, ids):
    family = {"FlaxBertModel": "bert", "FlaxGPT2Model": "gpt2", "FlaxDistilBertModel": "distilbert"}[cls]
    model = fresh(family, cls)
    from transformers import modeling_flax_utils

    before = bound(sys.modules[type(model).__module__], flax_attention, modeling_flax_utils)
    activations = dict(modeling_flax_utils.ACT2FN)
    jdelta.PrefixModel(model, prefix_token_num=2, reparameterize=False)
    lean = jdelta.lean_activations(model)
    if family != "distilbert":
        jdelta.fused_attention(model)
    jax.eval_shape(lambda: model(ids))
    require_unchanged(before)
    assert all(modeling_flax_utils.ACT2FN[name] is value for name, value in activations.items())
    lean.undo()


# --- one name


@pytest.mark.parametrize("kind", ["dict", "class"])
def test_contexts_of_one_name_end_in_any_order(kind):
    def one():
        return 1

    space = {"f": one} if kind == "dict" else type("space", (), {"f": one})
    names = space if kind == "dict" else vars(space)
    contexts = [patched(space, "f", lambda original: lambda: original() + 1) for _ in range(3)]
    for context in contexts:
        context.__enter__()
        assert names["f"]() == 2
        assert original_of(names["f"]) is one
    for context in (contexts[1], contexts[0], contexts[2]):
        assert names["f"]() == 2
        context.__exit__(None, None, None)
    assert names["f"] is one


def test_what_is_bound_anew_meanwhile_stays_and_is_replaced_by_the_next_context():
    def first():
        return 1

    def second():
        return 10

    def make(original):
        return lambda: original() + 1

    space = {"f": first}
    with patched(space, "f", make):
        space["f"] = second
        assert space["f"]() == 10
        with patched(space, "f", make):
            assert space["f"]() == 11
        assert space["f"]() == 11
    assert space["f"] is second
    with contextlib.suppress(KeyboardInterrupt), patched(space, "f", make):
        space["f"] = first
        raise KeyboardInterrupt
    assert space["f"] is first


def test_what_was_imported_while_it_was_replaced_is_the_original_after_its_own_context():
    def one():
        return 1

    def make(original):
        return lambda: original() + 1

    space = {"f": one}
    with patched(space, "f", make):
        importing = {"f": space["f"]}
    assert importing["f"]() == 2
    with patched(importing, "f", make):
        assert importing["f"]() == 2  # not replaced twice
    assert importing["f"] is one


@pytest.mark.slow
def test_files_of_transformers_and_flax_that_are_reloaded():
    code = """
        import importlib, sys
        import jax, jax.numpy as jnp, numpy as np
        import flax.linen.attention
        import transformers.models.bert.modeling_flax_bert as bert
        import transformers.models.t5.modeling_flax_t5 as t5
        import transformers.modeling_flax_utils as utils
        from transformers import BertConfig
        import jdelta
        from jdelta.hosts.transformers import repairs

        SIZES = dict(vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        ids = jnp.ones((1, 4), jnp.int32)
        seen = []
        repaired = t5.FlaxT5Attention._relative_position_bucket is repairs.relative_position_bucket
        for round in range(3):
            model = bert.FlaxBertModel(BertConfig(**SIZES), seed=0)
            base = model(ids)[0]
            prefix = jdelta.PrefixModel(model, prefix_token_num=2, reparameterize=False)
            logits = model(ids)[0]
            assert not np.allclose(base, logits, atol=1e-3)
            seen.append(logits)
            fused, lean = jdelta.fused_attention(model), jdelta.lean_activations(model)
            assert fused.targets and lean.targets
            np.testing.assert_allclose(model(ids)[0], logits, atol=1e-4)
            fused.undo(), lean.undo(), prefix.detach()
            assert np.array_equal(model(ids)[0], base)
            assert bert.jnp is jnp and flax.linen.attention.jnp is jnp
            weights = flax.linen.attention.dot_product_attention_weights
            assert weights.__module__ == "flax.linen.attention" and not hasattr(weights, "__wrapped__")
            assert bert.dot_product_attention_weights is weights
            assert all(type(f).__module__ != "jdelta.lean_activations" for f in utils.ACT2FN.values())
            for file in [[bert], [flax.linen.attention, bert], [utils, bert]][round]:
                importlib.reload(file)
        np.testing.assert_array_equal(seen[0], seen[1])
        np.testing.assert_array_equal(seen[0], seen[2])
        importlib.reload(t5)
        now = t5.FlaxT5Attention._relative_position_bucket is repairs.relative_position_bucket
        assert now == repaired
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
