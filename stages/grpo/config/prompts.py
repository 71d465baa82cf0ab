"""config.prompts: the prompts section of pipeline.yaml: what is sampled from."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from grpo.config.section import ADDED, NonEmpty, Plain, Section

BUILT_IN = ("arithmetic", "arithmetic_held_out")  # tasks of our own, by name
FILE_SUFFIXES = (".jsonl", ".csv", ".parquet")
# Of apply_chat_template: what the pipeline gives itself, and what would change what it needs.
_GIVEN = ("add_generation_prompt", "chat_template", "conversation", "messages", "tokenize")
_NEEDED = ("continue_final_message", "max_length", "padding", "return_assistant_tokens_mask", "return_dict")
_OWN_ARGUMENTS = {*_GIVEN, *_NEEDED, "return_tensors", "tokenizer_kwargs", "truncation"}


class ColumnsConfig(Section):
    """Names of the data set's own columns that play the parts the pipeline knows, or of a field in one:
    `reward_model.ground_truth`, `extra_info.answers[0]`. A column of that very name comes first."""

    prompt: str = "prompt"
    """Column with the prompt: text, or a list of chat messages {role, content} as TRL has it."""
    messages: str | None = "messages"
    """Column with chat messages, a list of {role, content}; used instead of `prompt` where it is present.
    null: a column `messages` is left out, and the prompt is `prompt`."""
    answer: str = "answer"
    """Column with the reference answer; may be absent."""


class PromptsConfig(Section):
    """What is sampled from. Fixed for a run."""

    source: NonEmpty
    """`arithmetic`, `arithmetic_held_out` (built-in task); a path, relative to the configuration, to .jsonl,
    .parquet or .csv, or to a folder that the library `datasets` saved or can load; or `owner/name` of a data
    set on the hub, which is read when the run begins."""
    subset: str | None = None
    """Configuration of a data set, such as `main`; null: its only or default one. For `datasets` sources."""
    split: str = "train"
    """Which split of the data set. Only for sources that `datasets` loads."""
    revision: Annotated[str | None, ADDED] = None
    """Commit, tag or branch of a data set on the hub; null: the newest, which its owner may change."""
    columns: ColumnsConfig = ColumnsConfig()
    """Which columns of the source hold prompt, messages and answer. Every other column is kept as it is."""
    chat: bool = False
    """true: a text prompt is put to the model as one user message through the tokenizer's chat template."""
    system: str | None = None
    """System message placed before each prompt; null: none. Needs chat prompts."""
    chat_template: str | None = None
    """A file with the chat template (Jinja), relative to the configuration; null: the tokenizer's own.
    Either is rendered once, when the run begins, within limits of time and memory."""
    chat_template_arguments: Plain = Field({})
    """Variables for the chat template, such as `{enable_thinking: false}`; one that the template does not
    know is an error. Empty: the template's own defaults."""
    on_long_prompt: Literal["error", "skip"] = "error"
    """A prompt that leaves no room for max_new_tokens: stop, or leave it out and count it. Never cut."""

    @property
    def is_file(self) -> bool:
        """Whether the source is a single file, by its name."""
        return Path(self.source).suffix in FILE_SUFFIXES

    @field_validator("chat_template_arguments")
    @classmethod
    def _are_the_template_s(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if own := sorted(_OWN_ARGUMENTS & arguments.keys()):
            raise ValueError(f"{own[0]} is the pipeline's own; give the template's, such as enable_thinking")
        return arguments

    def model_post_init(self, context: Any, /) -> None:
        """Raise ValueError for a split, subset or revision of what is one table."""
        named = {"split": self.split != "train", "subset": self.subset, "revision": self.revision}
        if (self.is_file or self.source in BUILT_IN) and (keys := [key for key in named if named[key]]):
            key = keys[-1]
            raise ValueError(f"{key}: {self.source} has no {key}s; leave it out, or name a data set")
