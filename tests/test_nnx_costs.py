"""What a step of training on an nnx module costs, against `nnx.LoRA` that is written into the module."""

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


class Listed(nnx.Module):
    def __init__(self, rngs, by_hand=False):
        self.layers = nnx.List([Block(rngs, by_hand) for _ in range(LAYERS)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Scanned(nnx.Module):
    def __init__(self, rngs, by_hand=False):
        made = nnx.vmap(lambda rngs: Block(rngs, by_hand), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=LAYERS)(made)(rngs)

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def step_of(model, trains, rows):
    """A compiled step: the FLOPs, and the bytes of what is neither argument nor result."""
    graphdef, trainable, frozen = nnx.split(model, trains, ...)

    def step(trainable, frozen, x):
        return jax.grad(lambda own: jnp.sum(nnx.merge(graphdef, own, frozen, copy=True)(x) ** 2))(trainable)

    x = jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32)
    compiled = jax.jit(step).lower(trainable, frozen, x).compile()
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes < 1.1 * own_size(trainable)
    return compiled.cost_analysis()["flops"], memory.temp_size_in_bytes


def own_size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize("stack", [Listed, Scanned])
@pytest.mark.parametrize("rows", [8, 96])
def test_a_step_costs_what_lora_by_hand_costs_and_no_layer_of_the_backbone_is_copied(stack, rows):
    model = stack(nnx.Rngs(0))
    x = jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32)
    delta = jdelta.LoraModel(model, ["up"], lora_r=RANK, lora_alpha=RANK, dummy_inputs=(x,))
    flops, bytes_ = step_of(model, delta.filter, rows)
    flops_by_hand, bytes_by_hand = step_of(stack(nnx.Rngs(0), by_hand=True), nnx.LoRAParam, rows)
    assert flops == flops_by_hand
    assert bytes_ - bytes_by_hand < own_size(delta.partition()[0])  # in a scan, the scaled `b` is kept for each layer
