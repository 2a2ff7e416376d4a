"""Small models, built once: tests that change one attach to a copy."""

import copy
import gc
import importlib.metadata
import itertools
import os
from pathlib import Path

# Before jax is imported: the tests compile many tiny programs, most of them for one run, so nothing is optimised. The
# newer code generator of XLA:CPU takes long; only releases that know its flag get it, since others would die of it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

# What one process has compiled, the others and the next run need not: tests and their subprocesses share a cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

# transformers, imported above, would import PyTorch in every subprocess, for seconds. Workers alone say so: what the
# process that starts them says, they would hear too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["USE_TORCH"] = "0"

pytest_plugins = ["tiers"]  # what the plain command leaves out

gc.set_threshold(200_000, 50, 50)  # tracing makes much garbage, little of it in cycles: a seventh of the time

transformers.logging.set_verbosity_error()

TINY = {
    "bert": (
        "BertConfig",
        {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    "roberta": (
        "RobertaConfig",
        {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    "distilbert": ("DistilBertConfig", {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}),
    "albert": (
        "AlbertConfig",
        {
            "hidden_size": 16,
            "embedding_size": 8,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
        },
    ),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 16,
            "ffn_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 16,
        },
    ),
    "t5": (
        "T5Config",
        {"decoder_start_token_id": 0, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    ),
    "bart": (
        "BartConfig",
        {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "max_position_embeddings": 32,
            "forced_eos_token_id": None,
        },
    ),
    "llama": (
        "LlamaConfig",
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
        },
    ),
}


def build(family: str, cls: str, config: dict | None = None, **kwargs):
    """A tiny model of a family, with random weights."""
    name, sizes = TINY[family]
    tokens = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = getattr(transformers, name)(**{**tokens, **sizes, **(config or {})})
    model = getattr(transformers, cls)(made, **{**kwargs, "_do_init": False})
    if kwargs.get("_do_init", True):
        model._is_initialized = True
        model.params = weights(model.params_shape_tree)
    return model


def weights(shapes):
    """Weights like those of transformers, by NumPy: it compiles each step of a whole call to draw them."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        if "bias" in path[-1].key and "embedding" not in path[-1].key:
            return jnp.asarray(np.zeros(shape.shape, shape.dtype))
        values = rng.normal(0.0, 0.02, shape.shape) if len(shape.shape) > 1 else np.ones(shape.shape)
        return jnp.asarray(values.astype(shape.dtype))

    return jax.tree_util.tree_map_with_path(leaf, dict(shapes))


_built: dict[tuple, object] = {}


def fresh(family: str, cls: str, **config):
    """A copy of a tiny model that a test may change; the weights are built once in a process."""
    key = (family, cls, *sorted(config.items()))
    if key not in _built:
        _built[key] = build(family, cls, config)
    return copy.copy(_built[key])


@pytest.fixture
def bert():
    return fresh("bert", "FlaxBertForSequenceClassification")


@pytest.fixture
def ids():
    return jnp.array([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def noisy(tree, seed: int = 0):
    """The tree with noise on every float leaf, so that a delta which is zero at first makes a difference."""
    rng = np.random.default_rng(seed)  # NumPy compiles nothing

    def moved(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        noise = 0.1 * rng.normal(size=leaf.shape)
        return jnp.asarray((np.asarray(leaf, np.float32) + noise).astype(leaf.dtype))

    return jax.tree.map(moved, tree)


def train_deltas(delta, seed: int = 0):
    """Stands for training: moves everything that the delta trains."""
    import jdelta

    trainable, frozen = delta.partition()
    delta.backbone_model.params = jdelta.combine(noisy(trainable, seed), frozen)


# Each program that is compiled takes some maps of memory, of which Linux grants a process 65,530; without any left, it
# dies. So a process that has many forgets its programs, which most tests do not share.
MOST_MAPS = 20_000
_MAPS = Path("/proc/self/maps")
_finished = itertools.count(1)


def pytest_runtest_logfinish():
    if next(_finished) % 25 == 0 and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


def pytest_terminal_summary(terminalreporter):
    """Prints the matrix of methods and classes that `test_matrix` found."""
    rows = [
        value
        for report in terminalreporter.stats.get("passed", ())
        for key, value in report.user_properties
        if key == "matrix" and report.when == "call"
    ]
    for methods in dict.fromkeys(tuple(row) for _, row in rows):
        alike = sorted((name, row) for name, row in rows if tuple(row) == methods)
        terminalreporter.section("modules that each method changes at its default positions")
        terminalreporter.write_line(f"{'':46}" + " ".join(f"{method:>16}" for method in methods))
        for name, row in alike:
            cells = " ".join(f"{row[method] if isinstance(row[method], int) else '—':>16}" for method in methods)
            terminalreporter.write_line(f"{name:46}{cells}")
        reasons = sorted({(method, why) for _, row in alike for method, why in row.items() if not isinstance(why, int)})
        for method, why in reasons:
            classes = [name for name, row in alike if row[method] == why]
            terminalreporter.write_line(f"— {method}: {why}: {', '.join(classes)}")
