"""config: pipeline.yaml, parsed once into frozen models; stages receive values and never re-read files."""

from grpo.config.artifacts import ArtifactsConfig, mirror_address
from grpo.config.evaluate import EvaluateConfig, StopConfig
from grpo.config.execution import ExecutionConfig
from grpo.config.generate import GenerateConfig
from grpo.config.loading import PIPELINE, SECTION, differing_keys, flatten, load, overridden_keys, validated
from grpo.config.lora import LoraConfig
from grpo.config.model import AdvantageConfig, Config, ModelOptions
from grpo.config.prompts import PromptsConfig
from grpo.config.score import JudgeConfig, RewardConfig, TeacherConfig
from grpo.config.sweep import points
from grpo.config.update import UpdateConfig

__all__ = [
    "PIPELINE",
    "SECTION",
    "AdvantageConfig",
    "ArtifactsConfig",
    "Config",
    "EvaluateConfig",
    "ExecutionConfig",
    "GenerateConfig",
    "JudgeConfig",
    "LoraConfig",
    "ModelOptions",
    "PromptsConfig",
    "RewardConfig",
    "StopConfig",
    "TeacherConfig",
    "UpdateConfig",
    "differing_keys",
    "flatten",
    "load",
    "mirror_address",
    "overridden_keys",
    "points",
    "validated",
]
