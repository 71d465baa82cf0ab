"""agreement: does the engine compute what the learner computes? A few rollouts, and their log-probs again.

Sampled from the whole distribution, whatever top_p says: what is measured is the numerics of the two. The
learner is the real one, so its formula, its padding and its temperature are those of training.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from grpo.artifacts import ActiveRun
from grpo.errors import DataError, EngineError, GrpoError, ResourceError, first_line
from grpo.generate.engines.choice import choose_engine
from grpo.generate.engines.protocol import Group, Request, Sampling, group_seed
from grpo.generate.stage import make_engine
from grpo.generate.weight_sync import FLOAT32_TOLERANCE, WeightSync
from grpo.inspect.status import MISMATCH_WARNING
from grpo.manage.doctor.check import Check, failed
from grpo.models.loading import best_device, context_length, load_config, load_tokenizer
from grpo.models.weight_check import NUM_PROMPTS as NUM_CHECK_PROMPTS
from grpo.models.weight_check import weight_check_of
from grpo.prompts.chat import chat_of, encode
from grpo.prompts.source import Row
from grpo.update.batch import Rollouts
from grpo.update.learner import Learner
from grpo.update.mismatch import mismatch

NUM_PROMPTS, NUM_SAMPLES, MAX_NEW_TOKENS = 4, 4, 64  # at most
Numbers = dict[str, Any]


def check_agreement(run: ActiveRun, checkpoint: Path, rows: list[Row]) -> tuple[list[Check], Numbers]:
    """Open the engine on the starting policy, sample, compare; the checks, and the numbers behind them."""
    try:
        numbers = measure(run, checkpoint, rows)
    except GrpoError as error:
        return [failed("agreement", "", "engine and learner compute the same", error)], {}
    except torch.OutOfMemoryError as error:
        text = f"the GPU ran out of memory: {first_line(error)}"
        short = ResourceError(f"{text}; lower gpu_memory_utilization, or end other processes")
        return [failed("agreement", "", "engine and learner compute the same", short)], {}
    return [_judge_weight_sync(numbers), _judge(numbers)], numbers


def measure(run: ActiveRun, checkpoint: Path, rows: list[Row]) -> Numbers:
    """The numbers of the comparison. Raises EngineError (exit 8) where a reload is not followed."""
    config, device = run.config.generate, best_device()
    name, _ = choose_engine(config.engine)
    limit = min(config.max_new_tokens, MAX_NEW_TOKENS)
    requests = _requests(run, checkpoint, rows, limit)
    context = context_length(load_config(checkpoint))
    longest = max(len(request.prompt_token_ids) for request in requests)
    engine = make_engine(config, name, device, context, longest)
    weight_sync = WeightSync(engine, device, run.console.say)
    try:
        check = weight_check_of(
            checkpoint, rows[:NUM_CHECK_PROMPTS], chat_of(run.config.prompts, run.imports)
        )
        with TemporaryDirectory() as scratch:
            weight_sync.open(checkpoint, check, Path(scratch))
        difference = weight_sync.bring("starting policy", checkpoint, check)
        groups = list(engine.sample([requests], Sampling(config.temperature, limit), lambda _: None))
        precision = engine.precision
        weight_sync.release()
        compared = _compare(run, checkpoint, requests, groups, device)
    finally:
        engine.close()
    return {
        "engine": name,
        "device": device,
        "precision": precision,
        "prompts": len(requests),
        "rollouts": sum(len(group.samples) for group in groups),
        "temperature": config.temperature,
        "weight_check_difference": difference,
        **compared,
    }


def _requests(run: ActiveRun, checkpoint: Path, rows: list[Row], limit: int) -> list[Request]:
    """The first prompts that fit; with seeds of iteration 0."""
    context = context_length(load_config(checkpoint))
    token_ids = encode(rows, load_tokenizer(checkpoint), chat_of(run.config.prompts, run.imports))[1]
    fitting = [ids for ids in token_ids if context is None or len(ids) + limit <= context][:NUM_PROMPTS]
    if not fitting:
        raise DataError(f"prompts.source: no prompt leaves room for {limit} tokens in a context of {context}")
    seeds = [group_seed(run.config.seed, 0, number) for number in range(len(fitting))]
    samples = range(min(run.config.generate.samples_per_prompt, NUM_SAMPLES))
    return [Request(n, ids, [seeds[n] + s for s in samples]) for n, ids in enumerate(fitting)]


def _compare(
    run: ActiveRun, checkpoint: Path, requests: list[Request], groups: list[Group], device: str
) -> dict[str, float]:
    """The learner's log-probs of what was sampled, against the sampler's."""
    prompts = {request.group_id: np.array(request.prompt_token_ids, dtype=np.int64) for request in requests}
    taken = [(g.group_id, n, sample) for g in groups for n, sample in enumerate(g.samples)]
    rollouts = Rollouts(
        keys=np.array([(0, group, n) for group, n, _ in taken], dtype=np.int64),
        prompts=[prompts[group] for group, _, _ in taken],
        responses=[sample.token_ids.astype(np.int64) for _, _, sample in taken],
        masks=[np.ones(len(sample.token_ids), dtype=bool) for _, _, sample in taken],
        old_logprobs=[sample.logprobs for _, _, sample in taken],
        advantages=np.zeros(len(taken)),
        temperatures=np.full(len(taken), run.config.generate.temperature),
    )
    learner = Learner(run.config.update, device)
    learner.load(checkpoint, None, ("starting policy", None))
    found = learner.policy_logprobs(rollouts, np.arange(len(rollouts)))
    own = [found[row] for row in range(len(rollouts))]
    old = [sample.logprobs for _, _, sample in taken]
    ratio_N = np.exp(np.concatenate(own).astype(np.float64) - np.concatenate(old))
    return {
        "tokens": int(rollouts.num_tokens.sum()),
        **mismatch(zip(own, old, strict=True)),
        "largest_ratio_error": float(np.abs(ratio_N - 1).max()),
    }


def _judge_weight_sync(numbers: Numbers) -> Check:
    found = f"{numbers['weight_check_difference']:.1e} nats per token apart; it follows a perturbed copy"
    return Check("weight sync", found, "the engine computes the weights it was given")


def _judge(numbers: Numbers) -> Check:
    """float32 must agree to rounding; other precisions are what they are, and are reported."""
    mean, precision = numbers["mismatch_mean"], numbers["precision"]
    exact = precision == "float32"
    allowed = FLOAT32_TOLERANCE if exact else MISMATCH_WARNING
    found, needed = f"mismatch {mean:.1e} nats per token in {precision}", f"at most {allowed:g}"
    if mean <= allowed:
        return Check("agreement", found, needed)
    text = (
        f"engine and learner are {mean:.1e} nats per token apart, at most {allowed:g} is right in {precision}"
    )
    if exact or not np.isfinite(mean):
        error = EngineError(f"{text}; they do not compute the same model")
        return failed("agreement", found, needed, error)
    note = f"{text}; set engine_options dtype: float32, or update.sampler_correction (docs/math.md)"
    return Check("agreement", found, needed, "warning", note)
