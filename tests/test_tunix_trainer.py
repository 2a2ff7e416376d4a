"""tunix's own trainer and sampler take a model with a delta: they train, save, resume and generate with it."""

import jax
import numpy as np
import optax
import pytest
import tunix_models
from flax import nnx

import jdelta

pytestmark = pytest.mark.tunix

MAKE = {
    "lora": lambda m: jdelta.LoraModel(
        m, ["q_proj", "v_proj", "gate_proj"], lora_r=2, dummy_inputs=tunix_models.inputs()
    ),
    "bitfit": lambda m: jdelta.BitFitModel(m, ["mlp.gate_proj"], dummy_inputs=tunix_models.inputs()),
    "adapter": lambda m: jdelta.AdapterModel(m, bottleneck_dim=4, dummy_inputs=tunix_models.inputs()),
}


class Letters:
    """A tokenizer: a token for each letter."""

    def encode(self, text):
        return [ord(letter) - ord("a") + 3 for letter in text]

    def decode(self, ids):
        return "".join(chr(int(i) - 3 + ord("a")) for i in ids)

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2

    def pad_id(self):
        return 0


class Losses:
    """Hooks that keep the losses."""

    def __init__(self):
        self.found = []

    def __getattr__(self, name):
        return lambda *args: None

    def on_train_step_end(self, trainer, step, loss):
        self.found.append(float(loss))


def make(method):
    model = tunix_models.build("llama3")
    return model, MAKE[method](model)


def train(model, steps, folder=None):
    """The step that the trainer begins at, and its losses."""
    import orbax.checkpoint as ocp
    from tunix.sft import peft_trainer, utils

    def inputs(batch):
        mask = batch.input_mask
        positions, attends = utils.build_positions_from_mask(mask), utils.make_causal_attn_mask(mask)
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": mask,
            "positions": positions,
            "attention_mask": attends,
        }

    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=100,
        max_steps=steps,
        checkpoint_root_directory=None if folder is None else str(folder),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=1),
    )
    trainer = peft_trainer.PeftTrainer(model, optax.adam(1e-2), config).with_gen_model_input_fn(inputs)
    trainer.with_training_hooks(losses := Losses())
    began = trainer.train_steps
    tokens = np.tile(np.arange(3, 11, dtype=np.int32), (2, 1))
    batch = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens, bool))
    trainer.train([batch] * steps)
    return began, losses.found


def sampler_of(model):
    from tunix.generate import sampler

    cache = sampler.CacheConfig(cache_size=16, num_layers=2, num_kv_heads=2, head_dim=8)
    return sampler.Sampler(model, Letters(), cache)


def generated(sampler):
    return np.asarray(sampler(["abc"], max_generation_steps=5, temperature=0.0, seed=0).tokens[0]).tolist()


def frozen_bits(model, delta):
    state = nnx.state(model, nnx.All(nnx.Param, nnx.Not(delta.filter)))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("method", MAKE)
def test_the_trainer_trains_the_delta_alone_and_resumes_with_the_same_losses(method, tmp_path):
    model, delta = make(method)
    before, values = frozen_bits(model, delta), jax.tree.leaves(delta.partition()[0])
    began, losses = train(model, 6)
    assert began == 0
    assert losses[-1] < losses[0]
    assert frozen_bits(model, delta) == before
    changed = [np.any(a != b) for a, b in zip(values, jax.tree.leaves(delta.partition()[0]), strict=True)]
    assert any(changed)
    first, second = train(make(method)[0], 3, tmp_path), train(other := make(method)[0], 6, tmp_path)
    assert (first[0], second[0]) == (0, 3)
    assert first[1] + second[1] == losses
    tokens = tunix_models.inputs()
    np.testing.assert_array_equal(other(*tokens)[0], model(*tokens)[0])


def test_the_sampler_generates_with_the_values_before_and_after_training():
    model, _ = make("lora")
    sampler, bare = sampler_of(model), sampler_of(tunix_models.build("llama3"))
    before = generated(sampler)
    assert before == generated(bare)  # a new LoRA changes nothing
    train(model, 12)
    sampler.transformer_state = nnx.variables(model)
    after = generated(sampler)
    assert after != before
    assert after == generated(sampler_of(model))


def test_the_reference_model_of_a_policy_is_a_clone_made_while_the_delta_is_disabled():
    model, delta = make("lora")
    train(model, 3)
    with delta.disabled():
        reference = nnx.clone(model)
    bare, inputs = tunix_models.build("llama3"), tunix_models.inputs()
    assert nnx.graphdef(reference) == nnx.graphdef(bare)
    np.testing.assert_array_equal(reference(*inputs)[0], bare(*inputs)[0])
    assert np.abs(model(*inputs)[0] - reference(*inputs)[0]).max() > 1e-3
