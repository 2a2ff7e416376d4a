"""jdelta: delta tuning (parameter-efficient fine-tuning) for JAX and Flax."""

from jdelta.auto import AutoDeltaConfig, AutoDeltaModel
from jdelta.core.checking import checking_products
from jdelta.core.context import Context, training_step
from jdelta.core.data_starts import DataStart
from jdelta.core.edits import CallEdit, WeightEdit
from jdelta.core.linear import register_linear, weight_edits
from jdelta.core.method import Method
from jdelta.core.structure import ModuleInfo, ParameterInfo, Structure
from jdelta.delta import DeltaModel
from jdelta.display.interactive import select_modules, select_parameters
from jdelta.display.movement import Movement
from jdelta.display.status import Status
from jdelta.display.visualization import Visualization
from jdelta.exchange import from_peft
from jdelta.hosts.linen import linear_types as _linen_linear
from jdelta.hosts.linen.backbone import Backbone
from jdelta.hosts.nnx import linear_types as _nnx_linear
from jdelta.hosts.transformers import linear_types as _transformers_linear
from jdelta.hosts.transformers import repairs as _transformers_repair
from jdelta.leaving_out import without
from jdelta.methods.adalora import AdaLoraConfig
from jdelta.methods.adapter import AdapterConfig
from jdelta.methods.bitfit import BitFitConfig
from jdelta.methods.c3a import C3AConfig
from jdelta.methods.compacter import CompacterConfig
from jdelta.methods.composed import ComposedConfig
from jdelta.methods.delora import DeloraConfig
from jdelta.methods.fourierft import FourierFTConfig
from jdelta.methods.gralora import GraLoraConfig
from jdelta.methods.hira import HiraConfig
from jdelta.methods.hra import HRAConfig
from jdelta.methods.ia3 import IA3Config
from jdelta.methods.ln_tuning import LNTuningConfig
from jdelta.methods.loha import LohaConfig
from jdelta.methods.lokr import LokrConfig
from jdelta.methods.lora import LoraConfig
from jdelta.methods.lora_data import CordaStart, EvaStart, LoraGaStart
from jdelta.methods.low_rank_adapter import LowRankAdapterConfig
from jdelta.methods.miss import MissConfig
from jdelta.methods.oft import OFTConfig
from jdelta.methods.parallel_adapter import ParallelAdapterConfig
from jdelta.methods.prefix import PrefixConfig
from jdelta.methods.randlora import RandLoraConfig
from jdelta.methods.road import RoadConfig
from jdelta.methods.shira import ShiraConfig
from jdelta.methods.soft_prompt import SoftPromptConfig
from jdelta.methods.trainable_tokens import TrainableTokensConfig
from jdelta.methods.vera import VeraConfig
from jdelta.models import (
    AdaLoraModel,
    AdapterModel,
    BitFitModel,
    C3AModel,
    CompacterModel,
    ComposedModel,
    DeloraModel,
    FourierFTModel,
    GraLoraModel,
    HiraModel,
    HRAModel,
    IA3Model,
    LNTuningModel,
    LohaModel,
    LokrModel,
    LoraModel,
    LowRankAdapterModel,
    MissModel,
    OFTModel,
    ParallelAdapterModel,
    PrefixModel,
    RandLoraModel,
    RoadModel,
    ShiraModel,
    SoftPromptModel,
    TrainableTokensModel,
    VeraModel,
    compose,
)
from jdelta.names.common_names import register_common_names
from jdelta.saved.arithmetic.combine import interpolate, negate, weighted_sum
from jdelta.saved.arithmetic.padding import padded
from jdelta.saved.conversion import Conversion, convert_to_lora
from jdelta.saved.finetuned import Finetuned
from jdelta.scale.many import rowwise, select, stack, unstack
from jdelta.scale.partition_rules import match_partition_rules, state_shardings
from jdelta.speedups.fused_attention import fused_attention
from jdelta.speedups.lean_activations import lean_activations
from jdelta.trees.addressing import match
from jdelta.trees.surgery import combine, graft, partition, prune
from jdelta.version import __version__

__all__ = [
    "AdaLoraConfig",
    "AdaLoraModel",
    "AdapterConfig",
    "AdapterModel",
    "AutoDeltaConfig",
    "AutoDeltaModel",
    "Backbone",
    "BitFitConfig",
    "BitFitModel",
    "C3AConfig",
    "C3AModel",
    "CallEdit",
    "CompacterConfig",
    "CompacterModel",
    "ComposedConfig",
    "ComposedModel",
    "Context",
    "Conversion",
    "CordaStart",
    "DataStart",
    "DeloraConfig",
    "DeloraModel",
    "DeltaModel",
    "EvaStart",
    "Finetuned",
    "FourierFTConfig",
    "FourierFTModel",
    "GraLoraConfig",
    "GraLoraModel",
    "HRAConfig",
    "HRAModel",
    "HiraConfig",
    "HiraModel",
    "IA3Config",
    "IA3Model",
    "LNTuningConfig",
    "LNTuningModel",
    "LohaConfig",
    "LohaModel",
    "LokrConfig",
    "LokrModel",
    "LoraConfig",
    "LoraGaStart",
    "LoraModel",
    "LowRankAdapterConfig",
    "LowRankAdapterModel",
    "Method",
    "MissConfig",
    "MissModel",
    "ModuleInfo",
    "Movement",
    "OFTConfig",
    "OFTModel",
    "ParallelAdapterConfig",
    "ParallelAdapterModel",
    "ParameterInfo",
    "PrefixConfig",
    "PrefixModel",
    "RandLoraConfig",
    "RandLoraModel",
    "RoadConfig",
    "RoadModel",
    "ShiraConfig",
    "ShiraModel",
    "SoftPromptConfig",
    "SoftPromptModel",
    "Status",
    "Structure",
    "TrainableTokensConfig",
    "TrainableTokensModel",
    "VeraConfig",
    "VeraModel",
    "Visualization",
    "WeightEdit",
    "__version__",
    "checking_products",
    "combine",
    "compose",
    "convert_to_lora",
    "from_peft",
    "fused_attention",
    "graft",
    "interpolate",
    "lean_activations",
    "match",
    "match_partition_rules",
    "negate",
    "padded",
    "partition",
    "prune",
    "register_common_names",
    "register_linear",
    "rowwise",
    "select",
    "select_modules",
    "select_parameters",
    "stack",
    "state_shardings",
    "training_step",
    "unstack",
    "weight_edits",
    "weighted_sum",
    "without",
]

_linen_linear.install()
_nnx_linear.install()
_transformers_linear.install()
_transformers_repair.install()
