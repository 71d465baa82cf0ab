"""Seconds and memory of log-probs, entropy and gradients of a large head: the plain way and head_logprobs.

Qwen2.5-0.5B's head (V = 151,936, D = 896), float32, entropy reported and in no loss. The plain way is the
best one that autograd allows: full logits, log_softmax, entropy without a graph, nothing alive for longer
than needed. Each measurement is a process of its own, the two ways in turn; seconds are of processor time,
which other work on the machine disturbs least; memory is the largest resident size less that before.

A size whose logits would not fit into free memory is not run in the plain way: its peak is continued from
the two sizes before, which is exact for tensors of N x V.

Run: OMP_NUM_THREADS=1 python benchmarks/head.py [TOKENS[xROUNDS] ...]        result: benchmarks/head.txt
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import describe

V, D = 151_936, 896
SIZES = ("2048x3", "4096x3", "8192x3")
# The plain way holds three tensors of [N, V] in float32 at its peak; the rest is room for torch and others.
PLAIN_BYTES_PER_TOKEN = 4 * 4 * V
MIB = 2**20


def main() -> None:
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"{describe()}, OMP_NUM_THREADS {threads}; V = {V:,}, D = {D}, float32; forward and backward")
    print(f"{'tokens':>8} {'rounds':>6} {'':>14} {'processor s':>12} {'peak MiB':>9}")
    peaks: list[tuple[int, float]] = []
    for argument in sys.argv[1:] or SIZES:
        size, _, rounds = argument.partition("x")
        compare(int(size), int(rounds or 1), peaks)


def compare(num_tokens: int, rounds: int, peaks: list[tuple[int, float]]) -> None:
    fits = PLAIN_BYTES_PER_TOKEN * num_tokens < available_bytes()
    ways = ("plain", "head_logprobs") if fits else ("head_logprobs",)
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            found[way].append(in_process(way, num_tokens))
    seconds = {way: statistics.median(result[0] for result in results) for way, results in found.items()}
    peak = {way: max(result[1] for result in results) for way, results in found.items()}
    for way in ways:
        print(f"{num_tokens:>8,} {rounds:>6} {way:>14} {seconds[way]:>12.1f} {peak[way]:>9,.0f}")
    if fits:
        peaks.append((num_tokens, peak["plain"]))
        ratio = seconds["head_logprobs"] / seconds["plain"]
        print(f"{'':>15} time {ratio:.2f}x, memory 1/{peak['plain'] / peak['head_logprobs']:.1f}", flush=True)
    elif len(peaks) >= 2:
        (n0, peak0), (n1, peak1) = peaks[-2:]
        plain = peak1 + (peak1 - peak0) / (n1 - n0) * (num_tokens - n1)
        print(f"{'':>15} plain does not fit in free memory, continued: {plain:,.0f} MiB", end="")
        print(f", memory 1/{plain / peak['head_logprobs']:.1f}", flush=True)


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def in_process(way: str, num_tokens: int) -> tuple[float, float]:
    """(processor seconds, MiB beyond the inputs)."""
    command = [sys.executable, __file__, "measure", way, str(num_tokens)]
    seconds, peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return seconds, peak


def measure(way: str, num_tokens: int) -> None:
    import torch

    from grpo.models.head import Head, head_logprobs

    # If memory runs out after all, it is this process that ends.
    Path("/proc/self/oom_score_adj").write_text("1000")
    torch.manual_seed(0)
    hidden_ND = torch.randn(num_tokens, D, requires_grad=True)
    # In place: a copy freed before the measurement would hide as much of what follows.
    weight_VD = torch.randn(V, D).mul_(0.02).requires_grad_()
    targets_N = torch.randint(V, (num_tokens,))
    temperature_N = torch.ones(num_tokens)
    torch.mm(hidden_ND[:64].detach(), weight_VD[:64].detach().t())  # the library's own start

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_NV = torch.log_softmax((hidden_ND @ weight_VD.t()) / temperature_N[:, None], dim=-1)
        with torch.no_grad():
            entropy_N = -logprobs_NV.exp().mul_(logprobs_NV).sum(dim=-1)
        return logprobs_NV.gather(-1, targets_N[:, None])[:, 0], entropy_N

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    if way == "plain":
        logprobs_N, entropy_N = plain()
    else:
        logprobs_N, found = head_logprobs(
            hidden_ND, Head(weight_VD), targets_N, temperature_N, with_entropy=True
        )
        assert found is not None
        entropy_N = found
    entropy_N.mean().item()
    logprobs_N.mean().backward()  # type: ignore[no-untyped-call]
    seconds = time.process_time() - started
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / MIB
    print(json.dumps([seconds, peak]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2], int(sys.argv[3]))
    else:
        main()
