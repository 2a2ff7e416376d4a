import inspect
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build

import jdelta
from jdelta.hosts.transformers import repairs as transformers_repair


def by_hand(position, bidirectional, buckets, furthest):
    """One bucket, in float64, as section 2.1 of the paper and mesh-tensorflow define it."""
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = buckets if position > 0 else 0
        distance = abs(position)
    else:
        distance = max(-position, 0)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    ranged = exact + int(np.log(distance / exact) / np.log(furthest / exact) * (buckets - exact))
    return offset + min(ranged, buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20)])
def test_buckets_are_those_of_the_paper(bidirectional, buckets, furthest):
    # Not on the powers where the logarithm is a whole number, which float32 may round to either side.
    positions = [p for p in range(-150, 151) if abs(p) not in (16, 32, 64)]
    found = transformers_repair.relative_position_bucket(jnp.array(positions), bidirectional, buckets, furthest)
    assert found.dtype == jnp.int32
    assert found.tolist() == [by_hand(p, bidirectional, buckets, furthest) for p in positions]


@pytest.mark.parametrize("attention", ["local", "transient-global"])
def test_longt5_runs(attention):
    import transformers

    config = transformers.LongT5Config(
        vocab_size=20,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        local_radius=3,
        global_block_size=4,
        encoder_attention_type=attention,
    )
    model = transformers.FlaxLongT5Model(config, _do_init=False)
    delta = jdelta.LoraModel(model, modified_modules=["q", "v"], lora_r=2)
    assert delta.targets


def test_mt5_is_a_t5():
    import transformers

    model = transformers.FlaxMT5Model(build("t5", "FlaxT5Model", _do_init=False).config, _do_init=False)
    assert len(jdelta.LoraModel(model, lora_r=2).targets) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", ["jdelta, transformers.models.t5.modeling_flax_t5", "transformers.models.t5.modeling_flax_t5, jdelta"]
)
def test_it_works_in_either_order_of_import_and_touches_nothing_of_jax(order):
    needed = "a_max" not in inspect.signature(jnp.clip).parameters
    script = f"""
import jax.numpy as jnp
clip = jnp.clip
import {order}
from transformers.models.t5.modeling_flax_t5 import FlaxT5Attention
assert jnp.clip is clip
bucket = FlaxT5Attention._relative_position_bucket
print(bucket(jnp.arange(-3, 3)).tolist(), bucket.__module__)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.startswith("[3, 2, 1, 0, 17, 18]")
    assert ("jdelta" in out) == needed
