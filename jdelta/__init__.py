"""jdelta: delta tuning (parameter-efficient fine-tuning) for JAX and Flax."""

from jdelta import transformers_repair as _transformers_repair
from jdelta.addressing import match
from jdelta.backbone import Backbone
from jdelta.config import DeltaConfig
from jdelta.delta import DeltaModel
from jdelta.interception import Edit
from jdelta.methods.adapter import AdapterConfig, AdapterModel
from jdelta.methods.bitfit import BitFitModel
from jdelta.methods.lora import LoraConfig, LoraModel
from jdelta.methods.parallel_adapter import ParallelAdapterConfig, ParallelAdapterModel
from jdelta.methods.prefix import PrefixConfig, PrefixModel
from jdelta.methods.soft_prompt import SoftPromptConfig, SoftPromptModel
from jdelta.structure import ModuleInfo, Structure
from jdelta.surgery import combine, graft, partition, prune
from jdelta.version import __version__
from jdelta.visualization import Visualization

__all__ = [
    "AdapterConfig",
    "AdapterModel",
    "Backbone",
    "BitFitModel",
    "DeltaConfig",
    "DeltaModel",
    "Edit",
    "LoraConfig",
    "LoraModel",
    "ModuleInfo",
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
    "graft",
    "match",
    "partition",
    "prune",
]

_transformers_repair.install()
