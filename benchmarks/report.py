"""What `grpo report` costs at 60 iterations x 512 rollouts: seconds to build and to open, size, filters.

The run is made up, true to the schemas: 32 of 1,000 prompts an iteration, 16 samples each. A response is a
walk over the word pieces of GSM8K's solutions (a tokenizer trained on tests/data/gsm8k, 2,000 pieces), so
that it compresses like text; rewards are 0 or 1 and get better; the learner's log-probs are the sampler's
plus noise as of bfloat16. Built by the command, in a process of its own; opened and filtered in headless
Chromium, each filter timed by the page itself, the first groups that match drawn.

Run: python benchmarks/report.py       result: benchmarks/report.txt
"""

import json
import os
import re
import resource
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from machine import describe
from process import answer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from grpo import tables
from grpo.artifacts import STAGE_OUTPUTS, ActiveRun, Plan, Product, Staging, files, id_of
from grpo.config import Config
from grpo.console import Console
from grpo.pipeline.prepare import run_json

CORPUS = Path(__file__).parents[1] / "tests" / "data" / "gsm8k" / "train.jsonl"
ITERATIONS, GROUPS, SAMPLES, PROMPTS = 60, 32, 16, 1000
LENGTHS = (20, 80, 400)
"""Mean tokens of a response. The longest does not fit: the page says what it holds."""
REPEATS = 3
FILTERS = {
    "text": "$('f-text').value = 'total'",
    "reward": "$('f-min').value = '1'",
    "iteration": "$('f-iteration').value = '30'",
    "order": "$('f-order').value = 'surprising'",
}


def main() -> None:
    load = (
        f"load average {os.getloadavg()[0]:.0f}"  # on a machine that is shared, seconds on the clock are more
    )
    what = f"report of {ITERATIONS} x {GROUPS * SAMPLES} rollouts"
    print(f"{what}; {describe()}; {load}; medians of {REPEATS}", flush=True)
    filters = "".join(f"{'by ' + name:>14}" for name in FILTERS)
    numbers = f"{'build s':>8} {'cpu s':>6} {'MB':>6} {'open s':>7}"
    print(f"{'tokens':>6} {'rollouts in it':>15} {numbers}{filters}  (ms)")
    for length in LENGTHS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            _write_run(folder, length)
            built = [_build(folder) for _ in range(REPEATS)]
            seconds = statistics.median(each[0] for each in built)
            processor = statistics.median(each[1] for each in built)
            opened, rollouts, filtered = _open(folder / "benchmark.html")
        times = "".join(f"{statistics.median(filtered[name]):>14.1f}" for name in FILTERS)
        size = built[0][2]["bytes"] / 1e6
        numbers = f"{seconds:>8.2f} {processor:>6.2f} {size:>6.1f} {opened:>7.2f}"
        print(f"{length:>6} {rollouts:>15,} {numbers}{times}", flush=True)


def _build(folder: Path) -> tuple[float, float, dict[str, Any]]:
    """Seconds on the clock and of the processor, all cores together; and what the command said."""
    before, started = _processor_s(), time.perf_counter()
    said = answer(folder, "report", "benchmark")
    return time.perf_counter() - started, _processor_s() - before, said


def _processor_s() -> float:
    """Of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _open(page: Path) -> tuple[float, int, dict[str, list[float]]]:
    """Seconds until everything is drawn, rollouts in the page, and milliseconds of each filter."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for option in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--window-size=1440,1000",
    ):
        options.add_argument(option)
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        started = time.perf_counter()
        driver.get(page.as_uri())
        WebDriverWait(driver, 300, poll_frequency=0.02).until(
            lambda _: driver.execute_script("return document.body.dataset.ready")
        )
        opened = time.perf_counter() - started
        time.sleep(3)  # the page prepares its search while nobody works
        found = driver.find_element("id", "found").text
        filtered = {
            name: [_filter(driver, script) for _ in range(REPEATS)] for name, script in FILTERS.items()
        }
    finally:
        driver.quit()
    return opened, int(re.sub("[^0-9]", "", found.split(" of ")[0])), filtered


def _filter(driver: Any, script: str) -> float:
    """Milliseconds of one filter, from everything shown."""
    field = re.findall(r"\$\('(f-\w+)'\)", script)[0]
    event = "oninput" if field in ("f-text", "f-min") else "onchange"
    begin = "const $ = (id) => document.getElementById(id); $('f-reset').click();"
    act = f"{script}; $('{field}').{event}(); return Number(document.body.dataset.filterMs);"
    return float(driver.execute_script(f"{begin} {act}"))


def _write_run(folder: Path, length: int) -> None:
    config = {
        "run": "benchmark",
        "model": "./model",
        "prompts": {"source": "arithmetic"},
        "generate": {"prompts_per_iteration": GROUPS, "samples_per_prompt": SAMPLES},
        "score": {"rewards": [{"function": "exact_answer"}]},
    }
    run = ActiveRun(folder / "artifacts", Config.model_validate(config), folder, Console(quiet=True))
    files.make_folder(run.path)
    files.write_file(run.path / "run.json", run_json(run.config))
    lines = [json.loads(line) for line in CORPUS.read_text().splitlines()]
    tokenizer = _tokenizer([line["answer"] for line in lines])
    (folder / "model").mkdir()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    staging = Staging(run, Plan("policy", 1, "policy", None, {}, {}), 0)
    staging.commit(Product({"policy": "start", "reference": "start"}, [], {"policy": "model"}))
    walk = [token for line in lines for token in tokenizer.encode(line["answer"]).ids]
    generator = np.random.default_rng(0)
    for iteration in range(ITERATIONS):
        held = _tables(
            iteration, length, tokenizer, np.array(walk), [line["question"] for line in lines], generator
        )
        for output, stage in STAGE_OUTPUTS.items():
            staging = Staging(run, Plan(stage, 1, output, iteration, {}, {}), 0)
            records = [
                staging.write_table(table, staging.file_name(table, 0), held[table])
                for table in (("updates", "logprobs") if output == "update" else (output,))
            ]
            staging.commit(Product({output: id_of(records)}, records, {}))


def _tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=2000, show_progress=False, special_tokens=["<|end|>"], initial_alphabet=alphabet
        ),
    )
    return tokenizer


def _tables(
    iteration: int, length: int, tokenizer: Tokenizer, walk: np.ndarray, questions: list[str], generator: Any
) -> dict[str, pa.Table]:
    rows = np.arange(GROUPS * SAMPLES)
    lengths = np.clip(generator.lognormal(np.log(length) - 0.08, 0.4, len(rows)).astype(int), 2, 4 * length)
    ids = _walk(walk, lengths, generator)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    old = -5 * generator.random(len(ids)).astype(np.float32) ** 4
    prompt_ids = generator.permutation(PROMPTS)[:GROUPS][rows // SAMPLES]
    better = 1 - 0.8 * np.exp(-iteration / 15)
    right = (generator.random(len(rows)) < better ** (1 + 4 * (prompt_ids / PROMPTS))).astype(np.float64)
    groups = right.reshape(GROUPS, SAMPLES)
    mean, deviation = (np.repeat(values, SAMPLES) for values in (groups.mean(1), groups.std(1, ddof=1)))
    values: dict[str, Any] = {
        "iteration": np.full_like(rows, iteration),
        "group_id": rows // SAMPLES,
        "sample_id": rows % SAMPLES,
        "prompt_id": prompt_ids,
        "prompt": [f"{questions[number % len(questions)]} ({number})" for number in prompt_ids],
        "response": tokenizer.decode_batch([ids[start:end].tolist() for start, end in pairwise(offsets)]),
        "prompt_token_ids": pa.ListArray.from_arrays(np.arange(len(rows) + 1, dtype=np.int32), rows),
        "response_token_ids": pa.ListArray.from_arrays(offsets, ids),
        "old_logprobs": pa.ListArray.from_arrays(offsets, old),
        "response_mask": pa.ListArray.from_arrays(offsets, np.ones(len(ids), dtype=bool)),
        "policy_logprobs": pa.ListArray.from_arrays(
            offsets, old + generator.normal(0, 0.01, len(ids)).astype(np.float32)
        ),
        "finish_reason": np.where(lengths >= 2 * length, "length", "stop"),
        "response_tokens": lengths,
        "policy_iteration": np.full_like(rows, iteration),
        "temperature": np.ones(len(rows)),
        "name": ["exact_answer"] * len(rows),
        "value": right,
        "weight": np.ones(len(rows)),
        "status": ["ok"] * len(rows),
        "reward": right,
        "group_mean": mean,
        "group_std": deviation,
        "group_size": np.full_like(rows, SAMPLES),
        "advantage": (right - mean) / (deviation + 1e-4),
        "keep": np.ones(len(rows), dtype=bool),
        "update_iteration": np.full_like(rows, iteration),
    }
    step = {
        "iteration": iteration,
        "epoch": 0,
        "step": 0,
        "kl": 0.01 * iteration,
        "entropy": 1.0,
        "skipped": False,
    }
    found = {
        name: _table(name, values, len(rows)) for name in ("rollouts", "rewards", "advantages", "logprobs")
    }
    return {**found, "updates": _table("updates", {name: [value] for name, value in step.items()}, 1)}


def _walk(walk: np.ndarray, lengths: np.ndarray, generator: Any) -> np.ndarray:
    """Token ids of all rows one after the other: each follows its predecessor somewhere in `walk`."""
    order = np.argsort(walk[:-1], kind="stable")
    firsts = np.searchsorted(walk[:-1][order], np.arange(walk.max() + 2))
    now = generator.choice(walk[:-1], len(lengths))
    columns = []
    for _ in range(lengths.max()):
        columns.append(now)
        count = firsts[now + 1] - firsts[now]
        place = firsts[now] + (generator.random(len(now)) * count).astype(int)
        now = np.where(count > 0, walk[order[np.minimum(place, len(order) - 1)] + 1], walk[0])
    inside = np.arange(lengths.max())[:, None] < lengths
    ids: np.ndarray = np.stack(columns).T[inside.T].astype(np.int32)
    return ids


def _table(name: str, values: dict[str, Any], rows: int) -> pa.Table:
    """The columns of a table from `values`; a column that is not there is null, or 0 where it is a number."""
    schema = tables.schema(name)
    columns = [
        pa.array(values[n]) if n in values else pa.nulls(rows, t)
        for n, t in zip(schema.names, schema.types, strict=True)
    ]
    return pa.table(columns, names=schema.names).cast(schema)


if __name__ == "__main__":
    main()
