"""What is installed on a model is taken off again without a trace."""

import jax
import jax.numpy as jnp
import pytest
from conftest import fresh
from flax import linen as nn

import jdelta
from jdelta.core.edits import Attachment, CallEdit
from jdelta.hosts.adapting import adapt


class Plus(nn.Module):
    @nn.compact
    def __call__(self, y):
        return y + self.param("plus", nn.initializers.ones, ())


@pytest.fixture(params=["linen", "transformers"])
def model(request):
    if request.param == "transformers":
        return fresh("bert", "FlaxBertForSequenceClassification")
    module = nn.Sequential([nn.Dense(3), nn.Dense(2)])
    x = jnp.ones((1, 4))
    return jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))


def test_what_is_installed_is_run_and_uninstalled_without_a_trace(model):
    host = adapt(model)
    module, cls, attributes = model.module, type(model), set(vars(model))
    last = list(host.structure())[-1]
    attachment = Attachment("extra", (CallEdit(last.path, "after", Plus(), leaf=("extra",)),))
    host.install([attachment])
    assert host.attachments == (attachment,)
    assert model.module is not module
    tree = jax.eval_shape(lambda: host.init([attachment], jax.random.key(0)))
    assert "extra" in str(jax.tree.structure(tree))
    host.uninstall()
    assert host.attachments == ()
    assert model.module is module
    assert type(model) is cls
    assert {name for name in vars(model) if "cache" not in name} == {name for name in attributes if "cache" not in name}
