"""card: README.md of an exported policy: what it is made of and how, with front matter that the hub reads."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from grpo.artifacts import (
    EVALUATION,
    STAGE_OUTPUTS,
    ActiveRun,
    Run,
    check_source,
    created_config,
    is_hub_id,
    kept_sources,
)
from grpo.config import Config, differing_keys
from grpo.config.prompts import BUILT_IN
from grpo.config.yaml import dump
from grpo.console import interval, number
from grpo.inspect import metrics
from grpo.prompts.table import is_on_hub

_ROWS_SHOWN = 5
_SOURCE_BYTES = 2**16  # of a text in the card; a longer one is in the run alone
_USE = "`AutoModelForCausalLM.from_pretrained(FOLDER)` of transformers loads it, as does vLLM."
_USE_ADAPTER = "`PeftModel.from_pretrained(BASE_MODEL, FOLDER)` of peft loads it over its base."


def card_of(run: ActiveRun, policy: int, dtype: str | None, adapter: bool) -> str:
    """The model card. Everything in it is read from the run: nothing has to be filled in."""
    config = created_config(run.path)
    kind = "LoRA adapter" if adapter else f"weights {f'in {dtype}' if dtype else 'as they came'}"
    iterations = f"{policy} iteration{'' if policy == 1 else 's'}"
    base = f"`{Path(config.model).name}`"  # a path says nothing to others
    if is_hub_id(config.model, run.imports):
        base = f"[{config.model}](https://huggingface.co/{config.model})"
    maker = run.manifest("update", policy - 1) if policy else run.manifest("policy", None)
    settings = dump(config.model_dump())
    fence = _fence(settings, 3)
    parts = [
        _front_matter(run, config, adapter),
        f"# {run.name}, policy {policy}",
        f"{base} after {iterations} of GRPO, objective `{config.update.objective}`; {kind}.",
        "## Use",
        _USE_ADAPTER if adapter else _USE,
        "## Training",
        *_training(config, policy),
        *_metrics(run, policy),
        *_held_out(run, policy),
        "## Versions",
        "\n".join(f"- {name}: {version}" for name, version in (maker.versions if maker else {}).items()),
        "## Configuration",
        "As the run was created, every value.",
        f"{fence}yaml\n{settings.rstrip()}\n{fence}",
        *_changes(run, policy),
        *_sources(run, policy),
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


def _training(config: Config, policy: int) -> list[str]:
    prompts, generate, update = config.prompts, config.generate, config.update
    subset = f", subset {prompts.subset}" if prompts.subset else ""
    whole = prompts.is_file or prompts.source in BUILT_IN
    split = "" if whole else f" (split {prompts.split}{subset})"
    lora = f", LoRA of rank {update.lora.rank}" if update.lora else ""
    rewards = []
    for reward in config.score.rewards:
        judge = reward.judge
        scored_by = f"{judge.model}, asked: {judge.rubric}" if judge else reward.function or reward.model
        rewards.append((f"`{reward.name}`", _code(scored_by), f"{reward.weight:g}"))
    for teacher in config.score.teachers:
        rewards.append((f"`{teacher.name}`", f"teacher {_code(teacher.model)}", f"{teacher.weight:g}"))
    return [
        f"- Prompts: {_code(prompts.source)}{split}\n"
        f"- Rollouts: {policy} iterations x {generate.prompts_per_iteration} prompts x"
        f" {generate.samples_per_prompt} samples of at most {generate.max_new_tokens} tokens,"
        f" temperature {generate.temperature:g}\n"
        f"- Update: learning rate {update.learning_rate:g}, KL coefficient {update.kl_coefficient:g}{lora}",
        _table(("reward", "function, model or judge", "weight"), rewards),
    ]


def _metrics(run: ActiveRun, policy: int) -> list[str]:
    """Iteration 0 and the last ones that made this policy."""
    if not policy:
        return []
    shown = sorted({0, *range(max(policy - _ROWS_SHOWN, 0), policy)})
    names = ("reward", "kl", "entropy", "response_tokens", "truncated")
    found = metrics.kept_of(run, shown).items()
    rows = [(str(at), *(number(row[name], ".4g") for name in names)) for at, row in found]
    told = "Means over the rollouts of an iteration, sampled before its update."
    return ["## Metrics", told, _table(("iteration", *names), rows)]


def _held_out(run: Run, policy: int) -> list[str]:
    """What the policy was measured to be on prompts that it was not trained on; no line where nothing was."""
    manifest = run.manifest(EVALUATION, policy)
    found: dict[str, Any] = manifest.summary if manifest else {"pass_at": None, "reward": None}
    told = [
        f"pass@{k} {value:.3f} ({interval(found['pass_at_low'][k], found['pass_at_high'][k])})"
        for k, value in (found["pass_at"] or {}).items()
    ]
    told += [] if found["reward"] is None else [f"reward {found['reward']:.4g}"]
    if manifest is None or not told:
        return []
    made = manifest.config["evaluate"]
    passing = f"{_code(made['pass_reward'])} is at least {made['pass_threshold']:g}"
    text = f"held-out prompts, with 95 % intervals: {', '.join(told)}. A response passes where {passing}."
    return [f"On {found['prompts']} {text}"]


def _changes(run: Run, policy: int) -> list[str]:
    """Keys that changed while the run trained, from the manifests of what made this policy."""
    lines, held = [], dict[str, dict[str, Any]]()
    for iteration in range(policy):
        for output in STAGE_OUTPUTS:
            if manifest := run.manifest(output, iteration):
                changes = differing_keys(held.get(output, manifest.config), manifest.config)
                lines += [f"- from iteration {iteration}: {_code(change)}" for change in changes]
                held[output] = manifest.config
    return ["What changed since:", "\n".join(lines)] if lines else []


def _sources(run: Run, policy: int) -> list[str]:
    """What computed the rewards that made this policy, as the run has kept it."""
    manifest, kept = run.manifest("rewards", policy - 1) if policy else None, kept_sources(run)
    parts = []
    for digest in dict.fromkeys(manifest.user_files.values() if manifest else ()):
        if digest in kept and kept[digest].stat().st_size <= _SOURCE_BYTES:
            check_source(digest, kept[digest])
            text = kept[digest].read_text(encoding="utf-8", errors="replace").rstrip()
            fence = _fence(text, 3)
            parts += [
                f"{_code(kept[digest].name[65:])}:",
                f"{fence}{kept[digest].suffix[1:]}\n{text}\n{fence}",
            ]
    return ["## What computed its rewards", *parts] if parts else []


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def _code(value: object) -> str:
    """Text of the user's as code, on one line of a table."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    fence = _fence(text)
    return f"{fence}{text}{fence}" if "`" not in text else f"{fence} {text} {fence}"


def _fence(text: str, least: int = 1) -> str:
    """More backticks than `text` holds in a row."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))
