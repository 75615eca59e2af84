"""A run as one frozen value: YAML read by OmegaConf, checked by pydantic, every problem named at once. Never imports torch.

This is the one package whose `__init__` hands names on: `from bpt_dist import config` and `config.load(path)`.
"""

from bpt_dist.config.base import MethodConfig, refuse, without_effect
from bpt_dist.config.loading import expand, load, load_values, resolved_yaml
from bpt_dist.config.method_source import method_names, method_options
from bpt_dist.config.prompt_options import PromptOptions
from bpt_dist.config.resume import (
    CHANGEABLE,
    MOVABLE,
    changed_keys,
    changes,
    fingerprint,
    is_same_run,
    job_identity,
    moved_inputs,
)
from bpt_dist.config.sections import (
    BackboneConfig,
    DataConfig,
    DistributionConfig,
    EvaluationConfig,
    MeshShape,
    RunConfig,
    SourceStageConfig,
    StageConfig,
    TargetStageConfig,
    TrackingConfig,
)

__all__ = [
    "CHANGEABLE",
    "MOVABLE",
    "BackboneConfig",
    "DataConfig",
    "DistributionConfig",
    "EvaluationConfig",
    "MeshShape",
    "MethodConfig",
    "PromptOptions",
    "RunConfig",
    "SourceStageConfig",
    "StageConfig",
    "TargetStageConfig",
    "TrackingConfig",
    "changed_keys",
    "changes",
    "expand",
    "fingerprint",
    "is_same_run",
    "job_identity",
    "load",
    "load_values",
    "method_names",
    "method_options",
    "moved_inputs",
    "refuse",
    "resolved_yaml",
    "without_effect",
]
