"""What an iteration costs on machines that this was not measured on: seconds and bytes, computed.

Nothing here is a measurement. Rates are assumptions, named below; put in what your own machines gave (an
iteration's seconds by part: `grpo sql "select * from timings"`; a disk's and a store's: `grpo doctor`).

Run: python benchmarks/cost.py [> benchmarks/cost.txt]
"""

from collections.abc import Callable
from dataclasses import dataclass

GB = 1e9
HASHED = 1.5  # GB/s of a core that writes and hashes
STORE = 20.0  # GB/s of a shared file system, to all nodes together
DISK = 4.0  # GB/s of a node's own disk
NVLINK, NIC = 250.0, 45.0  # GB/s that arrive at a GPU, within a node and from others
ROLLOUT_BYTES, LOGPROB_BYTES = 6.7, 7.5  # of a token in tables: ids, log-probs and text; update's log-probs
MICRO_BATCH = 16_384  # tokens that a GPU reads at once
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Case:
    """A model, the GPUs (H100) that train it and sample from it in turn, and what an iteration samples.

    flops: of a GPU in the update, reached; decoded: tokens a second that an engine makes on each of its GPUs.
    """

    name: str
    parameters: float
    gpus: int
    engines: int
    rollouts: int
    tokens: int
    flops: float
    decoded: float

    @property
    def total(self) -> int:
        """Tokens of responses."""
        return self.rollouts * self.tokens

    @property
    def link(self) -> float:
        """GB/s between GPUs."""
        return NVLINK if self.gpus <= GPUS_PER_NODE else NIC

    @property
    def weights(self) -> float:
        """GB, in bfloat16."""
        return 2 * self.parameters / GB


CASES = [
    Case("0.5B, 1 GPU", 0.5e9, 1, 1, 2_048, 1_024, 200e12, 20_000),
    Case("7B, 8 GPUs", 7.6e9, 8, 8, 16_000, 4_096, 400e12, 6_000),
    Case("the same, small step", 7.6e9, 8, 8, 512, 1_024, 400e12, 6_000),
    Case("70B, 64 GPUs", 70.6e9, 64, 8, 16_000, 4_096, 400e12, 900),
]


def disk(case: Case) -> float:
    """GB/s that a checkpoint can be written with."""
    return DISK if case.gpus <= GPUS_PER_NODE else STORE


ROWS: dict[str, Callable[[Case], float]] = {
    "tokens of responses, millions": lambda case: case.total / 1e6,
    "generate, s": lambda case: case.total / (case.gpus * case.decoded),
    # Forward 2 P operations a token, backward 4, the reference's forward 2.
    "update, s": lambda case: 8 * case.parameters * case.total / (case.gpus * case.flops),
    "weights, gradients, moments: GB a GPU": lambda case: 16 * case.parameters / GB / case.gpus,
    "rollouts and log-probs, GB": lambda case: case.total * (ROLLOUT_BYTES + LOGPROB_BYTES) / GB,
    "checkpoint (weights, moments), GB": lambda case: 12 * case.parameters / GB,
    "  written by one process, s": lambda case: 12 * case.parameters / GB / HASHED,
    "  by a process a GPU, s": lambda case: (
        12 * case.parameters / GB / min(HASHED * case.gpus, max(disk(case), HASHED))
    ),
    # Float32 files, once for each engine; on one node the page cache has them.
    "weights to engines, files, s": lambda case: 2 * case.weights * case.engines / STORE,
    "  by NCCL, bfloat16, s": lambda case: case.weights / case.link,
    # All-gather forward and backward in bfloat16, reduce-scatter in float32: 8 bytes a parameter.
    "FSDP2 a micro-batch: traffic, s": lambda case: 0.0 if case.gpus == 1 else 4 * case.weights / case.link,
    "  beside computing, s": lambda case: 8 * case.parameters * MICRO_BATCH / case.flops,
}


def main() -> None:
    print("cost: computed, from these assumptions; not measured")
    print(f"  a core writes and hashes {HASHED} GB/s")
    print(f"  a store takes and gives {STORE:.0f} GB/s in all, a node's disk {DISK:.0f} GB/s")
    print(f"  to a GPU come {NVLINK:.0f} GB/s within a node, {NIC:.0f} GB/s from others")
    print(f"  a micro-batch is {MICRO_BATCH:,} tokens")
    for case in CASES:
        rates = f"decodes {case.decoded:,.0f} tokens/s, trains at {case.flops / 1e12:.0f} TFLOP/s"
        print(f"  {case.name}: {case.rollouts:,} rollouts of {case.tokens:,} tokens; a GPU {rates}")
    print()
    width = max(len(case.name) for case in CASES) + 2
    print(" " * 38 + "".join(f"{case.name:>{width}}" for case in CASES))
    for name, compute in ROWS.items():
        print(f"{name:<38}" + "".join(f"{_shown(compute(case)):>{width}}" for case in CASES))


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


if __name__ == "__main__":
    main()
