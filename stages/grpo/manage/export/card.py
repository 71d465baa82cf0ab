"""card: README.md of an exported policy: what it is made of and how, with front matter that the hub reads."""

import re
from pathlib import Path
from typing import Any

from grpo.artifacts import EVALUATION, STAGE_OUTPUTS, ActiveRun, Run, created_config, is_hub_id
from grpo.config import Config, RewardConfig, differing_keys
from grpo.config.prompts import BUILT_IN
from grpo.config.yaml import dump
from grpo.console import interval, number
from grpo.inspect import metrics
from grpo.prompts.table import is_on_hub

_ROWS_SHOWN = 5
_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
```"""
_USE_ADAPTER = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)
```"""


def card_of(run: ActiveRun, policy: int, dtype: str | None, adapter: bool) -> str:
    """The model card. Everything in it is read from the run: nothing has to be filled in."""
    config = created_config(run.name, run.root)
    kind = "LoRA adapter" if adapter else f"weights {f'in {dtype}' if dtype else 'as they came'}"
    objective = config.update.objective
    iterations = f"{policy} iteration{'' if policy == 1 else 's'}"
    parts = [
        _front_matter(run, config, adapter),
        f"# {run.name}, policy {policy}",
        f"{_base(run, config)} after {iterations} of GRPO, objective `{objective}`; {kind}.",
        "## Use",
        _USE_ADAPTER if adapter else _USE,
        "## Training",
        _training(config, policy),
        *_metrics(run, policy),
        "## Versions",
        _versions(run, policy),
        "## Configuration",
        "As the run was created, every value.",
        _fenced(dump(config.model_dump()), "yaml"),
        *_changes(run, policy),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(run: ActiveRun, config: Config, adapter: bool) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["grpo", "grpo-stages", "reinforcement-learning", *(["lora"] if adapter else [])],
        base_model=config.model if is_hub_id(config.model, run.imports) else None,
        datasets=[config.prompts.source] if is_on_hub(config.prompts, run.imports) else None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _base(run: ActiveRun, config: Config) -> str:
    """The base model as a link, or by its name: a path says nothing to others."""
    if is_hub_id(config.model, run.imports):
        return f"[{config.model}](https://huggingface.co/{config.model})"
    return f"`{Path(config.model).name}`"


def _training(config: Config, policy: int) -> str:
    generate, update = config.generate, config.update
    rewards = "\n".join(
        f"| `{reward.name}` | {_cell(_scored_by(reward))} | {reward.weight:g} |"
        for reward in config.score.rewards
    )
    source = config.prompts.source
    subset = f", subset {config.prompts.subset}" if config.prompts.subset else ""
    of_split = (
        "" if config.prompts.is_file or source in BUILT_IN else f" (split {config.prompts.split}{subset})"
    )
    lora = f", LoRA of rank {update.lora.rank}" if update.lora else ""
    return (
        f"- Prompts: {_cell(source)}{of_split}\n"
        f"- Rollouts: {policy} iterations x {generate.prompts_per_iteration} prompts x"
        f" {generate.samples_per_prompt} samples of at most {generate.max_new_tokens} tokens,"
        f" temperature {generate.temperature:g}\n"
        f"- Update: learning rate {update.learning_rate:g}, KL coefficient {update.kl_coefficient:g}{lora}\n"
        "\n"
        f"| reward | function, model or judge | weight |\n|---|---|---|\n{rewards}"
    )


def _scored_by(reward: RewardConfig) -> str:
    if reward.judge is not None:
        return f"{reward.judge.model}, asked: {reward.judge.rubric}"
    return str(reward.function or reward.model)


def _metrics(run: ActiveRun, policy: int) -> list[str]:
    """Iteration 0 and the last ones that made this policy."""
    shown = sorted({0, *range(max(policy - _ROWS_SHOWN, 0), policy)}) if policy else []
    if not shown:
        return _held_out(run, policy)
    names = ("reward", "kl", "entropy", "response_tokens", "truncated")
    rows = [f"| iteration | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for iteration, found in metrics.kept_of(run, shown).items():
        rows.append(f"| {iteration} | {' | '.join(number(found[name], '.4g') for name in names)} |")
    return [
        "## Metrics",
        "Means over the rollouts of an iteration, sampled before its update.",
        "\n".join(rows),
        *_held_out(run, policy),
    ]


def _held_out(run: Run, policy: int) -> list[str]:
    """What the policy was measured to be on prompts that it was not trained on."""
    manifest = run.manifest(EVALUATION, policy)
    if manifest is None:
        return []
    found = manifest.summary
    passes = [
        f"pass@{k} {value:.3f} ({interval(found['pass_at_low'][k], found['pass_at_high'][k])})"
        for k, value in (found["pass_at"] or {}).items()
    ]
    reward = [] if found["reward"] is None else [f"reward {found['reward']:.4g}"]
    if not passes and not reward:  # nothing of it was scored
        return []
    return [f"On {found['prompts']} held-out prompts, with 95 % intervals: {', '.join([*passes, *reward])}."]


def _versions(run: Run, policy: int) -> str:
    manifest = run.manifest("update", policy - 1) if policy else run.manifest("policy", None)
    found = manifest.versions if manifest else {}
    return "\n".join(f"- {name}: {version}" for name, version in found.items())


def _changes(run: Run, policy: int) -> list[str]:
    """Keys that changed while the run trained, from the manifests of what made this policy."""
    lines, held = [], dict[str, dict[str, Any]]()
    for iteration in range(policy):
        for output in STAGE_OUTPUTS:
            manifest = run.manifest(output, iteration)
            if manifest is None:
                continue
            changes = differing_keys(held.get(output, manifest.config), manifest.config)
            lines += [f"- from iteration {iteration}: {_cell(change)}" for change in changes]
            held[output] = manifest.config
    return ["What changed since:", "\n".join(lines)] if lines else []


def _cell(value: object) -> str:
    """Text of the user's as code, on one line of a table."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if "`" not in text else f"{fence} {text} {fence}"


def _fenced(text: str, language: str) -> str:
    """Text as a block, whatever backticks it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
