"""Layers that `nnx.vmap` stacks and `nnx.scan` runs keep their arrays, and no step makes a changed copy of a stack."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jdelta

WIDTH, LAYERS, RANK = 64, 6, 4


class Block(nnx.Module):
    def __init__(self, rngs, by_hand):
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.lora = nnx.LoRA(WIDTH, RANK, 4 * WIDTH, rngs=rngs) if by_hand else None

    def __call__(self, x):
        y = self.up(x)
        y = y if self.lora is None else y + self.lora(x)
        return x + self.down(nnx.relu(y))


class Expert(nnx.Module):
    """Weights that no linear module has: with LoRA, they are read with their change."""

    def __init__(self, rngs, by_hand):
        def factor(*shape):
            return nnx.LoRAParam(nnx.initializers.lecun_normal()(rngs.params(), shape)) if by_hand else None

        self.weights = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (2, WIDTH, WIDTH)))
        self.a, self.b = factor(2, WIDTH, RANK), factor(2, RANK, WIDTH)

    def __call__(self, x):
        weights = self.weights[...] if self.a is None else self.weights[...] + self.a[...] @ self.b[...]
        return x + jnp.einsum("bd,edf->bf", nnx.relu(x), weights)


class Stack(nnx.Module):
    """A scan over layers; `sizes`: of each of the scans in one another; `axis`: of the layers in each parameter."""

    layer, axis, sizes, remat = Block, 0, (LAYERS,), False

    def __init__(self, rngs, by_hand=False):
        made = lambda rngs: self.layer(rngs, by_hand)  # noqa: E731
        for size in self.sizes:
            made = nnx.split_rngs(splits=size)(nnx.vmap(made, in_axes=0, out_axes=self._axes()))
        self.layers = made(rngs)

    def __call__(self, x):
        run = lambda x, layer: layer(x)  # noqa: E731
        run = nnx.remat(run) if self.remat else run
        for _ in self.sizes:
            run = nnx.scan(run, in_axes=(nnx.Carry, self._axes()), out_axes=nnx.Carry)
        return run(x, self.layers)

    def _axes(self):
        return nnx.StateAxes({nnx.Param: self.axis, ...: 0})


class Inside(Stack):
    axis = 1


class Nested(Stack):
    sizes = (3, 2)


class Rematerialised(Inside):
    remat = True


class Experts(Stack):
    layer = Expert


class NestedExperts(Stack):
    layer, axis, sizes, remat = Expert, 1, (3, 2), True


def own_size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def temporary(model, trains, rows=8):
    """The bytes of what is neither argument nor result of a compiled step."""
    graphdef, trainable, frozen = nnx.split(model, trains, ...)

    def step(trainable, frozen, x):
        return jax.grad(lambda own: jnp.sum(nnx.merge(graphdef, own, frozen, copy=True)(x) ** 2))(trainable)

    x = jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32)
    return jax.jit(step).lower(trainable, frozen, x).compile().memory_analysis().temp_size_in_bytes


def buffers(model):
    leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path: leaf.get_raw_value().unsafe_buffer_pointer() for path, leaf in leaves}


ATTACHED = {
    "lora": (jdelta.LoraModel, {"modified_modules": ["up"], "lora_r": RANK}),
    "adapter": (jdelta.AdapterModel, {"modified_modules": ["layers"], "bottleneck_dim": RANK}),
    "parameters": (jdelta.LoraModel, {"modified_parameters": ["up.kernel"], "lora_r": RANK}),
}


@pytest.mark.parametrize("kind", ATTACHED)
def test_the_backbone_keeps_its_buffers(kind):
    model = Inside(nnx.Rngs(0))
    before = buffers(model)
    method, arguments = ATTACHED[kind]
    delta = method(model, dummy_inputs=(jnp.ones((2, WIDTH)),), **arguments)
    assert buffers(model).items() >= before.items()
    delta.detach()
    assert buffers(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("stack", [Stack, Inside, Nested, Rematerialised])
@pytest.mark.parametrize("kind", ["lora", "parameters"])
def test_a_step_copies_no_layer(kind, stack):
    model = stack(nnx.Rngs(0))
    method, arguments = ATTACHED[kind]
    delta = method(model, lora_alpha=RANK, dummy_inputs=(jnp.ones((8, WIDTH)),), **arguments)
    by_hand = temporary(stack(nnx.Rngs(0), by_hand=True), nnx.LoRAParam)
    assert temporary(model, delta.filter) - by_hand < own_size(delta.partition()[0])  # in a scan, `b` is kept scaled


@pytest.mark.slow
@pytest.mark.parametrize("stack", [Experts, NestedExperts])
def test_weights_are_read_with_their_changes_one_layer_at_a_time(stack):
    model = stack(nnx.Rngs(0))
    x = jnp.ones((8, WIDTH))
    delta = jdelta.LoraModel(model, modified_parameters=["weights"], lora_r=RANK, lora_alpha=RANK, dummy_inputs=(x,))
    by_hand = temporary(stack(nnx.Rngs(0), by_hand=True), nnx.LoRAParam)
    assert temporary(model, delta.filter) <= 1.03 * by_hand
