"""The constructors of the methods that add layers, or say what trains of the model."""

from __future__ import annotations

from jdelta.delta import DeltaModel
from jdelta.methods.adapter import AdapterConfig
from jdelta.methods.bitfit import BitFitConfig
from jdelta.methods.compacter import CompacterConfig
from jdelta.methods.ln_tuning import LNTuningConfig
from jdelta.methods.low_rank_adapter import LowRankAdapterConfig
from jdelta.methods.parallel_adapter import ParallelAdapterConfig
from jdelta.methods.prefix import PrefixConfig
from jdelta.methods.soft_prompt import SoftPromptConfig


class AdapterModel(DeltaModel):
    """An adapter after each module; by default after the attention's output projection and after the feed-forward.

        delta = jdelta.AdapterModel(model, bottleneck_dim=24)

    A model without attention gets one after each block. The leaves are `adapter/down/{kernel,bias}`,
    `(d, bottleneck_dim)`, and `adapter/up/{kernel,bias}`.
    Its own arguments are those of `AdapterConfig`, the common ones and errors those of `DeltaModel`.
    """

    method_class = AdapterConfig


class ParallelAdapterModel(DeltaModel):
    """An adapter from the input of one module to the output of another.

        delta = jdelta.ParallelAdapterModel(model, modified_modules=["attention", "attention", "fc1", "fc2"])

    As in OpenDelta, `modified_modules` are pairs: from, to, from, to. A pair of twice the same pattern spans each
    module that it means. Otherwise each `to` is paired with the nearest `from` before it. By default, beside the
    attention and beside the feed-forward. The leaves are below the module at the span's end,
    `parallel_adapter/{down,up}/{kernel,bias}`. Its own arguments are those of `ParallelAdapterConfig`, the common ones
    and errors those of `DeltaModel`.
    """

    method_class = ParallelAdapterConfig


class LowRankAdapterModel(DeltaModel):
    """A low-rank adapter after each module; by default after the attention's output projection and the feed-forward.

        delta = jdelta.LowRankAdapterModel(model, reduction_factor=32)

    A model without attention gets one after each block. The leaves are
    `low_rank_adapter/{down,up}/{left,right,bias}`; `down` is from `d` to `d // reduction_factor`.
    Its own arguments are those of `LowRankAdapterConfig`, the common ones and errors those of `DeltaModel`.
    """

    method_class = LowRankAdapterConfig


class CompacterModel(DeltaModel):
    """A compacter after each module; by default after the attention's output projection and the feed-forward.

        delta = jdelta.CompacterModel(model, reduction_factor=16, hypercomplex_division=4)

    A model without attention gets one after each block. The leaves are
    `compacter/{down,up}/{phm_rule,W_left,W_right,bias}`, with `n` for `hypercomplex_division` and `d_in`, `d_out` for
    the widths of `down` or `up`:

    - `phm_rule`, `(n, n, n)`, or `phm_rule_left`, `(n, n, 1)`, and `phm_rule_right`, `(n, 1, n)`;
    - `W_left`, `(n, d_in/n, phm_rank)`, and `W_right`, `(n, phm_rank, d_out/n)`, or `W`, `(n, d_in/n, d_out/n)`.

    What is shared is at the root of the tree: `compacter/phm_rule`, `compacter/down_W_left_192x1`.
    Its own arguments are those of `CompacterConfig`, the common ones and errors those of `DeltaModel`.
    """

    method_class = CompacterConfig


class BitFitModel(DeltaModel):
    """Trains the biases in and below each module; by default all in attention, feed-forward and normalisation.

        delta = jdelta.BitFitModel(model)

    In a model without attention it is all in the blocks. Existing biases train where they are, and `detach` puts
    their pretrained values back. A linear or normalisation module without one gets the leaf `bitfit/bias`. The output
    is unchanged at initialisation. It has no arguments of its own.
    """

    method_class = BitFitConfig


class LNTuningModel(DeltaModel):
    """LN tuning: the scales and biases of norms train, by default of all in the model.

        delta = jdelta.LNTuningModel(model)

    It trains the model's own leaves: the tree gets no new ones, and `remove` puts their pretrained values back. Of a
    module that is no norm, the norms inside train. It has no arguments of its own; the common ones and errors are those
    of `DeltaModel`.
    """

    method_class = LNTuningConfig


class PrefixModel(DeltaModel):
    """Trainable keys and values in attention modules.

        delta = jdelta.PrefixModel(model, prefix_token_num=6)

    A host is a module that computes one attention, such as BERT's `attention` or `crossattention`. Its leaves are
    `prefix/keys` and `prefix/values`, `(prefix_token_num, heads, width)`. With `reparameterize`, they are made in every
    run by one small network, whose leaves are below `prefix` at the root of the tree; `materialise` writes them out.
    The output changes at once. Its own arguments are those of `PrefixConfig`, the common ones and errors those of
    `DeltaModel`; a host that computes no attention, or several, is a `TypeError`.
    """

    method_class = PrefixConfig


class SoftPromptModel(DeltaModel):
    """Trainable vectors before a model's embedded tokens: a decoder's, an encoder's, or those of an encoder-decoder's
    encoder, where the decoder attends to them too.

        delta = jdelta.SoftPromptModel(model, soft_token_num=20)

    Its host is the word embedding, and its leaf `soft_prompt/embedding`, `(soft_token_num, features)`. Outputs keep the
    length of the input, except that `encode` returns the prompt's states too, which `decode` expects. The output
    changes at once. Its own arguments are those of `SoftPromptConfig`, the common ones and errors those of
    `DeltaModel`; a model that takes no tokens is a `TypeError`, a sequence beyond the position table a `ValueError`.
    """

    method_class = SoftPromptConfig
