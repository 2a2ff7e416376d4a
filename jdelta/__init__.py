"""jdelta: delta tuning (parameter-efficient fine-tuning) for JAX and Flax."""

from jdelta import transformers_linear as _transformers_linear
from jdelta import transformers_repair as _transformers_repair
from jdelta.addressing import match
from jdelta.arithmetic import interpolate, negate, weighted_sum
from jdelta.auto import AutoDeltaConfig, AutoDeltaModel
from jdelta.backbone import Backbone
from jdelta.common_names import register_common_names
from jdelta.config import DeltaConfig
from jdelta.delta import DeltaModel
from jdelta.finetuned import Finetuned
from jdelta.fused_attention import fused_attention
from jdelta.interactive import select_modules
from jdelta.interception import Edit
from jdelta.lean_activations import lean_activations
from jdelta.linear import register_linear
from jdelta.many import rowwise, select, stack, unstack
from jdelta.methods.adapter import AdapterConfig, AdapterModel
from jdelta.methods.bitfit import BitFitConfig, BitFitModel
from jdelta.methods.compacter import CompacterConfig, CompacterModel
from jdelta.methods.lora import LoraConfig, LoraModel
from jdelta.methods.low_rank_adapter import LowRankAdapterConfig, LowRankAdapterModel
from jdelta.methods.parallel_adapter import ParallelAdapterConfig, ParallelAdapterModel
from jdelta.methods.prefix import PrefixConfig, PrefixModel
from jdelta.methods.soft_prompt import SoftPromptConfig, SoftPromptModel
from jdelta.movement import Movement
from jdelta.peft_format import from_peft
from jdelta.sharding import match_partition_rules, state_shardings
from jdelta.structure import ModuleInfo, Structure
from jdelta.surgery import combine, graft, partition, prune
from jdelta.version import __version__
from jdelta.visualization import Visualization

__all__ = [
    "AdapterConfig",
    "AdapterModel",
    "AutoDeltaConfig",
    "AutoDeltaModel",
    "Backbone",
    "BitFitConfig",
    "BitFitModel",
    "CompacterConfig",
    "CompacterModel",
    "DeltaConfig",
    "DeltaModel",
    "Edit",
    "Finetuned",
    "LoraConfig",
    "LoraModel",
    "LowRankAdapterConfig",
    "LowRankAdapterModel",
    "ModuleInfo",
    "Movement",
    "ParallelAdapterConfig",
    "ParallelAdapterModel",
    "PrefixConfig",
    "PrefixModel",
    "SoftPromptConfig",
    "SoftPromptModel",
    "Structure",
    "Visualization",
    "__version__",
    "combine",
    "from_peft",
    "fused_attention",
    "graft",
    "interpolate",
    "lean_activations",
    "match",
    "match_partition_rules",
    "negate",
    "partition",
    "prune",
    "register_common_names",
    "register_linear",
    "rowwise",
    "select",
    "select_modules",
    "stack",
    "state_shardings",
    "unstack",
    "weighted_sum",
]

_transformers_linear.install()
_transformers_repair.install()
