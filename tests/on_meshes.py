"""Training steps of one family on meshes of 8 virtual devices, for `test_sharding`.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python on_meshes.py llama [all]

With `all` on all meshes, and with every method. The family `nnx` is a module of flax.nnx, whose trees are states.
"""

import math
import re
import sys
import unittest.mock
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conftest import fresh
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matrix import METHODS

import jdelta

AXES = ("data", "fsdp", "model")
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 2), (2, 4, 1), (4, 1, 2), (1, 4, 2), (2, 2, 2)]
SOME = {
    "bert": [(4, 1, 2), (2, 4, 1)],
    "gpt2": [(1, 1, 2), (1, 8, 1)],
    "t5": [(1, 4, 2)],
    "llama": [(8, 1, 1), (2, 2, 2)],
    "nnx": [(8, 1, 1), (2, 2, 2)],
}
IN, OUT = P("fsdp", "model"), P("model", "fsdp")
FAMILIES = {  # class, number of layers, rules
    "bert": (
        "FlaxBertForSequenceClassification",
        "num_hidden_layers",
        [(r"[r](query|key|value|intermediate\.dense)\.kernel", IN), (r"[r]encoder\..*output\.dense\.kernel", OUT)],
    ),
    "gpt2": (  # its kernels have the output first
        "FlaxGPT2LMHeadModel",
        "n_layer",
        [(r"[r](c_attn|c_fc)\.kernel", OUT), ("c_proj.kernel", IN)],
    ),
    "t5": (
        "FlaxT5ForConditionalGeneration",
        "num_layers",
        [(r"[r](q|k|v|wi)\.kernel", IN), (r"[r](o|wo)\.kernel", OUT)],
    ),
    "llama": (
        "FlaxLlamaForCausalLM",
        "num_hidden_layers",
        [(r"[r](q_proj|k_proj|v_proj|gate_proj|up_proj|lm_head)\.kernel", IN), (r"[r](o|down)_proj\.kernel", OUT)],
    ),
}
RANK = 5  # no other axis has this length, so it marks what is the delta's in the compiled text
IDS = jnp.arange(8 * 7).reshape(8, 7) % 50 + 3
OPERATIONS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"


class Attention(nnx.Module):
    def __init__(self, rngs):
        def linear(*axes):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), axes, eager_sharding=False)
            return nnx.Linear(32, 32, use_bias=False, kernel_init=init, rngs=rngs)

        self.query, self.key, self.value = (linear("fsdp", "model") for _ in range(3))
        self.out = linear("model", "fsdp")

    def __call__(self, x):
        q, k, v = (f(x).reshape(*x.shape[:-1], 4, 8) for f in (self.query, self.key, self.value))
        return self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(64, 32, rngs=rngs)
        self.norm = nnx.RMSNorm(32, rngs=rngs)
        self.layers = nnx.List([Attention(rngs)])

    def __call__(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return self.embed.attend(x)


def make(family):
    """A model of one layer, and its specs."""
    if family == "nnx":
        model = Decoder(nnx.Rngs(0))
        return model, nnx.get_partition_spec(nnx.state(model))
    cls, layers, rules = FAMILIES[family]
    model = fresh(family, cls, vocab_size=64, **{layers: 1})
    return model, jdelta.match_partition_rules([*rules, ("embedding", P())], model.params, default=P())


def params_of(model):
    return nnx.state(model) if isinstance(model, nnx.Module) else model.params


def with_lora(model):
    modules = ["query", "value"] if isinstance(model, nnx.Module) else None
    more = {"dummy_inputs": (IDS,)} if isinstance(model, nnx.Module) else {}
    return jdelta.LoraModel(model, modules, lora_r=RANK, **more)


def mesh_of(sizes):
    return Mesh(np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes), AXES)


def on_mesh(specs, mesh):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))


def loss_of(model, params, ids):
    given = {"decoder_input_ids": ids} if "T5" in type(model).__name__ else {}
    if isinstance(model, nnx.Module):
        logits = nnx.merge(nnx.graphdef(model), params, copy=True)(ids)
    else:
        logits = model(ids, params=params, train=False, **given).logits
    return -jax.nn.log_softmax(logits)[..., 1].mean()


def compiled(model, trainable, frozen, split, held, mesh):
    """A step of training on a mesh, compiled, and its arguments as they are placed."""
    by_batch, tx = NamedSharding(mesh, P(("data", "fsdp"))), optax.sgd(0.1, momentum=0.9)
    moments = jdelta.state_shardings(jax.eval_shape(tx.init, trainable), split)

    def step(trainable, state, frozen, ids):
        loss, grads = jax.value_and_grad(lambda t: loss_of(model, jdelta.combine(t, frozen), ids))(trainable)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(trainable, updates), state, loss

    places = (split, moments, held, by_batch)
    run = jax.jit(step, in_shardings=places, out_shardings=(split, moments, NamedSharding(mesh, P())))
    arguments = jax.device_put((trainable, tx.init(trainable), frozen, IDS), places)
    return run.lower(*arguments).compile(), arguments


def losses(run, arguments, steps=3):
    trainable, state, frozen, ids = arguments
    found = []
    for _ in range(steps):
        trainable, state, loss = run(trainable, state, frozen, ids)
        found.append(float(loss))
    return found


def collectives(run):
    """How often the compiled program has each collective operation of each shape."""
    found = Counter()
    for shapes, operation in re.findall(rf"= (.*?) ({OPERATIONS})(?:-start)?\(", run.as_text()):
        found.update(
            (operation, tuple(map(int, filter(None, s.split(","))))) for s in re.findall(r"\[([\d,]*)\]", shapes)
        )
    return found


def check_bytes(tree, split, mesh):
    """Each device holds of each leaf what its spec promises."""
    for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(split), strict=True):
        names = [name for entry in place.spec for name in ((entry,) if isinstance(entry, str) else entry or ())]
        assert leaf.addressable_shards[0].data.nbytes * math.prod(mesh.shape[name] for name in names) == leaf.nbytes


def check_init(delta, split, params):
    """Fresh leaves are created where they belong, with the values that they have without a mesh."""
    own, init = delta.own(split), lambda rng: delta.init(rng, params)
    got, want = jax.jit(init, out_shardings=own)(jax.random.key(0)), init(jax.random.key(0))
    for leaf, other, place in zip(*map(jax.tree.leaves, (got, want, own)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        np.testing.assert_allclose(leaf, other, atol=1e-6)


def needed(sizes, loras):
    """How many collectives LoRA on query and value needs: the gradients of `a` and `b` summed over the batch, that of
    `a` in two steps where one half of the batch's axes splits it; `a` gathered from its parts; the gradient of `x a`
    summed over the parts of the output. On three axes XLA sums in more steps than that."""
    data, fsdp, model = (size > 1 for size in sizes)
    return loras * (2 * (data or fsdp) + (data and fsdp) + fsdp + model + 2 * (data and fsdp and model))


def check_lora(family, sizes, want):
    mesh = mesh_of(sizes)
    model, specs = make(family)
    split = on_mesh(specs, mesh)
    full = jax.jit(
        jax.value_and_grad(lambda params, ids: loss_of(model, params, ids)),
        out_shardings=(NamedSharding(mesh, P()), split),
    )
    by_batch = NamedSharding(mesh, P(("data", "fsdp")))
    whole = collectives(full.lower(*jax.device_put((params_of(model), IDS), (split, by_batch))).compile())
    delta = with_lora(model)
    split = delta.shardings(specs, mesh)
    run, arguments = compiled(model, *delta.partition(params_of(model)), *delta.partition(split), mesh)
    np.testing.assert_allclose(losses(run, arguments), want, rtol=1e-4)
    check_bytes(jdelta.combine(arguments[0], arguments[2]), split, mesh)
    if sizes == MESHES[-1]:
        check_init(delta, split, params_of(model))
    found = collectives(run)
    own = Counter({key: n for key, n in found.items() if RANK in key[1]})
    assert not found - own - whole, (sizes, found - own - whole)
    most = needed(sizes, len(delta.targets))
    print(f"{family} {sizes}: collectives of full fine-tuning {whole.total()}; of LoRA's step those of the backbone")
    print(f"  {(found - own).total()} and its own {own.total()} of {most}")
    assert own.total() <= most, (sizes, own)


def check_method(family, method):
    cls, arguments = METHODS[method]
    results = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = mesh_of(sizes)
        model, specs = make(family)
        delta = cls(model, **arguments)
        split = delta.shardings(specs, mesh)
        run, placed = compiled(model, *delta.partition(), *delta.partition(split), mesh)
        check_bytes(jdelta.combine(placed[0], placed[2]), split, mesh)
        results.append(losses(run, placed))
    np.testing.assert_allclose(*results, rtol=1e-4)


def check_sequence():
    """Where the mesh splits batch and sequence, no product of a delta gathers them. (Off CPUs: there, one would.)"""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "sequence"))
    split, whole = NamedSharding(mesh, P("data", "sequence")), NamedSharding(mesh, P())
    module, x = nn.Sequential([nn.Dense(16)]), jnp.ones((8, 6, 16))
    for method in ("lora", "adapter", "low_rank_adapter", "compacter"):
        backbone = jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))
        cls, arguments = METHODS[method]
        cls(backbone, modified_modules=["layers_0"], **arguments)
        params, loss = backbone.params, lambda params, x, b=backbone: (b(x, params=params) ** 2).sum()
        grad = jax.jit(jax.grad(loss, (0, 1)), in_shardings=(whole, split))
        on_cpu = backbone(x, params=params)
        with unittest.mock.patch("jax.default_backend", return_value="gpu"):
            jax.clear_caches()  # what was traced for the CPU
            found = collectives(grad.lower(params, x).compile())
            np.testing.assert_allclose(backbone(x, params=params), on_cpu, atol=1e-6)
        assert not [key for key in found if key[0] != "all-reduce"], (method, found)


def main(family, everything=False):
    model, specs = make(family)
    delta, mesh = with_lora(model), mesh_of((1, 1, 1))
    split = delta.shardings(specs, mesh)
    want = losses(*compiled(model, *delta.partition(params_of(model)), *delta.partition(split), mesh))
    for sizes in MESHES if everything else SOME[family]:
        check_lora(family, sizes, want)
    some = ["adapter", "prefix"] if family == "bert" else []
    for method in METHODS if everything and family != "nnx" else some:
        check_method(family, method)
    if family == "t5":
        check_sequence()
    print("done")


if __name__ == "__main__":
    main(sys.argv[1], "all" in sys.argv[2:])
