"""config.score: the score section of pipeline.yaml, and the rewards in it."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator, model_validator

from grpo.config.section import ADDED, Count, NonEmpty, NonNegative, Plain, Positive, Section, must, wrong_at

MODEL_TIMEOUT_S = 3600.0  # a batch of a large reward model on a CPU takes minutes, and is no hang
SCORE_LINE = r"^Score: *(-?[0-9]+(?:\.[0-9]+)?) *$"
# Where and how fast it is asked, not what: another of these changes no reward.
TRANSPORT = frozenset({"url", "api_key_env", "concurrency", "requests_per_minute", "retries"})
# How an answer is read: another of these reads the answers again that are there.
READING = frozenset({"pattern", "grades", "scale"})
# Names of parameters that hold a secret, and secrets that say so by themselves. `max_tokens`, `eos_token`,
# `key` and `api_key_env` are none.
_SECRET_NAME = re.compile(
    r"(?:^|[_-])(?:api|access|secret|private|auth|account|subscription|signing|encryption)[_-]?keys?$"
    r"|(?:^|[_-])(?:apikey|passw(?:or)?d|passwd|pwd|passphrase|secrets?|credentials?|authori[sz]ation|bearer|cookie)$"
    r"|(?:^|[_-])(?:api|access|auth|bearer|hf|hub|huggingface|github|refresh|session|id|openai|wandb)[_-]?tokens?$"
    r"|^(?:x-)?token$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}|\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\bxox[abprs]-[\w-]{10,}|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.|\bglpat-[\w-]{16,}"
    r"|(?i:\bbearer\s+[\w.~+/=-]{12,})|://[^/\s:@]+:[^/\s@]+@|-----BEGIN [A-Z ]*PRIVATE KEY"
)
_URL = re.compile(r"https?://[^\s/@?#]+(/[^\s@?#]*)?")
_IS_URL = must(
    lambda url: _URL.fullmatch(url) and _has_host(url),
    "expected http(s)://host[:port]/path without a user, a query or a key in it",
)
_IS_TEXT = must(str.strip, "is empty; give the question, or a file that holds it")
_RISES = must(lambda scale: scale[0] < scale[1], "expected [lowest, highest], the lowest first")


def _has_host(url: str) -> bool:
    try:
        return bool(urlsplit(url).hostname and urlsplit(url).port != 0)
    except ValueError:  # brackets that are no IPv6 address, a port that is no number up to 65535
        return False


class JudgeConfig(Section):
    """A language model that scores a rollout by a rubric, through POST /chat/completions."""

    url: Annotated[str, _IS_URL]
    """Base URL of the endpoint, such as http://127.0.0.1:8000/v1. Another changes no reward."""
    model: NonEmpty
    """Name of the model at the endpoint."""
    rubric: Annotated[str, _IS_TEXT]
    """What it is asked, once per rollout: text, or a .md or .txt file, with {response} and perhaps {prompt},
    {answer} or any column in braces; {{word}} is {word} itself."""
    pattern: str = SCORE_LINE
    """Regular expression (^ and $ match at lines, CRLF is read as LF) whose one group is the score in the
    answer. It may match several times if all give the same; no match is an error of its row, never a 0."""
    grades: dict[str, float] = Field({})
    """What the text found counts: {CORRECT: 1.0, INCORRECT: 0.0}; any other is an error. Empty: a number."""
    scale: Annotated[list[float], Field(min_length=2, max_length=2), _RISES] | None = None
    """[lowest, highest] score: the reward is 0 to 1 between them, one outside is an error. null: as it is."""
    temperature: NonNegative | None = 0.0
    """Sampling temperature, >= 0; null: not sent, for models that refuse it."""
    max_tokens: Count | None = 512
    """Tokens of an answer; null: not sent, for models that refuse it."""
    extra_body: Plain = Field({})
    """More fields of the request, as the endpoint knows them: {top_p: 0.9}, {structured_outputs: {...}}."""
    api_key_env: str | None = None
    """Environment variable that holds the key; null: none is needed. The key itself is never written down."""
    concurrency: Annotated[int, Field(ge=1, le=4096)] = 16
    """Requests under way at once, 1 to 4096."""
    requests_per_minute: Positive | None = None
    """Requests begun in a minute at most, repeated ones included; null: no bound."""
    retries: Annotated[int, Field(ge=0, le=100)] = 5
    """Times a request is repeated after status 408, 409, 429 or 5xx, a time-out or a lost connection, with
    growing pauses or what Retry-After asks for; 0: never, at most 100."""

    @field_validator("pattern")
    @classmethod
    def _has_one_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern, re.MULTILINE).groups
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"needs exactly one group, the score, but has {groups}; (?:...) is not a group")
        return pattern

    @field_validator("extra_body")
    @classmethod
    def _has_nothing_of_ours(cls, extra_body: dict[str, Any]) -> dict[str, Any]:
        ours = {"messages": "rubric"} | {key: key for key in ("model", "temperature", "max_tokens")}
        for name in extra_body:
            if name in ours:
                raise ValueError(f"{name} has a key of its own, {ours[name]}")
            if name in ("stream", "n"):
                raise ValueError("stream and n cannot be set: one whole answer is read")
        return extra_body

    def model_post_init(self, context: Any, /) -> None:
        """Raise ValueError where two keys say what an answer counts."""
        if self.grades and self.scale is not None:
            raise ValueError("grades say what an answer counts, and so does scale; give one of them")


class RewardConfig(Section):
    """One reward: a function, a reward model or a judge."""

    function: str | None = None
    """A built-in name or `package.module:function`; the configuration's folder comes first on sys.path."""
    model: NonEmpty | None = None
    """Directory or hub id of a sequence-classification checkpoint with one label."""
    judge: JudgeConfig | None = None
    """A language model behind an OpenAI-compatible endpoint, asked about every rollout."""
    name: str = ""
    """Name in the tables; empty: the function's or the directory's name, or `judge`. Unique."""
    weight: float = 1.0
    """Weight in the sum. 0: computed and stored, changes nothing: the way to compare rewards."""
    arguments: Plain = Field({})
    """Keyword arguments handed to the function."""
    timeout_s: Annotated[float, Field(gt=0, le=1e6)] = 60.0
    """Seconds, at most 1e6: of a function's call for one group, before its rollouts are tried one by one; of
    one request to a judge; of one batch of a reward model (3600 unless given), which ends the command."""
    on_timeout: Annotated[float | Literal["error"], ADDED] = "error"
    """What a rollout counts on which a function or a judge ran into timeout_s: error (it failed), or a number
    such as 0.0: its row is `ok`, and `error` tells. `math_verify` has 0.0 unless given."""

    @model_validator(mode="before")
    @classmethod
    def _name_and_time_it(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        function, model, judge = (data.get(kind) for kind in ("function", "model", "judge"))
        name = "" if judge is None else "judge"
        if isinstance(model, str):
            name = model.rstrip("/").rpartition("/")[2]
        if isinstance(function, str):
            name = function.rpartition(":")[2]
        times: dict[str, Any] = {} if model is None else {"timeout_s": MODEL_TIMEOUT_S}
        if function == "math_verify":  # what cannot be decided was not shown to be right
            times["on_timeout"] = 0.0
        return {**times, **data, "name": data.get("name") or name}

    def model_post_init(self, context: Any, /) -> None:
        """Raise ValueError unless it is of one kind, with what is of that kind."""
        if [self.function, self.model, self.judge].count(None) != 2:
            raise ValueError("exactly one of function, model and judge must be given")
        if self.function is None and self.arguments:
            kind = "reward model" if self.judge is None else "judge"
            raise ValueError(f"arguments are for functions; a {kind} takes none")
        if self.model is not None and self.on_timeout != "error":
            raise ValueError(
                "on_timeout is for functions and judges; a late batch of a model ends the command"
            )


def secret_of(reward: RewardConfig) -> str | None:
    """The path of a value that looks like a key or a password in what a reward has of its own, or None.

    It would stand in run.json, every manifest and every report. A name that ends in _env holds none.
    """
    own = {"arguments": reward.arguments}
    if reward.judge is not None:
        own["judge.extra_body"] = reward.judge.extra_body
    return next((path for place, values in own.items() for path in _secrets(values, place)), None)


def _secrets(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, child in value.items():
            if _SECRET_NAME.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)) and child not in (
                None,
                "",
                [],
                {},
            ):
                yield f"{path}.{name}"
            yield from _secrets(child, f"{path}.{name}")
    elif isinstance(value, list):
        for child in value:
            yield from _secrets(child, path)
    elif isinstance(value, str) and _SECRET_VALUE.search(value):
        yield path


class TeacherConfig(Section):
    """A model whose log-probs of the sampled tokens are what the policy is to learn (distillation)."""

    model: NonEmpty
    """Directory or hub id of a causal language model with the policy's tokenizer."""
    weight: float = 1.0
    """A token's advantage is the rollout's, plus weight * (teacher's - old log-prob) of each teacher."""
    name: str = ""
    """Name in the tables; empty: the directory's name. Unique."""

    @model_validator(mode="before")
    @classmethod
    def _name_it(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("model"), str):
            return data
        return {**data, "name": data.get("name") or data["model"].rstrip("/").rpartition("/")[2]}


class ScoreConfig(Section):
    """score: rollouts + prompts -> rewards."""

    rewards: list[RewardConfig]
    """What scores a rollout; the reward of a rollout is the weighted sum. May be left out beside teachers."""
    teachers: Annotated[list[TeacherConfig], ADDED] = Field([])
    """Models to learn from token by token, instead of rewards or beside them: `teacher_logprobs`."""
    on_error: Literal["stop", "drop"] = "stop"
    """Rewards that failed: stop (exit 8; the next run scores only those), or leave the rollouts unscored."""
    workers: Annotated[int, Field(ge=1, le=1024)] = 2
    """Processes that run reward functions, 1 to 1024."""
    max_tokens_per_batch: Count = 16384
    """Tokens a reward model or a teacher reads at once; bounds its memory."""

    @model_validator(mode="before")
    @classmethod
    def _teachers_will_do(cls, data: Any) -> Any:
        return {"rewards": [], **data} if isinstance(data, dict) and data.get("teachers") else data

    @field_validator("rewards", "teachers")
    @classmethod
    def _unique(cls, named: list[Any], info: ValidationInfo) -> list[Any]:
        names = [each.name for each in named]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two {info.field_name} are named {twice[0]}; give one of them another `name`")
        return named

    def model_post_init(self, context: Any, /) -> None:
        """Raise ValueError where nothing says what is good."""
        if not self.rewards and not self.teachers:
            raise wrong_at(("rewards",), "too_short", [], field_type="List", min_length=1, actual_length=0)
