"""rewards: the built-in reward functions, to be called by functions of your own (docs/rewards.md).

Their one public name: where they are written may change, and this does not.
"""

from grpo.score.functions.built_in import exact_answer, gsm8k, length_penalty, math_verify, regex_format

__all__ = ["exact_answer", "gsm8k", "length_penalty", "math_verify", "regex_format"]
