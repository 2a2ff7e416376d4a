"""AdaLoRA: its formula, its budget under every way to train, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import jdelta
from jdelta.methods.rank_budget import Budget
from jdelta.trees import surgery

X = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
Y = np.random.default_rng(1).standard_normal((16, 6)).astype(np.float32)
OPTIONS = {"init_r": 4, "target_r": 1, "tinit": 2, "tfinal": 2, "total_step": 10, "lora_alpha": 4}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(6, name="last")(layers(name="layers")(x, None)[0])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(8, name="dense")(x)), None


def attach(**more):
    params = jax.jit(Net().init)(jax.random.key(0), X)["params"]
    backbone = jdelta.Backbone(Net(), params, (X,))
    return backbone, jdelta.AdaLoraModel(backbone, ["dense", "last"], **{**OPTIONS, **more})


def loss_of(backbone, delta):
    def loss(params, x=X, y=Y):
        return jnp.mean((backbone(x, params=params) - y) ** 2) + delta.penalty(params)

    return loss


def left(params):
    return sum(int((leaf != 0).sum()) for path, leaf in surgery.flatten(params).items() if path[-1] == "e")


def trained(steps, wrap=lambda tx: tx, jit=True, batches=1):
    """The parameters after each step of training all that the delta trains, and the last state."""
    backbone, delta = attach()
    tx, loss = delta.optimizer(wrap(optax.adam(0.02))), loss_of(backbone, delta)
    params, state = backbone.params, tx.init(backbone.params)

    def step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    step, found = jax.jit(step) if jit else step, []
    for _ in range(steps):
        for x, y in zip(np.split(X, batches), np.split(Y, batches), strict=True):
            params, state = step(params, state, x, y)
        found.append(params)
    return found, state


def test_it_is_its_formula_in_float64():
    backbone, _ = attach(init_lora_weights=False)
    own = {key: np.asarray(leaf, np.float64) for key, leaf in backbone.params["last"]["adalora"].items()}
    hidden = np.asarray(Layer().apply({"params": {"dense": {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}}}, X, None)[0])
    dense = nn.Sequential([nn.Dense(6)])
    alone = jdelta.Backbone(dense, {"layers_0": {k: backbone.params["last"][k] for k in ("kernel", "bias")}}, (hidden,))
    delta = jdelta.AdaLoraModel(alone, ["layers_0"], **OPTIONS)
    alone.params["layers_0"]["adalora"] = backbone.params["last"]["adalora"]
    kernel = np.asarray(alone.params["layers_0"]["kernel"], np.float64)
    want = hidden @ (kernel + 4 / (4 + 1e-5) * (own["a"] * own["e"]) @ own["b"]) + alone.params["layers_0"]["bias"]
    np.testing.assert_allclose(alone(hidden), want, rtol=1e-5, atol=1e-5)
    own = {("layers_0", "adalora", key): jnp.asarray(value) for key, value in own.items()}
    a, b = (np.asarray(own["layers_0", "adalora", key]) for key in "ab")
    far = [np.linalg.norm(a.T @ a - np.eye(4)), np.linalg.norm(b @ b.T - np.eye(4))]
    np.testing.assert_allclose(delta.config.penalty(own), 0.5 * np.mean(far), rtol=1e-5)


def test_the_penalty_has_a_gradient_where_it_is_zero():
    _, delta = attach()
    own = {("h", "a"): jnp.eye(8)[:, :4], ("h", "e"): jnp.ones(4), ("h", "b"): jnp.eye(6)[:4]}
    value, grads = jax.value_and_grad(delta.config.penalty)(own)
    assert value == 0
    assert all(jnp.isfinite(grad).all() for grad in grads.values())


def test_the_budget_falls_with_the_third_power_to_the_target():
    budget = Budget(target=2, first=10, last=20, every=1, total=100, betas=(0.85, 0.85))
    assert budget.left(24, 2)[[0, 10, 45, 80]].tolist() == [24, 24, int(20 * 0.5**3 + 4), 4]
    assert (np.diff(budget.left(24, 2)) <= 0).all()
    long = Budget(target=8, first=0, last=0, every=1, total=300_000, betas=(0.85, 0.85))
    exact = [int((1200 - 800) * (1 - step / 300_000) ** 3 + 800) for step in range(0, 300_001, 7919)]
    assert long.left(1200, 100)[::7919].tolist() == exact


def test_singular_values_go_over_all_layers_of_a_scan_and_stay_zero():
    found, state = trained(12)
    counts = [left(params) for params in found]
    assert counts[:3] == [12, 12, 12]  # three matrices of rank 4
    assert counts[-1] == counts[8] == 3
    assert sorted(counts, reverse=True) == counts
    assert int(state.inner_states["train"].inner_state.step) == 12


def test_under_multi_steps_a_step_is_one_of_the_optimizer():
    whole, _ = trained(10)
    parts, _ = trained(10, lambda tx: optax.MultiSteps(tx, every_k_schedule=2), batches=2)
    assert [left(params) for params in parts] == [left(params) for params in whole]
    for a, b in zip(jax.tree.leaves(parts[-1]), jax.tree.leaves(whole[-1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-3)  # the penalty counts in each half


def test_under_scan_and_resumed_it_is_the_same_bit_for_bit():
    backbone, delta = attach()
    tx, loss = delta.optimizer(optax.adam(0.02)), loss_of(backbone, delta)
    begin = TrainState.create(apply_fn=backbone.__call__, params=backbone.params, tx=tx)

    def step(state, _=None):
        return state.apply_gradients(grads=jax.grad(loss)(state.params)), None

    scanned = jax.jit(lambda state: jax.lax.scan(step, state, length=10)[0])(begin)
    half = jax.jit(lambda state: jax.lax.scan(step, state, length=5)[0])
    first = half(begin)
    leaves, treedef = jax.tree.flatten(first)
    resumed = half(jax.tree.unflatten(treedef, [np.array(leaf) for leaf in leaves]))  # as from a file
    assert left(scanned.params) == 3
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_array_equal(a, b)


def test_its_state_can_be_donated():
    backbone, delta = attach()
    tx, loss = delta.optimizer(optax.adam(0.02)), loss_of(backbone, delta)
    params = jax.tree.map(jnp.array, backbone.params)

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.jit(step, donate_argnums=(0, 1))(params, tx.init(params))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))


def test_on_an_nnx_module():
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 6, rngs=nnx.Rngs(1)))
    delta = jdelta.AdaLoraModel(model, ["0", "1"], **OPTIONS, dummy_inputs=(X,))
    optimizer = nnx.Optimizer(model, delta.optimizer(optax.adam(0.02)), wrt=delta.filter)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(X) - Y) ** 2) + delta.penalty(nnx.state(model))

        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, delta.filter))(model))

    for _ in range(10):
        step(model, optimizer)
    assert left(nnx.to_pure_dict(nnx.state(model, delta.filter))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_r": 5}, "target_r=5 is above init_r=4"),
        ({"tinit": 8}, "no steps are left in which ranks shrink"),
        ({"beta1": 1.0}, "beta1 is between 0 and 1"),
        ({"deltaT": 0}, "deltaT"),
        ({"init_r": 0}, "init_r"),
    ],
)
def test_options_outside_their_limits_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attach(**options)


def test_the_optimizer_needs_the_number_of_steps_and_all_of_a_triplet():
    _, delta = attach(total_step=None)
    with pytest.raises(ValueError, match="needs total_step"):
        delta.optimizer(optax.adam(1e-3))
    backbone, delta = attach()
    delta.freeze_module(exclude=["layers.dense.adalora.e"])
    with pytest.raises(ValueError, match=r"not all at last\.adalora do"):
        delta.optimizer(optax.adam(1e-3)).init(backbone.params)
