"""The methods that change weights of modules, as PEFT has them, by `peft_type`. LoRA is read and written by itself."""

from __future__ import annotations

from jdelta.core.linear_maps import ConvMap, EinsumMap, MatrixMap
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
from jdelta.methods.miss import MissConfig
from jdelta.methods.oft import LEAF, OFTConfig
from jdelta.methods.randlora import RandLoraConfig
from jdelta.methods.road import RoadConfig
from jdelta.methods.shira import ShiraConfig
from jdelta.methods.vera import VeraConfig
from jdelta.saved.peft.tuners.adalora import VALUES, AdaLoraTuner
from jdelta.saved.peft.tuners.dotted import Dotted
from jdelta.saved.peft.tuners.fourierft import FourierFTTuner
from jdelta.saved.peft.tuners.gralora import GraLoraTuner
from jdelta.saved.peft.tuners.ia3 import IA3Tuner
from jdelta.saved.peft.tuners.oft import OFTTuner
from jdelta.saved.peft.tuners.projected import Projected, RandLora
from jdelta.saved.peft.tuners.shira import ShiraTuner
from jdelta.saved.peft.tuners.tuner import Tuner
from jdelta.saved.peft.tuners.untransposed import Untransposed

TUNERS = {
    tuner.kind: tuner
    for tuner in (
        AdaLoraTuner(
            "ADALORA",
            AdaLoraConfig,
            {"a": "lora_A", "e": VALUES, "b": "lora_B"},
            fields=(
                *("init_r", "target_r", "lora_alpha", "lora_dropout", "tinit", "tfinal", "deltaT", "beta1", "beta2"),
                *("orth_reg_weight", "total_step"),
            ),
            read_fields=("rank_pattern",),
            other_fields=("r", "init_lora_weights", "runtime_config", "megatron_core", "qalora_group_size"),
            conv1d=True,
            biases="lora_only",
        ),
        Tuner(
            "HIRA",
            HiraConfig,
            {"a": "hira_A", "b": "hira_B"},
            fields=("r", "hira_dropout"),
            other_fields=("init_weights", "rank_pattern"),  # PEFT 0.21 takes rank_pattern, and gives all the rank r
            conv1d=True,
        ),
        Dotted(
            "C3A",
            C3AConfig,
            {"kernel": "c3a_kernel"},
            fields=("block_size",),
            read_fields=("block_size_pattern",),
            other_fields=("init_weights",),
            biases="c3a_only",
            pattern="block_size_pattern",
            replaces="block_size",
        ),
        Tuner(
            "DELORA",
            DeloraConfig,
            {"a": "delora_A", "b": "delora_B", "lambda": "delora_lambda", "w_norm": "delora_w_norm"},
            fields=("r", "delora_lambda", "module_dropout"),
            patterns=("rank_pattern", "lambda_pattern"),
            other_fields=("init_weights",),
            biases="delora_only",
        ),
        Tuner(
            "LOHA",
            LohaConfig,
            {"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"},
            fields=("r", "alpha"),  # not rank_dropout and module_dropout, which drop parts of the change
            patterns=("rank_pattern", "alpha_pattern"),
            other_fields=("init_weights",),
        ),
        Tuner(
            "LOKR",
            LokrConfig,
            {
                **{"w1": "lokr_w1", "a1": "lokr_w1_b", "b1": "lokr_w1_a"},
                **{"w2": "lokr_w2", "a2": "lokr_w2_b", "b2": "lokr_w2_a"},
            },
            fields=("r", "alpha", "decompose_factor", "decompose_both", "init_weights"),
            patterns=("rank_pattern", "alpha_pattern"),
            other_fields=("rank_dropout_scale",),  # of rank_dropout, which is refused as module_dropout is
        ),
        Untransposed(
            "MISS",
            MissConfig,
            {"d": "miss_block"},
            fields=("r", "miss_dropout", "mini_r", "init_weights"),
            biases="MiSS_only",
        ),
        ShiraTuner(
            "SHIRA",
            ShiraConfig,
            {"values": "shira_weight", "indices": "shira_indices"},
            fields=("r",),
            other_fields=("init_weights", "mask_type", "random_seed"),  # the places are in the file
        ),
        Untransposed(
            "HRA",
            HRAConfig,
            {"u": "hra_u"},
            fields=("r", "apply_GS"),
            other_fields=("init_weights",),
            biases="hra_only",
        ),
        OFTTuner(
            "OFT",
            OFTConfig,
            {LEAF: "oft_R.weight"},
            fields=(
                *("r", "oft_block_size", "coft", "eps", "block_share"),
                *("use_cayley_neumann", "num_cayley_neumann_terms"),
            ),  # not module_dropout, which PEFT 0.21 takes, and drops nothing
            read_fields=("peft_version",),
            other_fields=("init_weights",),
            biases="oft_only",
        ),
        Projected(
            "VERA",
            VeraConfig,
            {"lambda_d": "vera_lambda_d", "lambda_b": "vera_lambda_b"},
            shared={"a": "vera_A", "b": "vera_B"},
            fields=("r", "vera_dropout", "d_initial", "projection_prng_key"),
            read_fields=("save_projection",),
            other_fields=("init_weights",),
            conv1d=True,
            biases="vera_only",
        ),
        Tuner(
            "ROAD",
            RoadConfig,
            {"theta": "road_theta", "alpha": "road_alpha"},
            fields=("variant", "group_size"),
            other_fields=("init_weights",),
        ),
        IA3Tuner(
            "IA3",
            IA3Config,
            {"l": "ia3_l"},
            fields=("init_ia3_weights",),
            read_fields=("feedforward_modules",),
            linear=(MatrixMap, EinsumMap, ConvMap),
            conv1d=True,
        ),
        FourierFTTuner(
            "FOURIERFT",
            FourierFTConfig,
            {"spectrum": "fourierft_spectrum"},
            fields=("n_frequency", "scaling", "random_loc_seed", "init_weights"),
            read_fields=("n_frequency_pattern",),
            conv1d=True,
            biases="fourier_only",
            pattern="n_frequency_pattern",
            replaces="n_frequency",
        ),
        GraLoraTuner(
            "GRALORA",
            GraLoraConfig,
            {
                "a": "gralora_A",
                "b": "gralora_B",
                "a_general": "gralora_A_general.weight",
                "b_general": "gralora_B_general.weight",
            },
            fields=("r", "hybrid_r", "alpha", "gralora_dropout", "gralora_k"),
            other_fields=("init_weights",),
            conv1d=True,
            biases="gralora_only",
        ),
        RandLora(
            "RANDLORA",
            RandLoraConfig,
            {"lambda": "randlora_lambda", "gamma": "randlora_gamma"},
            shared={"a": "randlora_A", "b": "randlora_B"},
            fields=("r", "randlora_alpha", "randlora_dropout", "projection_prng_key", "sparse", "very_sparse"),
            read_fields=("save_projection",),
            other_fields=("init_weights",),
            conv1d=True,
            biases="randlora_only",
        ),
    )
}
