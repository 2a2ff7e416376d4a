"""The constructors of the methods that change weights: each attaches a delta of one method to a model."""

from __future__ import annotations

from jdelta.delta import DeltaModel
from jdelta.methods.adalora import AdaLoraConfig
from jdelta.methods.c3a import C3AConfig
from jdelta.methods.delora import DeloraConfig
from jdelta.methods.fourierft import FourierFTConfig
from jdelta.methods.gralora import GraLoraConfig
from jdelta.methods.hira import HiraConfig
from jdelta.methods.hra import HRAConfig
from jdelta.methods.ia3 import IA3Config
from jdelta.methods.loha import LohaConfig
from jdelta.methods.lokr import LokrConfig
from jdelta.methods.lora import LoraConfig
from jdelta.methods.miss import MissConfig
from jdelta.methods.oft import OFTConfig
from jdelta.methods.randlora import RandLoraConfig
from jdelta.methods.road import RoadConfig
from jdelta.methods.shira import ShiraConfig
from jdelta.methods.trainable_tokens import TrainableTokensConfig
from jdelta.methods.vera import VeraConfig


class LoraModel(DeltaModel):
    """LoRA on linear modules: Dense, DenseGeneral, Conv, Embed, Einsum, and what else is found to be linear.

        delta = jdelta.LoraModel(model, modified_modules=["query", "value"], lora_r=8)

    By default it is attached at query and value, or in a model without attention at the convolutions of its blocks.
    The leaves are `lora/a`, `(*d_in, r)`, and `lora/b`, `(r, *d_out)`. The output is unchanged at initialisation.
    Modules of other types than those of flax and transformers are tried on random numbers, and refused unless a change
    of their weights changes their output by `x` times it; see `jdelta.register_linear`.
    Its own arguments are those of `LoraConfig`, the common ones and errors those of `DeltaModel`.
    """

    method_class = LoraConfig


class AdaLoraModel(DeltaModel):
    """AdaLoRA on linear modules: LoRA whose ranks shrink in training, where they matter least.

        delta = jdelta.AdaLoraModel(model, modified_modules=["query", "value"], init_r=12, target_r=8, total_step=1000)

    By default it is where LoRA is. The leaves are `adalora/a`, `(*d_in, r)`, `adalora/e`, `(r,)`, the singular values,
    and `adalora/b`, `(r, *d_out)`. The output is unchanged at initialisation. The optimizer of `delta.optimizer` sets
    singular values to 0, and `delta.penalty` is to be added to the loss. Its own arguments are those of
    `AdaLoraConfig`, the common ones and errors those of `DeltaModel`.
    """

    method_class = AdaLoraConfig


class C3AModel(DeltaModel):
    """C3A on linear modules: a change that is circulant in each block of features.

        delta = jdelta.C3AModel(model, modified_modules=["query", "value"], block_size=64)

    By default it is where LoRA is. The leaf is `c3a/kernel`, `(d_out/block_size, d_in/block_size, block_size)`. The
    output changes at once, unless `init_weights=True`. Its own arguments are those of `C3AConfig`, the common ones and
    errors those of `DeltaModel`; a module whose widths `block_size` does not divide is a `ValueError`.
    """

    method_class = C3AConfig


class HiraModel(DeltaModel):
    """HiRA on linear modules: a change of high rank, of the weight's own pattern.

        delta = jdelta.HiraModel(model, modified_modules=["query", "value"], r=32)

    By default it is where LoRA is. The leaves are `hira/a`, `(*d_in, r)`, and `hira/b`, `(r, *d_out)`. The output is
    unchanged at initialisation. The changed weight is formed in each step: there is no thin form. Its own arguments are
    those of `HiraConfig`, the common ones and errors those of `DeltaModel`.
    """

    method_class = HiraConfig


class MissModel(DeltaModel):
    """MiSS on linear modules: one small matrix for all blocks of the input's features.

        delta = jdelta.MissModel(model, modified_modules=["query", "value"], r=64)

    By default it is where LoRA is, and costs less than that. The leaf is `miss/d`, `(r, *d_out)`, `(r, mini_r)` or, of
    `init_weights="bat"`, `(d_out / r, r, r)`. The output is unchanged at initialisation. Its own arguments are those of
    `MissConfig`, the common ones and errors those of `DeltaModel`.
    """

    method_class = MissConfig


class LohaModel(DeltaModel):
    """LoHa on linear modules: a change of rank up to `r²`, the product of two low-rank matrices entry by entry.

        delta = jdelta.LohaModel(model, modified_modules=["query", "value"], r=8)

    By default it is where LoRA is, with twice the parameters of that of rank `r`. The leaves are `loha/a1` and
    `loha/a2`, `(*d_in, r)`, and `loha/b1` and `loha/b2`, `(r, *d_out)`. The output is unchanged at initialisation,
    unless `init_weights=False`. Its own arguments are those of `LohaConfig`, the common ones and errors those of
    `DeltaModel`.
    """

    method_class = LohaConfig


class LokrModel(DeltaModel):
    """LoKr on linear modules: a change that is the Kronecker product of two small matrices.

        delta = jdelta.LokrModel(model, modified_modules=["query", "value"], r=8)

    By default it is where LoRA is. The widths of the weight are `d_in = m_in · n_in` and `d_out = m_out · n_out`. The
    leaves are `lokr/w1`, `(m_in, m_out)`, with `decompose_both` perhaps `lokr/a1`, `(m_in, r)`, and `lokr/b1`,
    `(r, m_out)`, in its place; and `lokr/a2`, `(n_in, r)`, and `lokr/b2`, `(r, n_out)`, or `lokr/w2`, `(n_in, n_out)`,
    where `r` is at least half the larger width. The output is unchanged at initialisation, unless
    `init_weights=False`. Its own arguments are those of `LokrConfig`, the common ones and errors those of `DeltaModel`.
    """

    method_class = LokrConfig


class DeloraModel(DeltaModel):
    """DeLoRA on linear modules: a low-rank change of normalised directions, whose strength trains.

        delta = jdelta.DeloraModel(model, modified_modules=["query", "value"], r=8, delora_lambda=15)

    By default it is where LoRA is. The leaves are `delora/a`, `(*d_in, r)`, `delora/b`, `(r, *d_out)`, `delora/lambda`,
    `(1,)`, and `delora/w_norm`, `(*d_in,)`: the norms of the weight's rows when the delta is attached, which are saved
    and never train. The output is unchanged at initialisation. Its own arguments are those of `DeloraConfig`, the
    common ones and errors those of `DeltaModel`.
    """

    method_class = DeloraConfig


class ShiraModel(DeltaModel):
    """SHiRA on linear modules: some entries of the weight train, at random places.

        delta = jdelta.ShiraModel(model, modified_modules=["query", "value"], r=32)

    By default it is where LoRA is, with as many parameters as that of rank `r`. The leaves are `shira/values`,
    `(count,)`, and `shira/indices`, `(2, count)`: the rows and columns of their places in the weight, whole numbers
    that are saved and never train. The output is unchanged at initialisation. The changed weight is formed in each
    step: there is no thin form. Its own arguments are those of `ShiraConfig`, the common ones and errors those of
    `DeltaModel`.
    """

    method_class = ShiraConfig


class HRAModel(DeltaModel):
    """HRA on linear modules: the input's features are reflected, by a product of Householder reflections.

        delta = jdelta.HRAModel(model, modified_modules=["query", "value"], r=8)

    By default it is at query and value. It takes modules whose features come in their input's last axes: not
    convolutions and embeddings. The leaf is `hra/u`, `(*d_in, r)`. The output is unchanged at initialisation if `r` is
    even and `apply_GS` is not set. Its own arguments are those of `HRAConfig`, the common ones and errors those of
    `DeltaModel`.
    """

    method_class = HRAConfig


class OFTModel(DeltaModel):
    """OFT on linear modules: blocks of the input's features are rotated.

        delta = jdelta.OFTModel(model, modified_modules=["query", "value"], oft_block_size=32)

    By default it is at query and value. It takes modules whose features come in their input's last axes: not
    convolutions and embeddings. The leaf is `oft/oft_R`, `(blocks, oft_block_size * (oft_block_size - 1) / 2)`. The
    output is unchanged at initialisation. Its own arguments are those of `OFTConfig`, the common ones and errors those
    of `DeltaModel`.
    """

    method_class = OFTConfig


class VeraModel(DeltaModel):
    """VeRA on linear modules: two vectors that train, beside random matrices that all modules share.

        delta = jdelta.VeraModel(model, modified_modules=["query", "value"], r=256)

    By default it is where LoRA is. The leaves are `vera/lambda_d`, `(r,)`, and `vera/lambda_b`, `d_out`, and at the
    root of the tree `vera/a`, `(largest d_in, r)`, and `vera/b`, `(r, largest d_out)`, which never train. The output is
    unchanged at initialisation. Its own arguments are those of `VeraConfig`, the common ones and errors those of
    `DeltaModel`.
    """

    method_class = VeraConfig


class RoadModel(DeltaModel):
    """RoAd on linear modules: pairs of the output's features are rotated and scaled, those of the bias too.

        delta = jdelta.RoadModel(model, modified_modules=["query", "value"], variant="road_1", group_size=64)

    By default it is where LoRA is. It takes modules whose features come in their output's last axes. The leaves are
    `road/theta` and `road/alpha`, `(d_out / 2,)`, `(*d_out,)` or `(2 * d_out,)` in the three variants. The output is
    unchanged at initialisation. Its own arguments are those of `RoadConfig`, the common ones and errors those of
    `DeltaModel`.
    """

    method_class = RoadConfig


class IA3Model(DeltaModel):
    """IA3 on linear modules: what comes out of them is scaled by a trained vector, or what goes into them.

        delta = jdelta.IA3Model(model, modified_modules=["key", "value", "1.output.dense"])

    By default it is at keys, values, and at the feed-forward's second layer, of which it scales the input. It takes
    modules whose features of that side are in the last axes, and of embeddings scales the output. The leaf is `ia3/l`,
    `(*d_out,)` or `(*d_in,)`; at the input of a convolution, `(channels,)`. The output is unchanged at initialisation.
    Its own arguments are those of `IA3Config`, the common ones and errors those of `DeltaModel`.
    """

    method_class = IA3Config


class FourierFTModel(DeltaModel):
    """FourierFT on linear modules: some entries of the change's spectrum train, at random places.

        delta = jdelta.FourierFTModel(model, modified_modules=["query", "value"], n_frequency=1000)

    By default it is where LoRA is. The leaf is `fourierft/spectrum`, `(n_frequency,)`; the places follow from
    `random_loc_seed`. As in PEFT, it starts at N(0, 1), which changes the output at once, unless `init_weights=True`.
    The changed weight is formed in each step: there is no thin form. Its own arguments are those of `FourierFTConfig`,
    the common ones and errors those of `DeltaModel`.
    """

    method_class = FourierFTConfig


class RandLoraModel(DeltaModel):
    """RandLoRA on linear modules: a change of full rank, of random matrices that all modules share.

        delta = jdelta.RandLoraModel(model, modified_modules=["query", "value"], r=32)

    By default it is where LoRA is. With `min` and `max` for the smaller and the larger of `d_in` and `d_out`, the
    leaves are `randlora/lambda`, `(r, n)`, and `randlora/gamma`, `(n, min)`, for `n = ⌈min / r⌉`. At the root of the
    tree are `randlora/a`, `(r, min)`, and `randlora/b`, `(max, n, r)`, for the largest `d_in` and `d_out`, which never
    train. The output is unchanged at initialisation. It costs about what two more modules like the host cost. Its own
    arguments are those of `RandLoraConfig`, the common ones and errors those of `DeltaModel`.
    """

    method_class = RandLoraConfig


class GraLoraModel(DeltaModel):
    """GraLoRA on linear modules: a LoRA of its own for each of `k × k` blocks of the weight.

        delta = jdelta.GraLoraModel(model, modified_modules=["query", "value"], r=32, gralora_k=2)

    By default it is where LoRA is, with as many parameters as that of rank `r`, and it costs the same. The leaves are
    `gralora/a`, `(*d_in, k, r / k)`, and `gralora/b`, `(k, r / k, *d_out)`; with `hybrid_r`, `gralora/a_general` and
    `gralora/b_general` besides, as of LoRA. The output is unchanged at initialisation. Its own arguments are those of
    `GraLoraConfig`, the common ones and errors those of `DeltaModel`.
    """

    method_class = GraLoraConfig


class TrainableTokensModel(DeltaModel):
    """Trains the rows of some tokens, in the place of theirs in an embedding.

        delta = jdelta.TrainableTokensModel(model, token_indices=[30522, 30523])

    By default in the word embedding. The leaf is `trainable_tokens/tokens`, `(tokens, *d_out)`, which starts at the
    embedding's rows. The output is unchanged at initialisation. Where a head computes with the embedding too, it has
    the trained rows, and the delta's target is the parameter. Its own arguments are those of `TrainableTokensConfig`,
    the common ones and errors those of `DeltaModel`; a module that is no embedding is a `TypeError`, an id beyond its
    rows a `ValueError`.
    """

    method_class = TrainableTokensConfig
