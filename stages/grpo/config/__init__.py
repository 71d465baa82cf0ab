"""config: pipeline.yaml, parsed once into frozen models; stages receive values and never re-read files."""

from grpo.config.evaluate import EvaluateConfig
from grpo.config.generate import DynamicSamplingConfig, GenerateConfig
from grpo.config.judge import JudgeConfig
from grpo.config.loading import differing_keys, flatten, load, overridden_keys, validated
from grpo.config.model import AdvantageConfig, Config
from grpo.config.prompts import ColumnsConfig, PromptsConfig
from grpo.config.score import RewardConfig, ScoreConfig
from grpo.config.update import LoraConfig, UpdateConfig

__all__ = [
    "AdvantageConfig",
    "ColumnsConfig",
    "Config",
    "DynamicSamplingConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "JudgeConfig",
    "LoraConfig",
    "PromptsConfig",
    "RewardConfig",
    "ScoreConfig",
    "UpdateConfig",
    "differing_keys",
    "flatten",
    "load",
    "overridden_keys",
    "validated",
]
