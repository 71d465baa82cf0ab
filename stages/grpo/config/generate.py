"""config.generate: the generate section of pipeline.yaml."""

from typing import Annotated, Any, Literal

from pydantic import Field

from grpo.config.section import ADDED, Count, NonEmpty, Plain, Section, must

_STRUCTURES: dict[str, type] = {"regex": str, "json": dict, "choice": list, "grammar": str}
_STRUCTURE = "must hold one of regex (text), json (a schema), choice (a list of texts) and grammar (text)"


def _is_structure(values: dict[str, Any]) -> bool:
    [*pairs] = values.items()
    if len(pairs) != 1 or not isinstance(pairs[0][1], _STRUCTURES.get(pairs[0][0], ())) or not pairs[0][1]:
        return False
    name, value = pairs[0]
    return name != "choice" or all(isinstance(text, str) and text for text in value)


class DynamicSamplingConfig(Section):
    """Rounds of new prompts until enough groups have signal (dynamic sampling, DAPO, arXiv 2503.14476)."""

    min_groups: Count
    """Groups whose scored rewards differ, over all rounds of an iteration, that make another round needless;
    at most prompts_per_iteration * max_rounds."""
    max_rounds: Annotated[int, Field(ge=1, le=1024)]
    """Rounds at most, 1 (no other) to 1,024. Training then continues with what it has, and says so."""


class GenerateConfig(Section):
    """generate: policy + prompts -> rollouts."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """auto: vllm where it is installed and a GPU is there, else transformers, the built-in engine."""
    engine_options: Plain = Field({})
    """vLLM's own engine arguments, such as gpu_memory_utilization, tensor_parallel_size, max_num_seqs, dtype
    or quantization. dtype: float32 on a CPU and bfloat16 on a GPU unless given."""
    prompts_per_iteration: Annotated[int, Field(ge=1, le=2**20)] = 32
    """Groups per iteration, 1 to 2**20."""
    samples_per_prompt: Annotated[int, Field(ge=1, le=2**20)] = 4
    """K, responses per group, >= 2: a group of one has no relative advantage (1: teachers alone)."""
    max_new_tokens: Count = 128
    """Tokens sampled at most per response, the end-of-sequence token included."""
    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Sampling temperature, >= 0.01, vLLM's least. Log-probs are those of the tempered distribution."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that together have this probability; 1: from all. vllm only."""
    top_k: Count | None = None
    """Sample from this many of the likeliest tokens; null: from all. vllm only."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Leave out tokens less likely than this share of the likeliest one; 0: none. vllm only."""
    repetition_penalty: Annotated[float, Field(gt=0, le=100), ADDED] = 1.0
    """Divides the logits of tokens that prompt or response hold (negative ones: times it); 1: no penalty."""
    structured_outputs: Annotated[Annotated[Plain, must(_is_structure, _STRUCTURE)] | None, ADDED] = None
    """What every response must have the form of: `regex`, `json` (a schema), `choice` or `grammar`; null:
    any. vllm only."""
    stop: Annotated[list[NonEmpty], ADDED] = Field([])
    """Texts that end a response as an end-of-sequence token does: the token that completes one is its last.
    They are found across tokens, special ones included, and are a part of the response. Evaluations too."""
    allow_truncated_sampling: bool = False
    """true: allow top_p, top_k, min_p, repetition_penalty and structured_outputs, though the importance ratio
    is then biased: the learner's log-probs are over the whole vocabulary (docs/math.md)."""
    rollouts_per_shard: Count = 2048
    """Rollouts committed at a time, rounded down to whole groups: what a crash can cost at most. One Parquet
    file and row group each, which ~2k rows suit."""
    max_rows_per_batch: Count = 512
    """Rollouts the built-in engine samples at once; bounds its memory."""
    prompts_sql: NonEmpty | None = None
    """File with a query over the tables of the iterations before i - policy_lag that returns the prompt_id of
    the groups of i, in order (docs/steering.md). null: each pass over the prompts in an order of its own."""
    policy_lag: Annotated[Annotated[int, Field(ge=0, le=8)], ADDED] = 0
    """L: iteration i samples from policy max(0, i - L), 0 to 8, so its rollouts need not wait for the updates
    between (docs/scaling.md). Needs no dynamic_sampling, whose rounds wait for rewards."""
    dynamic_sampling: DynamicSamplingConfig | None = None
    """Sample rounds of further prompts until enough groups have signal; null: one round."""

    def truncation(self) -> str:
        """The key that cuts the distribution, the first of them, for which vLLM is needed; empty: none."""
        cuts = {"top_p": self.top_p < 1, "top_k": self.top_k is not None, "min_p": self.min_p > 0}
        cuts["structured_outputs"] = self.structured_outputs is not None
        return next((name for name, does in cuts.items() if does), "")

    def model_post_init(self, context: Any, /) -> None:
        """Raise ValueError for rounds that cannot reach their aim, and for a distribution that is cut."""
        rounds, at_a_time = self.dynamic_sampling, self.prompts_per_iteration
        if rounds is not None and rounds.min_groups > rounds.max_rounds * at_a_time:
            raise ValueError(
                f"dynamic_sampling.min_groups: {rounds.min_groups} are more than the {at_a_time} groups of"
                f" prompts_per_iteration times max_rounds {rounds.max_rounds}; lower it, or raise those"
            )
        if rounds is not None and self.policy_lag:
            raise ValueError(
                f"policy_lag: {self.policy_lag} iterations are sampled ahead of their rewards, and the rounds"
                " of dynamic_sampling wait for these; leave one of them out"
            )
        given = self.truncation()
        biased = given or ("repetition_penalty" if self.repetition_penalty != 1 else "")
        if biased and not self.allow_truncated_sampling:
            does = "cuts" if given else "changes"
            raise ValueError(
                f"{biased} {does} the distribution the policy is sampled from, which biases the"
                " importance ratio; leave it out, or set allow_truncated_sampling: true"
            )
        if given and self.engine == "transformers":
            raise ValueError(f"{given} needs engine: vllm; the built-in engine samples from all tokens")
