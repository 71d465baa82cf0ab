"""evaluate: greedy accuracy of a policy on the built-in task's held-out sums, which training never sees."""

from pathlib import Path

from grpo.generate.arithmetic import held_out_rows
from grpo.generate.engine import Request, Sampling


def held_out_accuracy(checkpoint: Path, max_new_tokens: int) -> float:
    """Share of the held-out sums answered exactly, sampling greedily; in [0, 1]."""
    from grpo.generate.transformers_engine import TransformersEngine
    from grpo.model import best_device, load_tokenizer

    rows = held_out_rows()
    tokenizer = load_tokenizer(checkpoint)
    requests = [Request(n, tokenizer(row["prompt"]).input_ids, [0]) for n, row in enumerate(rows)]
    engine = TransformersEngine(best_device(), max_rows_per_batch=len(rows))
    engine.load(checkpoint)
    right = 0
    for group in engine.sample([requests], Sampling(0.0, max_new_tokens), lambda _: None):
        text = tokenizer.decode(group.samples[0].token_ids, skip_special_tokens=True)
        right += str(text).strip() == rows[group.group_id]["answer"]
    engine.close()
    return right / len(rows)
