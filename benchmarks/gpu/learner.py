"""The learner alone, for check.sh: tokens/s and memory by micro-batch, graphs, layouts, determinism."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo.models.loading import best_device, load_model
from grpo.update.batch import Rollouts
from grpo.update.layout import MicroBatch, tree_of
from grpo.update.network import Network
from grpo.update.residence import Residence, tensors_of

DEVICE, DRY = best_device(), os.environ["DRY"] == "1"
PROMPT, RESPONSE, SAMPLES = (16, 8, 4) if DRY else (128, 512, 8)
GROUPS = (1, 1, 2, 3, 4, 4)  # 4k tokens a group: up to 16k in one sequence
GIB = 2**30


def main() -> None:
    network = Network(load_model(Path("model"), DEVICE), "bfloat16", share_prompts=True)
    note(layout=network.best, peak_gib=peak())
    speed(network, GROUPS)
    agreement(network)
    determinism(network)
    network.work_in_copy()
    speed(network, GROUPS[-1:], weights="bfloat16_master")
    network.drop_copy()
    moves(network)
    from torch._dynamo.utils import counters

    note(graphs=counters["stats"].get("unique_graphs"), frames=dict(counters["frames"]))


def note(**values: Any) -> None:
    line = json.dumps({"what": "learner", **values})
    print(line, flush=True)
    with Path(os.environ["OUT"], "result.jsonl").open("a") as file:
        file.write(line + "\n")


def finish() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak() -> float | None:
    return round(torch.cuda.max_memory_allocated() / GIB, 2) if DEVICE == "cuda" else None


def make_rollouts(groups: int, seed: int) -> Rollouts:
    draw = np.random.default_rng(seed)
    keys = [(0, group, sample) for group in range(groups) for sample in range(SAMPLES)]
    prompts = [draw.integers(2, 600, PROMPT) for _ in range(groups)]
    responses = [draw.integers(2, 600, int(RESPONSE * draw.uniform(0.5, 1))) for _ in keys]
    return Rollouts(
        keys=np.array(keys),
        prompts=[prompts[group] for _, group, _ in keys],
        responses=responses,
        masks=[np.ones(len(response), dtype=bool) for response in responses],
        old_logprobs=[np.zeros(len(response), dtype=np.float32) for response in responses],
        advantages=np.zeros(len(keys)),
        temperatures=np.ones(len(keys)),
    )


def batch_of(network: Network, groups: int, seed: int) -> MicroBatch:
    rollouts = make_rollouts(groups, seed)
    rows = [list(range(group * SAMPLES, (group + 1) * SAMPLES)) for group in range(groups)]
    return network.batch(rollouts, [[tree_of(rollouts, each) for each in rows]])


def backward(network: Network, batch: MicroBatch) -> None:
    logprobs_N, _ = network.logprobs(batch, with_entropy=True)
    logprobs_N.mean().backward()  # type: ignore[no-untyped-call]
    finish()


def speed(network: Network, shapes: tuple[int, ...], **named: str) -> None:
    """Three steps on each of several micro-batches: a shape that is new may compile."""
    flop = json.loads(Path("model.json").read_text())["flop_per_token"]
    for number, groups in enumerate(shapes):
        batch = batch_of(network, groups, seed=number)
        tokens = int((batch.tree_SL >= 0).sum())
        for turn in range(3):
            network.model.zero_grad(set_to_none=True)
            finish()
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            try:
                backward(network, batch)
            except Exception as error:
                note(groups=groups, error=f"{type(error).__name__}: {str(error)[:300]}")
                raise
            seconds = time.perf_counter() - started
            rate = {"tokens_per_s": round(tokens / seconds), "tflops": flop * tokens / seconds / 1e12}
            note(groups=groups, turn=turn, tokens=tokens, step_s=seconds, **rate, peak_gib=peak(), **named)


def moves(network: Network) -> None:
    """The weights to main memory and back, twice: pinned memory is taken the first time."""
    network.model.zero_grad(set_to_none=True)
    residence = Residence(DEVICE, share=1.0, allocate=None if DEVICE == "cuda" else torch.empty_like)
    tensors = tensors_of({"policy": network.model}, None)
    size = sum(tensor.nbytes for tensor in tensors.values())
    for turn in range(2):
        for move in (residence.leave, residence.arrive):
            finish()
            started = time.perf_counter()
            move(tensors)
            finish()
            rate = size / (time.perf_counter() - started) / GIB
            note(move=move.__name__, turn=turn, gib=size / GIB, gib_per_s=round(rate, 2))


def agreement(network: Network) -> None:
    """A group as one tree against each rollout alone, and bfloat16 against float32."""
    rollouts, rows = make_rollouts(1, seed=9), list(range(SAMPLES))
    with torch.no_grad():
        batch = network.batch(rollouts, [[tree_of(rollouts, rows)]])
        exact_N, _ = network.logprobs(batch, exactly=True)
        rounded_N, _ = network.logprobs(batch)
        network.use("rows")
        alone = [network.batch(rollouts, [[tree_of(rollouts, [row])]]) for row in rows]
        alone_N = torch.cat([network.logprobs(each, exactly=True)[0] for each in alone])
    network.use(network.best)
    rounding_N = (rounded_N - exact_N).abs()
    note(tree_to_alone_largest=float((exact_N - alone_N).abs().max()))
    note(bfloat16_to_float32_mean=float(rounding_N.mean()), largest=float(rounding_N.max()))


def determinism(network: Network) -> None:
    """The same step twice, as it is and under torch's deterministic algorithms."""
    batch = batch_of(network, GROUPS[-1], seed=0)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        found = []
        started = time.perf_counter()
        for _ in range(2):
            network.model.zero_grad(set_to_none=True)
            backward(network, batch)
            digest = hashlib.sha256()
            for parameter in network.model.parameters():
                if parameter.grad is not None:
                    digest.update(parameter.grad.cpu().numpy().tobytes())
            found.append(digest.hexdigest())
        seconds = (time.perf_counter() - started) / 2
        note(deterministic_algorithms=deterministic, same_gradient=found[0] == found[1], step_s=seconds)
    torch.use_deterministic_algorithms(False)


if __name__ == "__main__":
    main()
