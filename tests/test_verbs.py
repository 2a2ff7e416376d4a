"""The methods of a delta are functions of its state; users, tools and warnings see plain methods."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import pytest
from conftest import noisy
from flax import linen as nn

import jdelta

VERBS = [
    name
    for name, value in vars(jdelta.DeltaModel).items()
    if not name.startswith("_") and inspect.isfunction(value) and hasattr(value, "__wrapped__")
]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(nn.Dense(4, name="up")(x))


@pytest.fixture
def backbone():
    x = jnp.ones((2, 4))
    return jdelta.Backbone(Net(), Net().init(jax.random.key(0), x), (x,))


def test_there_are_verbs():
    assert {"detach", "merge", "save_finetuned", "optimizer", "partition_specs", "plot", "init", "own"} <= {*VERBS}


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_looks_like_a_method_that_is_written_out(name):
    method = getattr(jdelta.LoraModel, name)
    first, *rest = inspect.signature(method).parameters.values()
    assert (first.name, first.annotation) == ("self", inspect.Parameter.empty)
    assert [p.name for p in rest if p.name in ("state", "self")] == []
    assert {p.name for p in rest if p.annotation is inspect.Parameter.empty} == set()
    assert (method.__name__, method.__qualname__) == (name, f"DeltaModel.{name}")
    assert method.__module__ == "jdelta.delta"
    assert "state" not in method.__annotations__
    summary = method.__doc__.partition("\n")[0]
    assert summary.endswith((".", ":"))
    assert "See `" not in method.__doc__


def test_a_wrong_argument_is_named_as_that_of_a_method(backbone):
    delta = jdelta.LoraModel(backbone, ["up"])
    with pytest.raises(TypeError, match=r"detach\(\) got an unexpected keyword argument 'quietly'"):
        delta.detach(quietly=True)
    assert delta.attached


def lora(backbone, **options):
    return jdelta.LoraModel(backbone, ["up"], lora_r=2, **options)


def untrained_merge(backbone, folder):
    lora(backbone).merge()


def untrained_finetuned(backbone, folder):
    lora(backbone).finetuned()


def narrower_dtype(backbone, folder):
    delta = lora(backbone)
    found = delta.finetuned(noisy(backbone.params))
    found.values.update({name: value.astype(jnp.bfloat16) for name, value in found.values.items()})
    delta.load_finetuned(found)


def other_backbone(backbone, folder):
    lora(backbone).save_finetuned(folder / "out", noisy(backbone.params))
    other = jdelta.Backbone(Net(), Net().init(jax.random.key(1), jnp.ones((2, 4))), (jnp.ones((2, 4)),))
    lora(other).load_finetuned(folder / "out")


def other_backbone_from_a_folder(backbone, folder):
    lora(backbone).save_finetuned(folder / "out", noisy(backbone.params))
    other = jdelta.Backbone(Net(), Net().init(jax.random.key(1), jnp.ones((2, 4))), (jnp.ones((2, 4)),))
    jdelta.AutoDeltaModel.from_finetuned(folder / "out", other)


def high_rank(backbone, folder):
    jdelta.LoraModel(backbone, ["up"], lora_r=8)


def twin(backbone, folder):
    lora(backbone)
    lora(backbone)


def untrainable(backbone, folder):
    backbone.params["params"]["up"]["bias"] = backbone.params["params"]["up"]["bias"].astype(jnp.float8_e4m3fn)
    lora(backbone).freeze_module(["up"])


def untrainable_at_attaching(backbone, folder):
    backbone.params["params"]["up"]["bias"] = backbone.params["params"]["up"]["bias"].astype(jnp.float8_e4m3fn)
    lora(backbone, unfrozen_modules=["up"])


WARN = [
    untrained_merge,
    untrained_finetuned,
    narrower_dtype,
    other_backbone,
    other_backbone_from_a_folder,
    high_rank,
    twin,
    untrainable,
    untrainable_at_attaching,
]


@pytest.mark.parametrize("does", WARN, ids=lambda does: does.__name__)
def test_a_warning_points_at_the_line_of_the_user(backbone, tmp_path, does):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        does(backbone, tmp_path)
    ours = [w for w in caught if issubclass(w.category, UserWarning)]
    assert ours
    assert {w.filename for w in ours} == {__file__}
