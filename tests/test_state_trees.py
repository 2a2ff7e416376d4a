"""Trees that are `nnx.State`s: the functions on trees keep variables, metadata and keys, and move values alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jdelta
from jdelta.scale.specs import in_boxes, is_box
from jdelta.trees import freezing, surgery
from jdelta.trees.filters import Trained
from jdelta.trees.variables import DeltaParam

LEAF = ("layers", "0", "dense", "lora", "a")
OWN = {"layers": {"0": {"dense": {"lora": {"a": jnp.full((3, 2), 0.5), "b": jnp.full((2, 3), 0.25)}}}}}
PATHS = {LEAF, (*LEAF[:-1], "b")}


class Block(nnx.Module):
    def __init__(self, rngs):
        axes = nnx.with_partitioning(nnx.initializers.ones, (None, "model"), eager_sharding=False)
        self.dense = nnx.Linear(3, 3, kernel_init=axes, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.dense(x)))


class Leaves(nnx.Module):
    """What a delta has at one module."""

    def __init__(self, values):
        for name, value in values.items():
            setattr(self, name, DeltaParam(value))


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0, dropout=1)
        self.layers = nnx.List([Block(rngs), Block(rngs)])
        self.heads = nnx.Dict({"0": nnx.Linear(3, 2, kernel_init=nnx.initializers.ones, rngs=rngs)})
        self.scale = nnx.Param(jnp.float32(-0.0), tag="kept")
        self.calls = nnx.Variable(jnp.uint32(7))

    def __call__(self, x):
        for block in self.layers:
            x = block(x)
        return self.heads["0"](x) * (1 + self.scale[...])


def with_leaves():
    model = Model()
    model.layers[0].dense.lora = Leaves(OWN["layers"]["0"]["dense"]["lora"])
    return model


@functools.cache
def whole_state():
    return nnx.state(Model())


def state(kind="variables"):
    whole = whole_state()
    if kind == "pure dict":
        return nnx.to_pure_dict(whole)
    if kind == "shapes":
        return nnx.state(nnx.eval_shape(Model))
    if kind == "values":
        return nnx.as_pure(whole)
    return jax.tree.map(lambda leaf: leaf, whole)


def specs():
    return nnx.get_partition_spec(state())


KINDS = ("variables", "values", "shapes", "pure dict")


def flat(tree):
    """The oracle: flax's own flat form, with each variable's type and metadata."""
    kept = {}
    for path, held in nnx.to_flat_state(tree if isinstance(tree, nnx.State) else nnx.State(tree)):
        variable = (type(held), held.get_metadata()) if isinstance(held, nnx.Variable) else None
        kept[path] = (variable, held.get_raw_value() if variable else held)
    return kept


def assert_same(one, other):
    """The same structure down to metadata, and the very same values."""
    assert type(one) is type(other)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    mine, its = flat(one), flat(other)
    assert mine.keys() == its.keys()
    for path in mine:
        assert mine[path][0] == its[path][0], path
        assert mine[path][1] is its[path][1] or mine[path][1] == its[path][1], path


def bits(leaf):
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf).tobytes()


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for mine, its in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (mine.dtype, bits(mine)) == (its.dtype, bits(its))


# --- paths, leaves, keys


@pytest.mark.parametrize("kind", KINDS)
def test_paths_are_of_strings_and_leaves_are_values(kind):
    leaves = surgery.flatten(state(kind))
    assert {tuple(map(str, path)) for path in flat(state(kind))} == leaves.keys()
    assert ("layers", "0", "dense", "kernel") in leaves
    assert not any(isinstance(leaf, nnx.Variable) for leaf in leaves.values())


@pytest.mark.parametrize("kind", KINDS)
def test_unflatten_is_the_inverse_of_flatten(kind):
    tree = state(kind)
    assert_same(surgery.unflatten(surgery.flatten(tree), like=tree), tree)


def test_specs_and_optimizer_states_are_trees_too():
    held = specs()
    assert_same(surgery.unflatten(surgery.flatten(held), like=held), held)
    assert surgery.flatten(held)["layers", "0", "dense", "kernel"] == jax.P(None, "model")
    optimizer = nnx.state(nnx.Optimizer(Model(), optax.adam(0.1), wrt=nnx.Param))
    assert_same(surgery.unflatten(surgery.flatten(optimizer), like=optimizer), optimizer)


def test_a_new_leaf_below_a_number_is_in_a_variable_of_deltas_and_one_in_a_dict_keeps_its_string():
    tree = state()
    own = {**OWN, "heads": {"0": {"lora": {"a": jnp.ones(1)}}}}
    grafted = jdelta.graft(tree, own)
    assert type(grafted) is nnx.State
    assert type(grafted["layers"][0]["dense"]["lora"]["a"]) is DeltaParam
    assert type(grafted["heads"]["0"]["lora"]["a"]) is DeltaParam
    assert flat(grafted).keys() - flat(tree).keys() == {
        ("layers", 0, "dense", "lora", "a"),
        ("layers", 0, "dense", "lora", "b"),
        ("heads", "0", "lora", "a"),
    }


def test_a_grafted_state_is_that_of_a_module_with_the_leaves():
    model = with_leaves()
    assert_same_bits(jdelta.graft(state(), OWN), nnx.state(model))
    assert_same_bits(jdelta.prune(nnx.state(model), "lora"), state())


def test_a_delta_of_any_name_is_pruned_where_variables_say_that_it_is_one():
    own = {"heads": {"0": {"policy": {"up": {"kernel": jnp.ones(1)}}}}}
    assert_same(jdelta.prune(jdelta.graft(state(), own), "policy"), state())
    with pytest.raises(ValueError, match=r"'heads\.0\.policy\.up\.kernel'"):
        jdelta.prune(jdelta.graft(state("values"), own), "policy")
    with pytest.raises(ValueError, match=r"'layers\.\d\.dense\.(bias|kernel)'"):
        jdelta.prune(state(), "dense")


@pytest.mark.parametrize("kind", ["values", "pure dict"])
def test_a_tree_without_variables_gets_none(kind):
    tree = state(kind)
    grafted = jdelta.graft(tree, OWN)
    assert isinstance(grafted["layers"][0]["dense"]["lora"]["a"], jax.Array)
    assert_same(jdelta.prune(grafted, "lora"), tree)


def test_a_layer_that_no_other_tree_has_is_numbered_as_those_beside_it():
    rest = surgery.unflatten({p: v for p, v in surgery.flatten(state()).items() if p[1:2] != ("0",)}, like=state())
    assert type(jdelta.graft(rest, OWN)["layers"][0]["dense"]["lora"]["a"]) is DeltaParam


def test_a_number_and_a_string_of_the_same_digits_are_refused():
    with pytest.raises(ValueError, match="number and a string"):
        surgery.flatten({"layers": {0: jnp.ones(1), "0": jnp.ones(1)}})


# --- graft, prune, partition, combine


@pytest.mark.parametrize("kind", KINDS)
def test_graft_then_prune_is_the_identity(kind):
    tree = state(kind)
    before = flat(tree)
    for own in (OWN, nnx.State({"layers": {0: OWN["layers"]["0"]}})):
        grafted = jdelta.graft(tree, own)
        assert len(flat(grafted)) == len(before) + 2
        for which in ("lora", own, PATHS, [("layers", 0, "dense", "lora", "a"), "layers.0.dense.lora.b"]):
            assert_same(jdelta.prune(grafted, which), tree)
    assert flat(tree).keys() == before.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_partition_then_combine_is_the_identity_and_loses_no_variable(kind):
    tree = jdelta.graft(state(kind), OWN)
    chosen = {*PATHS, ("layers", "1", "norm", "bias")}
    trainable, frozen = jdelta.partition(tree, freezing.mask_of(tree, chosen))
    assert {tuple(map(str, path)) for path in flat(trainable)} == chosen
    if kind != "pure dict":
        keys = [path for path in flat(frozen) if path[-1] in ("key", "count", "mean", "var", "calls")]
        assert len(keys) == 2 * 4 + 1
    assert_same(jdelta.combine(trainable, frozen), tree)
    assert_same(jdelta.combine(frozen, trainable), tree)


def test_the_parts_may_be_plain_trees():
    """Such as saved leaves, of deltas and of a head; the module that the state is put into has their types."""
    model = with_leaves()
    graphdef, tree = nnx.split(model)
    chosen = {*PATHS, ("heads", "0", "kernel"), ("heads", "0", "bias")}
    trainable, frozen = jdelta.partition(tree, freezing.mask_of(tree, chosen))
    plain = surgery.unflatten(surgery.flatten(trainable))
    for parts in ((plain, frozen), (frozen, plain)):
        combined = jdelta.combine(*parts)
        assert type(combined) is nnx.State
        assert nnx.graphdef(nnx.merge(graphdef, combined)) == graphdef
        assert_same_bits(nnx.state(nnx.merge(graphdef, combined)), tree)


def test_the_input_is_not_changed_by_changes_of_the_output():
    tree = state()
    back = surgery.unflatten(surgery.flatten(tree), like=tree)
    back["scale"].set_value(jnp.float32(3.0))
    assert tree["scale"].get_value() == 0


def test_combine_says_what_is_missing():
    tree = jdelta.graft(state(), OWN)
    trainable, frozen = jdelta.partition(tree, freezing.mask_of(tree, PATHS))
    with pytest.raises(ValueError, match=r"layers\.0\.dense\.lora\.a"):
        jdelta.combine(frozen, like=tree)
    with pytest.raises(ValueError, match=r"layers\.0\.dense\.lora"):
        jdelta.combine(trainable, trainable)
    with pytest.raises(ValueError, match=r"layers\.0\.dense\.lora\.a"):
        jdelta.graft(tree, OWN)


def test_masks_are_states_of_bools_alone_and_fit_states_with_and_without_variables():
    tree = jdelta.graft(state(), OWN)
    mask = freezing.mask_of(tree, PATHS)
    assert type(mask) is nnx.State
    assert {tuple(map(str, p)): v for p, (_, v) in flat(mask).items()} == {
        path: path in PATHS for path in surgery.flatten(tree)
    }
    for given in (tree, nnx.as_pure(tree)):
        assert optax.masked(optax.sgd(0.1), mask).init(given) is not None


def test_parameters_are_those_in_params():
    found = surgery.parameters_of(jdelta.graft(state(), OWN))
    assert found.keys() >= PATHS
    assert {path[-1] for path in found} == {"kernel", "bias", "scale", "a", "b"}
    assert surgery.root(nnx.State({"params": {"x": nnx.Param(jnp.ones(1))}})) == ()  # a module may have that name


def test_a_state_that_was_donated_is_named():
    tree = nnx.State({"x": nnx.Param(jnp.ones(2))})
    tree["x"].get_raw_value().delete()
    with pytest.raises(RuntimeError, match="donated"):
        jdelta.partition(tree, {"x": True})


def test_leaves_of_parameters_are_arrays_and_other_variables_may_hold_anything():
    surgery.require_arrays(nnx.State({"steps": nnx.Variable("seven"), "x": nnx.Param(jnp.ones(1))}))
    with pytest.raises(TypeError, match=r"'layers\.0\.x' is str"):
        surgery.require_arrays(nnx.State({"layers": {0: {"x": nnx.Param("one")}}}))


# --- under transformations


def test_the_four_run_under_jit_with_donation():
    tree = jdelta.graft(state(), OWN)

    def there_and_back(tree):
        trainable, frozen = jdelta.partition(tree, freezing.mask_of(tree, PATHS))
        return jdelta.prune(jdelta.combine(trainable, frozen), PATHS)

    assert_same_bits(jax.jit(there_and_back)(tree), state())
    copied = jax.tree.map(lambda leaf: leaf.copy(), tree)
    assert_same_bits(jax.jit(lambda t: jdelta.combine(t), donate_argnums=0)(copied), tree)


def test_gradients_with_respect_to_the_trainable_part_are_those_of_nnx_grad():
    model = with_leaves()
    model.eval()
    graphdef, whole = nnx.split(model)
    x = jnp.arange(6.0).reshape(2, 3) / 6

    def loss(model):
        own = model.layers[0].dense.lora
        return jnp.sum((model(x) + x @ own.a[...] @ own.b[...] @ jnp.ones((3, 2))) ** 2)

    trainable, frozen = jdelta.partition(whole, freezing.mask_of(whole, PATHS))
    grads = jax.grad(lambda t: loss(nnx.merge(graphdef, jdelta.combine(t, frozen), copy=True)))(trainable)
    expected = nnx.grad(loss, argnums=nnx.DiffState(0, Trained(frozenset(PATHS))))(model)
    assert flat(grads).keys() == flat(expected).keys()
    for mine, its in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(mine, its)
        assert np.any(mine)


# --- filters and optimizers


def test_filters_are_equal_hashable_and_choose_these_paths():
    chosen = Trained(frozenset(PATHS))
    assert chosen == Trained(frozenset([*PATHS]))
    assert hash(chosen) == hash(Trained(frozenset([*PATHS])))
    assert chosen != Trained(frozenset([LEAF]))
    model = with_leaves()
    own, rest = nnx.state(model, chosen, ...)
    assert {tuple(map(str, path)) for path in flat(own)} == PATHS
    assert len(flat(own)) + len(flat(rest)) == len(flat(nnx.state(model)))


def test_an_optimizer_of_the_whole_state_moves_the_trained_leaves_alone_and_has_state_for_no_other():
    whole = nnx.filter_state(jdelta.graft(state(), OWN), nnx.Param)
    tx = freezing.freeze_except(optax.adamw(0.1, weight_decay=0.5), lambda tree: freezing.mask_of(tree, PATHS))
    opt_state = tx.init(whole)
    assert sum(np.size(leaf) > 1 for leaf in jax.tree.leaves(opt_state)) == 2 * len(PATHS)
    grads = jax.tree.map(jnp.ones_like, whole)
    updates, opt_state = tx.update(grads, opt_state, whole)
    assert_moved_alone(whole, optax.apply_updates(whole, updates))


def assert_moved_alone(before, after, moved=frozenset(PATHS)):
    assert jax.tree.structure(before) == jax.tree.structure(after)
    old, new = surgery.flatten(before), surgery.flatten(after)
    assert {path for path in old if bits(old[path]) != bits(new[path])} == moved


@pytest.mark.parametrize("wrt", [nnx.Param, Trained(frozenset(PATHS))], ids=["Param", "filter"])
@pytest.mark.parametrize("masked", [False, True])
def test_nnx_optimizer_moves_the_trained_leaves_alone(wrt, masked):
    model = with_leaves()
    before = jax.tree.map(lambda leaf: leaf, nnx.state(model))
    mask = freezing.mask_of(nnx.state(model, wrt), PATHS)
    if masked:  # gives other leaves their gradients for updates
        tx, gradients = optax.masked(optax.adam(0.1), mask), (-0.0, 1.0)
    else:
        tx, gradients = freezing.freeze_except(optax.adam(0.1), lambda tree: freezing.mask_of(tree, PATHS)), (1.0, 1.0)
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    assert sum(np.size(leaf) > 1 for leaf in jax.tree.leaves(nnx.state(optimizer))) == 2 * len(PATHS)

    @nnx.jit
    def step(model, optimizer):
        grads = jax.tree.map(lambda m, p: p.replace(jnp.full_like(p, gradients[m])), mask, nnx.state(model, wrt))
        optimizer.update(model, grads)

    for _ in range(2):
        step(model, optimizer)
    assert_moved_alone(before, nnx.state(model))


# --- shardings


def test_rules_give_each_variable_its_spec_as_flax_does():
    rules = [("layers.0.dense.kernel", jax.P(None, "model")), ("layers.1.dense.kernel", jax.P(None, "model"))]
    found = jdelta.match_partition_rules(rules, state("shapes"), default=jax.P())
    assert_same(found, specs())
    bare = jdelta.match_partition_rules(rules, state("values"), default=jax.P())
    assert surgery.flatten(bare) == surgery.flatten(found)
    with pytest.raises(ValueError, match=r"'heads\.0\.bias'"):
        jdelta.match_partition_rules(rules, state("shapes"))


def test_an_optimizer_state_is_sharded_as_its_parameters():
    shapes = nnx.state(nnx.eval_shape(lambda: nnx.Optimizer(Model(), optax.adam(0.1), wrt=nnx.Param)))
    found = surgery.flatten(jdelta.state_shardings(shapes, specs()))
    sharded = {path for path, spec in found.items() if spec != jax.P()}
    assert sharded == {
        ("opt_state", "0", moment, "layers", layer, "dense", "kernel") for moment in ("mu", "nu") for layer in "01"
    }
    assert jdelta.state_shardings(shapes, specs())["opt_state"][0]["mu"]["scale"].get_value() == jax.P()


def test_metadata_of_variables_are_boxes_of_linen_and_placed_arrays_are_not():
    boxed = surgery.flatten(in_boxes(state("shapes")))
    assert boxed["layers", "0", "dense", "kernel"].get_partition_spec() == jax.P(None, "model")
    assert not any(map(is_box, (boxed["scale",], boxed["heads", "0", "kernel"], boxed["layers", "0", "norm", "mean"])))
    placed = jax.tree.map(
        lambda a: jax.device_put(a, jax.NamedSharding(jax.make_mesh((1,), ("data",)), jax.P())), state()
    )
    assert not any(map(is_box, surgery.flatten(in_boxes(placed)).values()))
    assert in_boxes(specs()) == nnx.as_pure(specs())


# --- many deltas


def test_stacks_of_states_are_states_and_come_apart_bit_for_bit():
    trees = [
        nnx.State({"layers": {0: {"a": DeltaParam(jnp.full(2, i)), "b": nnx.Param(jnp.float32(i))}}})
        for i in (-0.0, 2.0)
    ]
    stacked = jdelta.stack(trees)
    assert type(stacked["layers"][0]["a"]) is DeltaParam
    for one, other in zip(jdelta.unstack(stacked), trees, strict=True):
        assert_same_bits(one, other)
    one = jdelta.select(stacked, 1)
    assert_same_bits(one, trees[1])
    with pytest.raises(ValueError, match=r"delta 2 has no leaf 'layers\.0\.b', which delta 1 has"):
        jdelta.stack([trees[0], nnx.State({"layers": {0: {"a": trees[1]["layers"][0]["a"]}}})])
    with pytest.raises(ValueError, match=r"layers\.0\.a is float32\[2\] in delta 1, float32\[3\]"):
        jdelta.stack([nnx.State({"layers": {0: {"a": DeltaParam(jnp.ones(n))}}}) for n in (2, 3)])


def test_rows_of_a_batch_run_with_states_of_their_own():
    graphdef, whole = nnx.split(with_leaves())
    trainable, frozen = jdelta.partition(whole, freezing.mask_of(whole, PATHS))
    stacked = jdelta.stack([jax.tree.map(lambda a, i=i: a + i, trainable) for i in range(3)])

    def call(x, params):
        model = nnx.merge(graphdef, params, copy=True)
        model.eval()
        own = model.layers[0].dense.lora
        return model(x) + x @ own.a[...] @ own.b[...] @ jnp.ones((3, 2))

    x = jnp.arange(12.0).reshape(4, 3)
    rows = jdelta.rowwise(call, frozen)(x, params=jdelta.select(stacked, [2, 0, 0, 1]))
    for i, which in enumerate([2, 0, 0, 1]):
        alone = call(x[i : i + 1], jdelta.combine(jdelta.unstack(stacked)[which], frozen))
        np.testing.assert_allclose(rows[i], alone[0], rtol=1e-6)


CHOSEN = {("layers", "1", "norm", "bias"), ("heads", "0", "kernel")}


@pytest.mark.parametrize("kind", ["variables", "dict"])
def test_rows_of_a_module_run_with_leaves_of_their_own(kind):
    model = Model()
    model.eval()
    whole = nnx.state(model)
    if kind == "dict":  # of parameters alone, as a delta's partition of an nnx model gives it
        whole = surgery.unflatten(surgery.parameters_of(whole))
    trainable, frozen = jdelta.partition(whole, freezing.mask_of(whole, CHOSEN))
    trees = [jax.tree.map(lambda a, i=i: a + i, trainable) for i in range(3)]
    x, indices = jnp.arange(12.0).reshape(4, 3), [2, 0, 0, 1]
    rows = jdelta.select(jdelta.stack(trees), indices)
    outputs = jdelta.rowwise(model, frozen)(x, params=rows)
    np.testing.assert_array_equal(outputs, jdelta.rowwise(model.__call__, frozen)(x, params=rows))
    for i, which in enumerate(indices):
        alone = Model()
        alone.eval()
        nnx.update(alone, state_of(alone, trees[which]))
        np.testing.assert_allclose(outputs[i], alone(x[i : i + 1])[0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"lack 'heads\.0\.kernel'"):
        jdelta.rowwise(model, frozen)(x, params=jdelta.prune(rows, ["heads.0.kernel"]))


def state_of(model, tree):
    leaves = surgery.flatten(nnx.state(model)) | surgery.flatten(tree)
    return surgery.unflatten(leaves, like=nnx.state(model))


def test_rows_of_a_module_drop_out_independently_and_leave_it_as_it_was():
    """Also in a stack of layers, which has a key for each."""

    class Dropouts(nnx.Module):
        def __init__(self, rngs):
            self.one, self.scale = nnx.Dropout(0.5, rngs=rngs), nnx.Param(jnp.ones(()))
            made = nnx.vmap(lambda rngs: nnx.Dropout(0.5, rngs=rngs), in_axes=0, out_axes=0)
            self.stack = nnx.split_rngs(splits=2)(made)(rngs)

        def __call__(self, x):
            return self.one(x), nnx.vmap(lambda layer: layer(x), in_axes=0, out_axes=0)(self.stack)

    model = Dropouts(nnx.Rngs(0))
    before = jax.tree.map(lambda leaf: leaf, nnx.state(model))
    one, stacked = jdelta.rowwise(model, {})(jnp.ones((8, 32)), params={"scale": jnp.ones(8)})
    assert stacked.shape == (8, 2, 1, 32)
    assert len({bits(mask) for mask in (*one, *stacked.reshape(-1, 32))}) == 8 * 3
    assert_same_bits(nnx.state(model), before)
