"""Every method on every Flax class of transformers, by shapes alone; and with numbers on one class of each family.

The rows are printed at the end of the run: how many modules a method changed at its default positions, or why it does
not fit.
"""

import re
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax.interpreters.partial_eval import dce_jaxpr

import jdelta
from jdelta import surgery

METHODS = {
    "lora": (jdelta.LoraModel, {"lora_r": 2, "lora_alpha": 2}),
    "adapter": (jdelta.AdapterModel, {"bottleneck_dim": 3, "zero_up": True}),
    "parallel_adapter": (jdelta.ParallelAdapterModel, {"bottleneck_dim": 3, "zero_up": True}),
    "low_rank_adapter": (jdelta.LowRankAdapterModel, {"reduction_factor": 4, "zero_up": True}),
    "compacter": (jdelta.CompacterModel, {"reduction_factor": 2, "zero_up": True}),
    "bitfit": (jdelta.BitFitModel, {}),
    "prefix": (jdelta.PrefixModel, {"prefix_token_num": 2, "embed_dim": 3, "mid_dim": 4}),
    "soft_prompt": (jdelta.SoftPromptModel, {"soft_token_num": 4}),
}
# Default positions by common names, as `methods.md` has them: every module that has one of these names.
POSITIONS = {
    "lora": ["attn.q", "attn.v"],
    "adapter": ["attn.proj", "ff.w2"],
    "parallel_adapter": ["attn", "ff.w2"],
    "low_rank_adapter": ["attn.proj", "ff.w2"],
    "compacter": ["attn.proj", "ff.w2"],
    "prefix": ["attn"],
}
WITHOUT_ATTENTION = {"lora": ["conv"], "adapter": ["block"], "low_rank_adapter": ["block"], "compacter": ["block"]}

NO_ATTENTION, NO_TOKENS = "has none of the common names", "takes? no token|has none of the common names embeddings"
DECODER_TOKENS = "the tokens of a decoder whose encoder takes none"
# family -> method -> why it does not fit
REASONS = {
    **{family: {"parallel_adapter": NO_ATTENTION, "prefix": NO_ATTENTION} for family in ("resnet", "regnet")},
    **{family: {"soft_prompt": DECODER_TOKENS} for family in ("vision-encoder-decoder", "speech-encoder-decoder")},
}
for _family in ("resnet", "regnet", "vit", "beit", "dinov2", "wav2vec2"):
    REASONS.setdefault(_family, {})["soft_prompt"] = NO_TOKENS
CLASS_REASONS = {
    "FlaxWhisperModel": {"soft_prompt": DECODER_TOKENS},
    "FlaxWhisperForConditionalGeneration": {"soft_prompt": DECODER_TOKENS},
    "FlaxWhisperForAudioClassification": {"soft_prompt": NO_TOKENS},
}
# Leaves that train and cannot matter: the cross-attention of a decoder that is called without an encoder.
UNREACHED = {"FlaxBartForCausalLM": r"encoder_attn"}


FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
LOUD = ("prefix", "soft_prompt")  # these change the output at once
QUIET = tuple(method for method in METHODS if method not in LOUD)


def reason(name: str, method: str) -> str | None:
    return CLASS_REASONS.get(name, {}).get(method) or REASONS.get(zoo.family_of(name), {}).get(method)


def reach(function, tree, *rest):
    """The shapes that a function returns, and the names of the first argument's leaves that none of it depends on."""
    closed, out = jax.make_jaxpr(function, return_shape=True)(tree, *rest)
    floats = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(out)]
    _, used = dce_jaxpr(closed.jaxpr, floats)
    paths = [jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return out, [path for path, is_used in zip(paths, used[: len(paths)], strict=True) if not is_used]


def folded(names) -> Counter:
    return Counter(re.sub(r"\b\d+\b", "*", name) for name in names)


def attach(model, name: str, method: str):
    """The delta at default positions, or `None` where it does not fit and says so."""
    cls, arguments = METHODS[method]
    if (why := reason(name, method)) is None:
        return cls(model, **arguments)
    with pytest.raises((TypeError, ValueError), match=why):
        cls(model, **arguments)
    return None


@pytest.mark.parametrize("name", zoo.classes())
def test_every_method_on_every_class_by_shapes(name, record_property):
    model = zoo.build(name, _do_init=False)
    x = zoo.inputs(model)
    shapes = model.params_shape_tree
    bare, before = jax.make_jaxpr(lambda p: model(**x, params=p), return_shape=True)(shapes)

    row = {}
    for method in METHODS:
        delta = attach(model, name, method)
        if delta is None:
            row[method] = reason(name, method)
            continue
        positions = POSITIONS
        if zoo.family_of(name) in ("resnet", "regnet"):
            positions = WITHOUT_ATTENTION
        if method in positions:
            wanted = [info.name for info in jdelta.common_names.known(delta.structure, positions[method])]
            assert delta.targets == wanted
        every = folded(info.name for info in delta.structure)
        assert all(every[target] == n for target, n in folded(delta.targets).items()), "a layer is left out"
        row[method] = len(delta.targets)

        trainable, frozen = delta.partition(jdelta.graft(shapes, delta.shapes()))
        after, missed = reach(lambda t, f: model(**x, params=jdelta.combine(t, f)), trainable, frozen)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
        assert [path for path in missed if not re.search(UNREACHED.get(name, r"$^"), path)] == []
        delta.detach()
    assert str(jax.make_jaxpr(lambda p: model(**x, params=p))(shapes)) == str(bare)
    record_property("matrix", (name, row))


def random_weights(shapes, seed: int = 0):
    """Weights of a size at which every part of a model matters."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        name = path[-1].key
        values = rng.normal(0.0, 0.2, shape.shape)
        if name in ("var", "bias"):  # of a positive bias, no ReLU of a tiny model dies
            values = np.abs(values) + 1
        elif name in ("scale", "weight"):
            values += 1
        return jnp.asarray(values, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def new_leaves(tree, known):
    """The part of a tree that another lacks."""
    have = surgery.flatten(known)
    return surgery.unflatten({path: leaf for path, leaf in surgery.flatten(tree).items() if path not in have})


@pytest.mark.parametrize("family", sorted(zoo.REPRESENTATIVE))
def test_every_method_on_a_class_of_each_family_with_numbers(family):
    name = zoo.REPRESENTATIVE[family]
    model = zoo.build(name, _do_init=False)
    x, base = zoo.inputs(model), random_weights(model.params_shape_tree)

    def run(function, *arguments):
        return jax.jit(function, compiler_options=FAST)(*arguments)

    before = run(lambda p: model(**x, params=p), base)

    deltas = []
    for methods in (QUIET, LOUD):
        deltas += [delta for method in methods if (delta := attach(model, name, method)) is not None]
        if methods is QUIET:
            key = jax.random.key(0, impl="rbg")  # quick to compile
            own = run(lambda key: new_leaves(model.init_weights(key, model.input_shape), base), key)
            at_first = run(lambda p: model(**x, params=p), jdelta.graft(base, own))
            chex.assert_trees_all_close(at_first, before, rtol=1e-6, atol=1e-6)
    deltas[-1].freeze_module()
    trainable = random_weights(deltas[-1].partition()[0], seed=1)
    frozen = new_leaves(base, trainable)

    def loss(t):
        outputs = jax.tree.leaves(model(**x, params=jdelta.combine(t, frozen)))
        return sum(jnp.sum(jnp.sin(o)) for o in outputs if jnp.issubdtype(o.dtype, jnp.floating))

    gradients = surgery.flatten(run(jax.grad(loss), trainable))
    still = [surgery.name_of(path) for path, g in gradients.items() if not (g != 0).any()]
    assert still == []

    for delta in deltas:
        delta.detach()
    again = run(lambda p: model(**x, params=p), base)
    chex.assert_trees_all_equal(again, before)
