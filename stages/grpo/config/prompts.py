"""config.prompts: the prompts section of pipeline.yaml: what is sampled from."""

from typing import Literal

from grpo.config.section import Section


class ColumnsConfig(Section):
    """Names of the data set's own columns that play the parts the pipeline knows."""

    prompt: str = "prompt"
    """Column with the prompt text."""
    messages: str = "messages"
    """Column with chat messages, a list of {role, content}; used instead of `prompt` where it is present."""
    answer: str = "answer"
    """Column with the reference answer; may be absent."""


class PromptsConfig(Section):
    """What is sampled from. Fixed for a run."""

    source: str
    """`arithmetic` (built-in task), or a path to .jsonl, .parquet or .csv, relative to the configuration."""
    columns: ColumnsConfig = ColumnsConfig()
    """Which columns of the source hold prompt, messages and answer. Every other column is kept as it is."""
    chat: bool = False
    """true: a text prompt is put to the model as one user message through the tokenizer's chat template."""
    system: str | None = None
    """System message placed before each prompt; null: none. Needs chat prompts."""
    on_long_prompt: Literal["error", "skip"] = "error"
    """A prompt that leaves no room for max_new_tokens: stop, or leave it out and count it. Never cut."""
