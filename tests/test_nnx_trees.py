"""Deltas on nnx modules and the states of nnx: they go into every verb, and what comes out fits the module."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiers import breadth

import jdelta
from jdelta.trees import surgery
from jdelta.trees.variables import DeltaParam

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)


class Product(nnx.Module):
    """A module that knows nothing of biases."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (6, 6)) / 2)

    def __call__(self, x):
        return x @ self.kernel[...]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 6, rngs=rngs)
        self.plain = nnx.Linear(6, 6, use_bias=False, rngs=rngs)
        self.product = Product(rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.norm(self.product(self.plain(jnp.tanh(self.dense(x))))))


class Network(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.heads = nnx.Dict({"0": nnx.Linear(6, 3, rngs=rngs)})

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.heads["0"](x)


@functools.cache
def initial():
    return nnx.split(Network(nnx.Rngs(0, dropout=1)))


def network():
    model = nnx.merge(*initial(), copy=True)
    model.eval()
    return model


METHODS = {
    "lora": (jdelta.LoraModel, {"lora_r": 2}),
    "adapter": (jdelta.AdapterModel, {"bottleneck_dim": 2}),
    "bitfit": (jdelta.BitFitModel, {}),
    "low_rank_adapter": (jdelta.LowRankAdapterModel, {"reduction_factor": 3}),
    "compacter": (jdelta.CompacterModel, {"reduction_factor": 3, "hypercomplex_division": 2}),
    "parallel_adapter": (jdelta.ParallelAdapterModel, {"bottleneck_dim": 2}),
}


def attached(method="lora", **arguments):
    cls, own = METHODS[method]
    model = network()
    modules = arguments.pop("modules", ["dense", "plain"])
    return model, cls(model, modules, unfrozen_modules=["heads"], dummy_inputs=(X,), **own, **arguments)


def moved(tree, seed=0):
    """Stands for training."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + rng.normal(0, 0.3, a.shape).astype(a.dtype), tree)


def trained(method="lora", seed=0, **arguments):
    """A model with a delta that has moved, which its state says too."""
    model, delta = attached(method, **arguments)
    trainable, frozen = delta.partition(nnx.state(model))
    nnx.update(model, delta.combine(moved(trainable, seed), frozen))
    return model, delta


def split(model):
    """What `nnx.split` gives, with variables of its own: those of `nnx.split` are the module's."""
    return nnx.split(nnx.clone(model))


def run(graphdef, state, x=X):
    return nnx.merge(graphdef, state, copy=True)(x)


def bits(tree):
    leaves = surgery.flatten(tree)
    keys = {p: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for p, leaf in leaves.items()}
    return {p: np.asarray(jax.random.key_data(leaf) if keys[p] else leaf).tobytes() for p, leaf in leaves.items()}


def assert_same(one, other):
    """The same structure, with types and metadata of variables, and the same bits."""
    assert type(one) is type(other)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert bits(one) == bits(other)


# --- states and the module


@pytest.mark.parametrize("method", breadth(METHODS, "lora"))
def test_a_state_comes_apart_and_together_and_fits_the_module(method):
    model, delta = trained(method)
    graphdef, state = nnx.split(model)
    trainable, frozen = delta.partition(state)
    assert_same(delta.combine(trainable, frozen), state)
    assert_same(jdelta.combine(frozen, trainable), state)
    own, rest = nnx.state(model, delta.filter, ...)
    assert_same(trainable, own)
    assert_same(frozen, rest)
    assert bits(delta.own(state)).keys() == {*delta.paths}
    bare = jdelta.prune(state, delta)
    assert_same(jdelta.graft(bare, delta.own(state)), state)
    fresh = jdelta.graft(bare, delta.init(1))
    assert jax.tree.structure(fresh) == jax.tree.structure(state)
    assert_same(delta.init(1, state), delta.own(fresh))
    assert np.all(run(graphdef, fresh) != run(graphdef, state))
    delta.detach()
    assert jax.tree.structure(bare) == jax.tree.structure(nnx.state(model))


def test_the_trees_that_the_model_holds_are_those_of_its_state():
    model, delta = trained()
    trainable, frozen = delta.partition()  # plain dicts
    _, whole = nnx.split(model)
    assert bits(trainable) == bits(delta.partition(whole)[0])
    nnx.update(model, jdelta.combine(jax.tree.map(jnp.zeros_like, delta.partition(whole)[0]), frozen))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(delta.partition()[0]))


def test_gradients_and_steps_of_the_trainable_state_are_those_of_nnx():
    model, delta = trained()
    graphdef, state = nnx.split(model)
    trainable, frozen = delta.partition(state)

    def loss(model):
        return jnp.sum(model(X) ** 2)

    grads = jax.grad(lambda t: loss(nnx.merge(graphdef, delta.combine(t, frozen), copy=True)))(trainable)
    assert_same(grads, nnx.grad(loss, argnums=nnx.DiffState(0, delta.filter))(model))

    tx = delta.optimizer(optax.adamw(0.1, weight_decay=0.5))
    whole = nnx.filter_state(state, nnx.Param)
    others = nnx.filter_state(state, nnx.Not(nnx.Param))
    everything = jax.grad(lambda params: loss(nnx.merge(graphdef, params, others, copy=True)))(whole)
    updates, _ = tx.update(everything, tx.init(whole), whole)
    by_tree = optax.apply_updates(whole, updates)
    for wrt in (delta.filter, nnx.Param):
        copy = nnx.clone(model)
        optimizer = nnx.Optimizer(copy, tx, wrt=wrt)
        optimizer.update(copy, nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(copy))
        after = nnx.state(copy)
        assert_same(nnx.filter_state(after, nnx.Param), by_tree)
        before = bits(state)
        assert {path for path, value in bits(after).items() if value != before[path]} == {
            path for path, trains in surgery.flatten(delta.trainable_mask(state)).items() if trains
        }
        sizes = [np.size(leaf) for leaf in jax.tree.leaves(nnx.state(optimizer)["opt_state"])]
        assert sum(sizes) == 1 + 2 * sum(np.size(leaf) for leaf in jax.tree.leaves(trainable))


OPTIMIZERS = {
    "accumulated": optax.MultiSteps(optax.adamw(0.1), every_k_schedule=2),
    "masked": optax.adamw(0.1, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
    "adafactor": optax.adafactor(0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("chosen", ["filter", "Param"])
def test_optimizers_with_states_of_other_forms_move_what_trains_in_nnx_jit(name, chosen):
    model, delta = attached()
    wrt = delta.filter if chosen == "filter" else nnx.Param
    optimizer = nnx.Optimizer(model, delta.optimizer(OPTIMIZERS[name]), wrt=wrt)
    before = bits(nnx.state(nnx.clone(model)))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.sum(model(X) ** 2), argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
    after = bits(nnx.state(model))
    trains = surgery.flatten(delta.trainable_mask(nnx.state(model)))
    assert {path for path in after if after[path] != before[path]} == {path for path in trains if trains[path]}


def test_an_optimizer_of_what_trained_before_is_refused():
    model, delta = attached()
    optimizer = nnx.Optimizer(model, delta.optimizer(optax.sgd(0.1)), wrt=nnx.Param)
    delta.freeze_module(exclude=["heads"])
    with pytest.raises(RuntimeError, match="changed after this optimizer was made"):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(X)))(model))


# --- verbs


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_a_merged_state_runs_on_the_bare_module(method):
    """Also where a bias is merged into a linear module that has none, or into a module that knows of none."""
    model, delta = trained(method, modules=["dense", "plain", "product"])
    before = nnx.graphdef(model)
    state, expected = split(model)[1], model(X)
    merged = jax.jit(delta.merge)(state)
    assert_same(delta.own(nnx.state(model)), delta.own(state))  # nothing else changed
    delta.merge()
    graphdef, held = nnx.split(model)
    assert bits(held).keys() == bits(merged).keys()
    for given in (merged, held):
        np.testing.assert_allclose(run(graphdef, given), expected, rtol=1e-5, atol=1e-5)
    delta.unmerge()
    assert nnx.graphdef(model) == before
    assert_same(nnx.state(model), state)


@pytest.mark.parametrize("method", breadth(METHODS, "lora"))
def test_what_is_saved_of_a_state_is_loaded_into_another(method, tmp_path):
    model, delta = trained(method)
    state = nnx.state(model)
    delta.save_finetuned(tmp_path, state)
    other, fresh = attached(method)
    loaded = fresh.load_finetuned(tmp_path, nnx.state(other))
    assert_same(loaded, state)
    assert_same(fresh.load_finetuned(tmp_path, jdelta.prune(nnx.state(other), fresh)), state)
    restored = network()
    again = jdelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=restored, dummy_inputs=(X,))
    assert_same(nnx.state(restored), state)
    assert again.finetuned(state).values.keys() == delta.finetuned().values.keys()


def test_values_are_read_from_a_state_as_from_the_model():
    model, delta = trained()
    state = split(model)[1]
    trainable, frozen = delta.partition(state)
    other = jdelta.combine(moved(trainable, 9), frozen)
    for tree, changed in ((state, other), (other, state)):
        nnx.update(model, tree)
        np.testing.assert_array_equal(delta.movement().values, delta.movement(tree).values)
        assert np.any(delta.movement(changed).values != delta.movement(tree).values)
        assert delta.status().to_dict() == delta.status(tree).to_dict()
        assert delta.visualization().to_html(params=tree) == delta.visualization().to_html()


@pytest.mark.parametrize("method", breadth(METHODS, "lora", "bitfit"))
def test_a_state_without_a_delta_runs_as_the_backbone_does(method):
    model, delta = trained(method)
    graphdef, state = split(model)
    with delta.disabled():
        expected = model(X)

    @jax.jit
    def both(state):
        return run(graphdef, state), run(graphdef, jdelta.without(state, delta))

    policy, reference = both(state)
    np.testing.assert_allclose(reference, expected, rtol=1e-6, atol=1e-6)
    assert np.abs(policy - expected).max() > 1e-2
    nnx.update(model, jdelta.without(state, delta))
    np.testing.assert_allclose(model(X), expected, rtol=1e-6, atol=1e-6)
    nnx.update(model, state)
    np.testing.assert_allclose(model(X), policy, rtol=1e-6, atol=1e-6)


def test_shardings_of_a_state():
    model, delta = attached()
    state = nnx.state(model)
    rules = [("dense.kernel", jax.P(None, "model"))]
    specs = jdelta.match_partition_rules(rules, state, default=jax.P())
    found = delta.partition_specs(specs)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    sharded = {path for path, spec in surgery.flatten(found).items() if spec != jax.P()}
    ends = [("dense", "kernel"), ("dense", "lora", "b")]
    assert sharded == {("layers", i, *end) for i in "01" for end in ends}
    shardings = delta.shardings(specs, jax.make_mesh((1,), ("model",)))
    placed = jax.jit(lambda state: state, out_shardings=shardings)(state)
    assert_same(placed, state)
    opt = jax.eval_shape(delta.optimizer(optax.adam(0.1)).init, nnx.filter_state(state, nnx.Param))
    of_state = jax.tree.leaves(jdelta.state_shardings(opt, shardings))
    assert sum(s.spec != jax.P() for s in of_state) == 2 * 2


# --- many deltas


def stacked_and_alone(method="lora", n=3):
    model, delta = attached(method)
    trainable, frozen = delta.partition(nnx.state(model))
    trees = [moved(trainable, seed) for seed in range(n)]
    alone = []
    for tree in trees:
        nnx.update(model, tree)
        alone.append(np.asarray(model(X)))
    return model, delta, trees, frozen, np.stack(alone)


@pytest.mark.parametrize("method", breadth(METHODS, "lora"))
def test_each_row_computes_what_its_delta_computes_alone(method):
    model, delta, trees, frozen, alone = stacked_and_alone(method)
    stacked, indices = jdelta.stack(trees), np.array([2, 0, 2, 1])
    for one, other in zip(jdelta.unstack(stacked), trees, strict=True):
        assert_same(one, other)
    graphdef = nnx.graphdef(model)

    def of_function(x, params):
        return nnx.merge(graphdef, params, copy=True)(x)

    expected = alone[indices, np.arange(4)]
    held = delta.partition()[1]  # of parameters alone
    for call, shared in ((model, frozen), (of_function, frozen), (model, held)):
        many = jax.jit(lambda s, f, i, call=call: jdelta.rowwise(call, f)(X, params=jdelta.select(s, i)))
        np.testing.assert_allclose(many(stacked, shared, indices), expected, rtol=1e-5, atol=1e-5)
    assert np.ptp(alone, axis=0).min() > 1e-3


def test_saved_deltas_of_other_ranks_and_scales_run_in_rows(tmp_path):
    arguments = [{"lora_r": 3, "lora_alpha": 6}, {"lora_r": 2, "lora_alpha": 7}]
    alone = []
    for i, own in enumerate(arguments):
        model = network()
        delta = jdelta.LoraModel(model, ["dense"], unfrozen_modules=["heads"], dummy_inputs=(X,), **own)
        trainable, _ = delta.partition(nnx.state(model))
        nnx.update(model, moved(trainable, i))
        delta.save_finetuned(tmp_path / str(i))
        alone.append(model(X))
        if not i:
            first, frozen = model, delta.partition(nnx.state(model))[1]
    stacked = jdelta.stack([tmp_path / "0", tmp_path / "1"])
    rows = jdelta.rowwise(first, frozen)(X, params=jdelta.select(stacked, [1, 0, 1, 1]))
    np.testing.assert_allclose(rows, jnp.stack(alone)[jnp.array([1, 0, 1, 1]), jnp.arange(4)], rtol=1e-5, atol=1e-5)


def test_training_many_in_one_program_equals_training_each_alone():
    model, _, trees, frozen, _ = stacked_and_alone()
    graphdef, rates = nnx.graphdef(model), jnp.array([1e-2, 3e-3, 1e-3])
    targets = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 3)), jnp.float32)

    def step(trainable, state, rate, y):
        def loss(trainable):
            return jnp.mean((run(graphdef, jdelta.combine(trainable, frozen)) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = optax.adam(rate).update(grads, state)
        return optax.apply_updates(trainable, updates), state, value

    stacked = jdelta.stack(trees)
    states = jax.vmap(optax.adam(1.0).init)(stacked)
    many, one = jax.jit(jax.vmap(step)), jax.jit(step)
    losses = []
    for _ in range(3):
        stacked, states, loss = many(stacked, states, rates, targets)
        losses.append(loss)
    for k, (tree, together) in enumerate(zip(trees, jdelta.unstack(stacked), strict=True)):
        state = optax.adam(1.0).init(tree)
        for i in range(3):
            tree, state, loss = one(tree, state, rates[k], targets[k])
            np.testing.assert_allclose(losses[i][k], loss, atol=1e-5)
        assert jax.tree.structure(tree) == jax.tree.structure(together)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), tree, together)
    nnx.update(model, together)  # each is a state of the module
    assert type(model.layers[0].dense.lora.a) is DeltaParam


# --- shapes


def test_a_module_of_shapes_takes_a_delta_and_its_states_go_into_the_verbs():
    model = nnx.eval_shape(lambda: Network(nnx.Rngs(0, dropout=1)))  # in training, with statistics and keys
    delta = jdelta.LoraModel(model, ["dense"], lora_r=2, dummy_inputs=(X,))
    state = nnx.state(model)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
    trainable, frozen = delta.partition(state)
    assert jax.tree.structure(delta.combine(trainable, frozen)) == jax.tree.structure(state)
    assert delta.partition_specs(nnx.get_partition_spec(state))["layers"][0]["dense"]["kernel"].get_value() == jax.P()
    with pytest.raises(ValueError, match="the model holds shapes only"):
        delta.merge(state)
    values = jdelta.graft(nnx.state(network()), delta.init(0))
    assert run(nnx.graphdef(model), values).shape == (4, 3)
    assert delta.finetuned(values).values["layers.0.dense.lora.a"].shape == (6, 2)


# --- checkpoints


@pytest.mark.slow
def test_training_goes_on_from_an_orbax_checkpoint_bit_for_bit(tmp_path):
    import orbax.checkpoint as ocp

    def started():
        model, delta = attached()
        model.train()
        return model, nnx.Optimizer(model, delta.optimizer(optax.adam(0.1)), wrt=delta.filter), delta.filter

    def step(model, optimizer, trains):
        grads = nnx.grad(lambda model: jnp.sum(model(X) ** 2), argnums=nnx.DiffState(0, trains))(model)
        optimizer.update(model, grads)

    def states(model, optimizer):
        return {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}

    model, optimizer, trains = started()
    step(model, optimizer, trains)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "1", states(model, optimizer))
        checkpointer.wait_until_finished()
        step(model, optimizer, trains)
        again, its_optimizer, _ = started()
        restored = checkpointer.restore(tmp_path / "1", states(again, its_optimizer))
    nnx.update(again, restored["model"])
    nnx.update(its_optimizer, restored["optimizer"])
    step(again, its_optimizer, trains)
    assert_same(nnx.state(again), nnx.state(model))
    assert_same(nnx.state(its_optimizer), nnx.state(optimizer))
