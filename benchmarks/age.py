"""age: what an iteration and a command cost late in a run, against early; CPU, of a tiny project.

The old iterations are made up: each is a copy of a real one (tables and checkpoint hard-linked) whose
manifests say what that iteration's would, fingerprints and ids of what it read included; the newest policies
are on disk. Real iterations are run on top of them. Each age is a process of its own, and they take
turns, an iteration each, so that what else the machine does meets all alike. CPU is of the process itself:
the worker that scores is another.

Run: python benchmarks/age.py       result: benchmarks/age.txt
"""

import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from machine import describe

from grpo.artifacts import CHECKPOINT, MANIFEST, TIMINGS, ActiveRun, seal
from grpo.config import load
from grpo.console import Console
from grpo.pipeline.stages import STAGES

AGES = (30, 300, 3000)
NUM_MEASURED = 20
OLD = 1000  # iterations of the run that commands are asked of
NUM_TRIES = 5
REAL = 4  # iterations that are really run first
NEWEST = 3  # iterations whose checkpoint is there
COMMANDS = {
    "grpo status": ["status"],
    'grpo sql "select count(*) from rewards"': ["sql", "select count(*) from rewards"],
    "grpo run, with nothing to do": ["run", "--until", str(OLD)],
}
PIPELINE = """\
run: old
iterations: 4
model: ./model
prompts: {source: prompts.jsonl}
generate: {prompts_per_iteration: 1, samples_per_prompt: 2, max_new_tokens: 4}
score: {workers: 1, rewards: [{function: "reward:code"}]}
update: {learning_rate: 0.01}
"""
REWARD = """\
def code(prompts, completions, **columns):
    return [float(sum(map(ord, text)) % 7) for text in completions]
"""
# `grpo run` that says after each iteration what CPU it took, and waits to be told to go on.
WORKER = """\
import sys, time
from pathlib import Path
from grpo.cli.options import working
from grpo.inspect import status
from grpo.pipeline import work

moments = []

def report(number):
    status.line_of(opened, number)
    print(time.process_time(), flush=True)
    sys.stdin.readline()

with working(Path("pipeline.yaml"), [], True) as opened:
    work.run(opened, int(sys.argv[1]), report, report)
"""
# A command that says at its end what CPU it took, and writes the names of the modules it imported.
COMMAND = """\
import atexit, json, sys, time
atexit.register(lambda: print(time.process_time(), file=sys.stderr))
modules = sys.argv.pop(1)
atexit.register(lambda: open(modules, "w").write(json.dumps(list(sys.modules))))
from grpo.cli import main
main()
"""
IMPORTS = """\
import json, sys, time
from contextlib import suppress
for name in json.load(open(sys.argv[1])):
    with suppress(ImportError):
        __import__(name)
print(time.process_time(), file=sys.stderr)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        projects = {age: Path(folder) / str(age) for age in (*AGES, OLD)}
        for age, path in projects.items():
            _write_project(path)
            _process("from grpo.cli import main; main()", path, "run", "--json").communicate()
            _make_old(path, age if age == OLD else age - NUM_MEASURED // 2)
        iterations = _iterations({age: projects[age] for age in AGES})
        commands = {text: _beyond_imports(projects[OLD], words) for text, words in COMMANDS.items()}
    print(f"age; {describe()}")
    print(f"CPU seconds of an iteration, median of {NUM_MEASURED}")
    first = statistics.median(iterations[AGES[0]])
    for age, seconds in iterations.items():
        middle = statistics.median(seconds)
        print(f"iteration {age:>5}  {middle:.3f}  (ratio {middle / first:.2f})")
    print(f"CPU seconds beyond imports at {OLD} iterations, median of {NUM_TRIES}")
    for text, beyond in commands.items():
        print(f"{text:<42}  {beyond:.3f}")


def _write_project(folder: Path) -> None:
    """A project whose model has one layer and random weights."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from grpo.models import starter_model

    folder.mkdir()
    tokenizer = starter_model.build_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        **ends,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**ends)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "pipeline.yaml").write_text(PIPELINE)
    (folder / "reward.py").write_text(REWARD)
    (folder / "prompts.jsonl").write_text('{"prompt": "1+1="}\n')


def _make_old(folder: Path, num_iterations: int) -> None:
    """Make up the iterations from REAL to `num_iterations`, each like the last real one."""
    run = ActiveRun(folder / "artifacts", load(folder / "pipeline.yaml"), folder, Console(quiet=True))
    for iteration in range(REAL, num_iterations):
        for stage in STAGES:
            plan = stage.plan(run, iteration)
            _copy(run, stage.output, iteration, {"fingerprint": plan.fingerprint(0), "inputs": plan.inputs})
        if iteration >= num_iterations - NEWEST:
            reference = f"policy@{iteration + 1}"
            _copy(run, CHECKPOINT, iteration, {"inputs": {reference: run.id_of(reference)}})


def _copy(run: ActiveRun, output: str, iteration: int, changes: dict[str, Any]) -> None:
    """An output of the last real iteration as that of another: files by hard links, the manifest changed."""
    model = run.require(output, REAL - 1, "grpo run")
    source, target = run.folder(output, REAL - 1), run.folder(output, iteration)
    target.mkdir(parents=True)
    for file in model.files:
        (target / file.part).mkdir(exist_ok=True)
        os.link(source / file.part / file.name, target / file.part / file.name)
    (target / TIMINGS).write_bytes((source / TIMINGS).read_bytes())
    manifest = model.model_copy(update={"iteration": iteration, **changes})
    (target / MANIFEST).write_bytes(seal(manifest.recorded()))


def _iterations(projects: dict[int, Path]) -> dict[int, list[float]]:
    """CPU seconds of NUM_MEASURED iterations at each age; a first one is not counted."""
    until = {age: str(age + NUM_MEASURED // 2 + 1) for age in projects}
    workers = {age: _process(WORKER, path, until[age]) for age, path in projects.items()}
    moments: dict[int, list[float]] = {age: [] for age in projects}
    for turn in range(NUM_MEASURED + 1):
        for age, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            if turn:
                worker.stdin.write("\n")
                worker.stdin.flush()
            moments[age].append(float(worker.stdout.readline()))
    for worker in workers.values():
        worker.communicate("\n")
    return {age: [b - a for a, b in pairwise(found)] for age, found in moments.items()}


def _beyond_imports(folder: Path, words: list[str]) -> float:
    """CPU seconds of a command less those of a process that imports the same modules; the median."""
    modules = folder / "modules.json"
    found = [_cpu(COMMAND, folder, str(modules), *words) for _ in range(NUM_TRIES + 1)][1:]
    imports = [_cpu(IMPORTS, folder, str(modules)) for _ in range(NUM_TRIES)]
    return statistics.median(found) - statistics.median(imports)


def _cpu(code: str, folder: Path, *words: str) -> float:
    process = _process(code, folder, *words)
    _, err = process.communicate()
    assert process.returncode == 0, err
    return float(err.split()[-1])


def _process(code: str, folder: Path, *words: str) -> subprocess.Popen[str]:
    command: list[Any] = [sys.executable, "-c", code, *words]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, cwd=folder, text=True, **pipes)


if __name__ == "__main__":
    main()
