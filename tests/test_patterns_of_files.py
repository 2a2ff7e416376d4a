"""Patterns that a stranger wrote: matched as `re` does, and never for longer than the limit."""

import json
import random
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy
from flax import linen as nn
from safetensors.numpy import save
from tiers import breadth

import jdelta
from jdelta.core import attaching
from jdelta.saved import folder
from jdelta.saved.finetuned import Finetuned, _checksum
from jdelta.trees import addressing
from jdelta.trees.regexes import Regex, _Search, limited

HANGS = r"(([a-z._0-9])+)+!"  # with re: twice as long for each character, longer than anybody waits for a name of 40
NAMES = [f"bert_of_nobody.encoder.layer.{i}.attention.self.query" for i in range(12)]
GENEROUS = 20  # seconds; the limit is 2


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = nn.Dense(4, name=f"layer_with_a_name_of_forty_characters_{i}")(x)
        return x


LAYER = "layer_with_a_name_of_forty_characters_1"


@pytest.fixture
def model():
    x = jnp.ones((2, 4))
    return jdelta.Backbone(Net(), Net().init(jax.random.key(0), x), (x,))


def drawn(rng, depth):
    """A random pattern."""
    kind = rng.randrange(9 if depth else 2)
    if kind == 0:
        return rng.choice("ab.")
    if kind == 1:
        return rng.choice(["[ab]", "[^a]", r"\w", r"\.", r"\b", "^", "$", "a"])
    one, other = drawn(rng, depth - 1), drawn(rng, depth - 1)
    if kind <= 4:
        return one + other
    if kind == 5:
        return f"({one}|{other})"
    if kind == 6:
        return f"(?:{one}){rng.choice(['*', '+', '?', '{2}', '{1,3}', '*?', '+?', '{0,2}?'])}"
    if kind == 7:
        return f"(?{rng.choice(['=', '!', '<=', '<!'])}{one})"
    return f"(?i:{one})"


@pytest.mark.parametrize("count", breadth([500, 30_000], 500))
def test_both_ways_of_matching_agree(count):
    rng, matched = random.Random(0), 0
    for _ in range(count):
        text, name = drawn(rng, 4), "".join(rng.choice("abA.") for _ in range(rng.randrange(8)))
        try:
            expected = re.compile(text).fullmatch(name)
        except re.error:  # a look behind of any width
            continue
        found = len(name) in _Search(name, time.perf_counter() + 9).ends(Regex(text)._tree, 0)
        assert found == bool(expected), (text, name)
        matched += found
    assert matched > count / 100


@pytest.mark.parametrize(
    "pattern", [HANGS, r"(a|a|e|n|t|i|o|\.)*b", r"(?:[a-z.\d_]+\.)*(?!key)(?:\w+)*X", "(((a{1000}){1000}){1000})"]
)
def test_what_re_would_never_finish_is_matched(pattern):
    before = time.perf_counter()
    assert not addressing.matches(NAMES[3], f"[r]{pattern}")
    assert addressing.match(NAMES, [f"[r]{pattern}|.*query"]) == NAMES
    assert time.perf_counter() - before < GENEROUS


def test_a_group_that_is_matched_again_is_left_to_re_and_refused_in_a_file():
    pattern = r"(\w)*([a-z])\2\.x"
    assert Regex(pattern).fullmatch("aabb.x")
    with limited(), pytest.raises(ValueError, match=r"'\(\\\\w\)\*.* depends on what a group matched"):
        Regex(pattern).fullmatch("aabb.x")


def test_the_patterns_of_a_file_have_a_limit_together():
    before = time.perf_counter()
    slow = [f"(a|{i})*b" for i in range(200)]
    with limited(0.2), pytest.raises(ValueError, match=r"takes too long to match"):
        any(Regex(pattern).fullmatch("a" * 300) for pattern in slow)
    assert time.perf_counter() - before < GENEROUS
    with limited(), pytest.raises(ValueError, match="has 20,000 characters; 10,000 are the most"):
        Regex("a" * 20_000)
    assert Regex("a" * 20_000).fullmatch("a" * 20_000)  # one's own


def rewritten(path, change):
    """Changes a description as a stranger would, with the checksum that it then has."""
    description = json.loads((path / folder.CONFIG).read_text())
    change(description)
    description["description_sha256"] = _checksum(description)
    (path / folder.CONFIG).write_text(json.dumps(description))


STRANGE = {
    "modified_modules": lambda d: d["arguments"].update(modified_modules=[f"[r]{HANGS}"]),
    "exclude_modules": lambda d: d["arguments"].update(exclude_modules=[f"[r]{HANGS}"]),
    "unfrozen_modules": lambda d: d["arguments"].update(unfrozen_modules=[f"[r]{HANGS}"]),
    "rank_pattern": lambda d: d["arguments"].update(rank_pattern={f"[r]{HANGS}": 3}),
    "alpha_pattern": lambda d: d["arguments"].update(alpha_pattern={f"[r]{HANGS}": 3}),
    "exclude": lambda d: d.update(exclude=["deltas", f"[r]{HANGS}"]),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    x = jnp.ones((2, 4))
    delta = jdelta.LoraModel(jdelta.Backbone(Net(), Net().init(jax.random.key(0), x), (x,)), [LAYER], lora_r=2)
    path = tmp_path_factory.mktemp("saved") / "lora"
    delta.save_finetuned(path, noisy(delta.backbone_model.params))
    return path


def copied(saved, path):
    for file in saved.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


@pytest.mark.parametrize("field", STRANGE)
def test_a_folder_whose_pattern_would_hang_is_an_error_that_names_it(model, saved, tmp_path, field):
    rewritten(copied(saved, tmp_path), STRANGE[field])
    params, before = model.params, time.perf_counter()
    with pytest.raises(ValueError, match=re.escape(HANGS)):
        jdelta.AutoDeltaModel.from_finetuned(tmp_path, model)
    assert time.perf_counter() - before < GENEROUS
    assert model.params is params


def test_what_is_loaded_does_not_hang_later(model, saved, tmp_path):
    rewritten(copied(saved, tmp_path), lambda d: d.update(exclude=["deltas", rf"[r]{HANGS}|kernel"]))
    before = time.perf_counter()
    delta = jdelta.AutoDeltaModel.from_finetuned(tmp_path, model)
    assert delta.trainable_mask()["params"][LAYER] == {"kernel": True, "bias": False, "lora": {"a": True, "b": True}}
    assert time.perf_counter() - before < GENEROUS


def test_more_patterns_than_a_model_has_parts_are_refused(model, saved, tmp_path):
    many = {LAYER: 2} | {f"[r].*{i}|{LAYER}": 2 for i in range(5000)}
    rewritten(copied(saved, tmp_path), lambda d: d["arguments"].update(rank_pattern=many))
    with pytest.raises(ValueError, match=r"rank_pattern of the saved delta has 5,001 entries"):
        jdelta.AutoDeltaModel.from_finetuned(tmp_path, model)


def test_an_adapter_of_peft_whose_pattern_would_hang_is_read(model, tmp_path):
    tensors = {"lora_A.weight": np.ones((2, 4), np.float32), "lora_B.weight": np.ones((4, 2), np.float32)}
    (tmp_path / "adapter_model.safetensors").write_bytes(
        save({f"base_model.model.{LAYER}.{key}": value for key, value in tensors.items()})
    )
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "rank_pattern": {HANGS: 3}, "target_modules": HANGS}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | {"alpha_pattern": {HANGS: 3.0}}))
    before = time.perf_counter()
    delta = jdelta.from_peft(tmp_path, model)
    assert time.perf_counter() - before < GENEROUS
    assert delta.targets == [LAYER]  # as of any pattern of PEFT that means nothing
    assert delta.config.rank_of(LAYER) == 2


# --- widths: nothing is allocated that the tensors do not have


def test_a_width_that_the_tensors_do_not_have_is_refused_before_anything_is_made(model, tmp_path, monkeypatch):
    delta = jdelta.AdapterModel(model, [LAYER], bottleneck_dim=3)
    delta.save_finetuned(tmp_path, noisy(model.params))
    delta.remove()
    rewritten(tmp_path, lambda d: d["arguments"].update(bottleneck_dim=4_000_000))
    monkeypatch.setattr(attaching, "initial_values", lambda *args: pytest.fail("values were made"))
    with pytest.raises(ValueError, match=r"down.kernel has shape \(4, 3\), here \(4, 4000000\)"):
        jdelta.AutoDeltaModel.from_finetuned(tmp_path, model)
    assert Finetuned.read(tmp_path).config.bottleneck_dim == 4_000_000


HUGE = 10**14
TOO_LARGE = {
    "adapter": (jdelta.AdapterModel, {"bottleneck_dim": HUGE}),
    "parallel adapter": (jdelta.ParallelAdapterModel, {"bottleneck_dim": HUGE, "modified_modules": [LAYER, LAYER]}),
    "low-rank adapter": (jdelta.LowRankAdapterModel, {"low_rank_rank": HUGE, "reduction_factor": 2}),
    "compacter": (jdelta.CompacterModel, {"phm_rank": HUGE, "reduction_factor": 2, "hypercomplex_division": 2}),
    "the largest number": (jdelta.AdapterModel, {"bottleneck_dim": 2**62}),
}


@pytest.mark.parametrize("case", TOO_LARGE)
@pytest.mark.parametrize("values", [True, False])
def test_leaves_that_no_memory_holds_are_an_error_before_they_are_made(model, case, values):
    cls, arguments = TOO_LARGE[case]
    if not values:
        model = jdelta.Backbone(Net(), None, (jnp.ones((2, 4)),))
    with pytest.raises(ValueError, match=r"would have [\d,]+ bytes, and there are [\d,]+"):
        cls(model, **({"modified_modules": [LAYER]} | arguments))


@pytest.mark.parametrize("cls", [jdelta.PrefixConfig, jdelta.SoftPromptConfig])
@pytest.mark.parametrize("number", [2**30, HUGE, 2**62])
def test_more_tokens_than_there_are_positions_are_an_error(cls, number):
    field = "prefix_token_num" if cls is jdelta.PrefixConfig else "soft_token_num"
    with pytest.raises(ValueError, match=rf"{field} is below 2\*\*30"):
        cls(**{field: number})


def test_a_large_delta_of_shapes_is_attached():
    model = jdelta.Backbone(Net(), None, (jnp.ones((2, 4)),))
    delta = jdelta.AdapterModel(model, [LAYER], bottleneck_dim=2**40)  # 40 TB, on some cluster
    assert delta.shapes()[LAYER]["adapter"]["down"]["kernel"].shape == (4, 2**40)
