"""`grpo generate` against its engines alone, side by side in one run.

vLLM: the generate stage (prompts, Parquet, log-probs, fsync and all) against `LLM.generate` of the very same
engine, same prompts, seeds and options, log-probs on. Then the weight sync: from a new checkpoint on
disk to the first group, weight check included, against vLLM's bare reload to its first output.

Built-in: against `model.generate` of transformers (generate_builtin.py).

Run: OMP_NUM_THREADS=1 python benchmarks/generate.py        result: benchmarks/generate.txt
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generate_builtin
from machine import describe

from grpo.artifacts import ActiveRun, Staging
from grpo.config import Config
from grpo.console import Console
from grpo.generate import stage
from grpo.generate.engines.protocol import group_seed
from grpo.generate.plan import plan as planned
from grpo.generate.sampling import Sampler
from grpo.models import starter_model
from grpo.models.loading import eos_token_ids
from grpo.models.reader import Reader
from grpo.models.weight_check import measure, read_weight_check
from grpo.pipeline import prepare
from grpo.pipeline.resources import Resources
from grpo.pipeline.stages import GENERATE, make
from grpo.prompts.chat import Chat
from grpo.prompts.rendering import encode
from grpo.prompts.table import draw

ROUNDS = 15
K = 8


def main() -> None:
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"{describe()}, OMP_NUM_THREADS {threads}; medians of {ROUNDS} interleaved rounds")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        starter_model.ensure(folder / "starter", lambda line: None)
        large = folder / "qwen2"
        generate_builtin.write_qwen2(large)
        starter_model.build_tokenizer().save_pretrained(large)
        print("\nvLLM: the generate stage against LLM.generate on the same engine (tokens/s)")
        for title, model, options in (
            ("starter 0.4M, 256 prompts, 8 tokens", folder / "starter", {"max_new_tokens": 8}),
            ("Qwen2 19M, 8 prompts, 64 tokens", large, {"max_new_tokens": 64, "prompts_per_iteration": 8}),
        ):
            compare_stage(folder, title, model, options)
        print("\nvLLM: from a new checkpoint on disk to the first group (seconds)")
        compare_weight_sync(folder, folder / "starter")
    print()
    generate_builtin.main()


def open_run(folder: Path, name: str, model: Path, options: dict[str, Any]) -> ActiveRun:
    config = Config.model_validate(
        {
            "run": name,
            "model": str(model),
            "prompts": {"source": "arithmetic"},
            "generate": {
                "engine": "vllm",
                "prompts_per_iteration": 256,
                "samples_per_prompt": K,
                **options,
            },
            "score": {"rewards": [{"function": "exact_answer"}]},
        }
    )
    run = ActiveRun(folder / "artifacts", config, folder, Console(quiet=True))
    prepare.prepare(run)
    return run


def compare_stage(folder: Path, title: str, model: Path, options: dict[str, Any]) -> None:
    run = open_run(folder, title.partition(" ")[0], model, options)
    with stage.open_resource(run, Resources(run).lend) as tool:
        attempts = iter(range(10**6))

        def ours() -> int:
            manifest = make(run, GENERATE, Staging(run, planned(run, 0), next(attempts)), tool)
            return int(manifest.summary["response_tokens"])

        ours()  # opens the engine
        raw = raw_generate(run, tool)
        raw()
        rates: dict[str, list[float]] = {"grpo generate": [], "LLM.generate": []}
        sides = [("grpo generate", ours), ("LLM.generate", raw)]
        for number in range(ROUNDS):
            for name, call in sides if number % 2 else reversed(sides):
                tool.engine._llm.reset_prefix_cache()  # type: ignore[attr-defined]
                shutil.rmtree(run.folder("rollouts", 0), ignore_errors=True)  # a run does not replace it
                rates[name].append(timed(call))
    report(title, rates)


def raw_generate(run: ActiveRun, tool: Sampler) -> Callable[[], int]:
    """The same requests, as a user of vLLM alone would send them."""
    from vllm import SamplingParams

    config = run.config.generate
    rows = draw(len(tool.prompts), run.config.seed, 0, config.prompts_per_iteration)
    token_ids = encode(tool.prompts.take(rows).to_pylist(), tool.tokenizer, Chat())[1]
    stop_ids = sorted(eos_token_ids(run.start["policy"]))
    llm: Any = tool.engine._llm  # type: ignore[attr-defined]

    def call() -> int:
        params = [
            SamplingParams(
                n=K,
                seed=group_seed(run.config.seed, 0, group),
                temperature=config.temperature,
                max_tokens=config.max_new_tokens,
                stop_token_ids=stop_ids,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
            )
            for group in range(len(token_ids))
        ]
        prompts = [{"prompt_token_ids": ids} for ids in token_ids]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)

    return call


def compare_weight_sync(folder: Path, model: Path) -> None:
    """Two policies in turn; a bare reload for the one, the weight_sync for the other."""
    import torch

    from grpo.models.loading import load_model
    from grpo.update.checkpoint import policy_files

    run = open_run(folder, "weight_sync", model, {"max_new_tokens": 8})
    changed = load_model(model, "cpu")
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.01)
    other = folder / "other"
    other.mkdir()
    for name, content in policy_files(changed, model):
        (other / name).write_bytes(b"".join(content))
    sequences = read_weight_check(run.weight_check_path(0)).sequences
    policies = [(path, measure(Reader(load_model(path, "cpu")), sequences)) for path in (other, model)]
    with stage.open_resource(run, Resources(run).lend) as tool:
        make(run, GENERATE, Staging(run, planned(run, 0), 0), tool)
        raw = raw_generate(run, tool)
        llm: Any = tool.engine._llm  # type: ignore[attr-defined]
        seconds: dict[str, list[float]] = {"weight_sync": [], "bare reload": []}
        for number in range(2 * ROUNDS):
            path, check = policies[number % 2]
            started = time.perf_counter()
            tool.weight_sync.bring(str(number), path, check)
            seconds["weight_sync"].append(time.perf_counter() - started)
            started = time.perf_counter()
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
            seconds["bare reload"].append(time.perf_counter() - started)
            raw()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    beyond = medians["weight_sync"] - medians["bare reload"]
    for name, value in medians.items():
        print(f"  {name:<14} {value:8.3f}")
    print(f"  beyond raw     {beyond:8.3f}")


def timed(call: Callable[[], int]) -> float:
    """Tokens per second."""
    started = time.perf_counter()
    tokens = call()
    return tokens / (time.perf_counter() - started)


def report(title: str, rates: dict[str, list[float]]) -> None:
    [(ours, our_rates), (other, other_rates)] = rates.items()
    ratio = statistics.median(a / b for a, b in zip(our_rates, other_rates, strict=True))
    print(f"  {title}")
    for name, values in rates.items():
        print(
            f"    {name:<16} {statistics.median(values):>10,.0f}  ({min(values):,.0f} to {max(values):,.0f})"
        )
    print(f"    ratio {ours} / {other}: {ratio:.2f}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
