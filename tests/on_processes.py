"""One of the processes of a program on 4 CPU devices: trains a sharded LoRA, keeps it in every way, and goes on.

    python on_processes.py FOLDER PROCESSES INDEX PORT

Writes what it found to FOLDER/<index>.json. All processes, and a single one with all devices, should find the same.
"""

import hashlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jdelta

folder, processes, index, port = Path(sys.argv[1]), *map(int, sys.argv[2:])
jax.config.update("jax_num_cpu_devices", 4 // processes)
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, index)

MODULE = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(4)])
X = np.random.default_rng(0).normal(size=(8, 12)).astype("f4")
Y = np.random.default_rng(1).normal(size=(8, 4)).astype("f4")
MESH = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))


def on(spec):
    return NamedSharding(MESH, spec)


def spread(value, spec):
    return jax.make_array_from_callback(value.shape, on(spec), lambda at: value[at])


def whole_of(leaf) -> np.ndarray:
    everywhere = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True) if everywhere else leaf)


def digest(tree) -> str:
    """Of all bits, gathered from everywhere."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        sha.update(jax.tree_util.keystr(path).encode() + whole_of(leaf).tobytes())
    return sha.hexdigest()


x, y = spread(X, P("data")), spread(Y, P("data"))
shapes = jax.eval_shape(MODULE.init, jax.random.key(0), X)["params"]
specs = jdelta.match_partition_rules([("kernel", P(None, "model"))], shapes, default=P())
split = jax.tree.map(on, specs, is_leaf=lambda leaf: isinstance(leaf, P))
base = jax.jit(lambda key: MODULE.init(key, jnp.zeros(X.shape))["params"], out_shardings=split)(jax.random.key(0))


def attached(rng=0):
    model = jdelta.Backbone(MODULE, base, dummy_inputs=(X,))
    return model, jdelta.LoraModel(model, modified_modules=["layers_0", "layers_2"], lora_r=4, rng=rng)


@jax.jit
def step(params, state, x, y):
    loss, gradients = jax.value_and_grad(lambda p: jnp.mean((model(x, params=p) - y) ** 2))(params)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def train(params, state, steps):
    losses = []
    for _ in range(steps):
        params, state, loss = step(params, state, x, y)
        losses.append(float(loss))
    return params, state, losses


def raised(run) -> str:
    try:
        run()
    except Exception as error:
        return type(error).__name__
    return "nothing"


found: dict = {}
model, delta = attached()
whole = delta.shardings(split)
own = jax.jit(delta.init, out_shardings=delta.own(whole))(jax.random.key(3))
found["initialised"] = digest(own)
params = jax.device_put(jdelta.graft(base, own), whole)
tx = delta.optimizer(optax.adam(1e-2))
state = jax.jit(tx.init, out_shardings=jdelta.state_shardings(jax.eval_shape(tx.init, params), whole))(params)

params, state, found["losses"] = train(params, state, 3)
with ocp.CheckpointManager(folder / "checkpoints") as checkpoints:
    trainable, frozen = delta.partition(params)
    checkpoints.save(3, args=ocp.args.StandardSave({"trainable": trainable, "state": state}))
    checkpoints.wait_until_finished()
    after, later, losses = train(params, state, 2)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"trainable": trainable, "state": state})
    restored = checkpoints.restore(3, args=ocp.args.StandardRestore(abstract))
again, _, found["resumed losses"] = train(jdelta.combine(restored["trainable"], frozen), restored["state"], 2)
assert found["resumed losses"] == losses
assert digest(again) == digest(after)
found["trained"] = digest(after)

found["finetuned"] = digest(delta.finetuned(after).values)
delta.save_finetuned(folder / "delta", after)
other, back = attached(rng=7)
found["loaded"] = digest(back.load_finetuned(folder / "delta", check_hash=True))
fresh = jdelta.Backbone(MODULE, base, dummy_inputs=(X,))
third = jdelta.AutoDeltaModel.from_finetuned(folder / "delta", backbone_model=fresh, check_hash=True)
expected = model(x, params=after)
assert digest(fresh(x)) == digest(other(x)) == digest(expected)
delta.to_peft(folder / "peft", after)
third.merge()
found["merged"] = digest(fresh.params)
np.testing.assert_allclose(whole_of(fresh(x)), whole_of(expected), atol=1e-5)

# What fails in one process fails in all, and nobody waits.
blocked = folder / "a file"
if index == 0:
    blocked.write_text("")
kinds = {
    "save": lambda: delta.save_finetuned(blocked / "delta", after),
    "peft": lambda: delta.to_peft(blocked / "delta", after),
    "load": lambda: back.load_finetuned(folder / ("nothing" if index == processes - 1 else "delta")),
}
found["raised"] = {name: raised(run) for name, run in kinds.items()}
(folder / f"{index}.json").write_text(json.dumps(found))
