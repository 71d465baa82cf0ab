"""engine: which one samples, and does it compute what the learner computes?

A few rollouts, sampled from the whole distribution, whatever top_p says: what is measured is the numerics of
the two. The learner is the real one, so its formula, padding and temperature are those of training. Both
are compared with plain transformers too: what they share could be wrong in both.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo.artifacts import ActiveRun
from grpo.errors import DataError, EngineError, ResourceError, first_line
from grpo.generate.engines.choice import choose_engine
from grpo.generate.engines.protocol import Request, Sample, Sampling, group_seed
from grpo.generate.stage import make_engine
from grpo.generate.weight_sync import WeightSync
from grpo.inspect.status import MISMATCH_WARNING, mismatch_says
from grpo.manage.doctor.plain import plain_logprobs
from grpo.manage.doctor.report import Check, Report
from grpo.models.attention import attention_window
from grpo.models.loading import best_device, context_length, load_config, load_tokenizer
from grpo.models.weight_check import FLOAT32_TOLERANCE, weight_check_of
from grpo.models.weight_check import NUM_PROMPTS as CHECK_PROMPTS
from grpo.pipeline.ahead import usable_engine
from grpo.prompts.chat import chat_of
from grpo.prompts.rendering import encode
from grpo.prompts.source import Row
from grpo.update.batch import Rollouts
from grpo.update.learner import Learner
from grpo.update.mismatch import mismatch
from grpo.update.plan import resolved

AGREEMENT = "engine and learner compute the same"
_PRECISION = {"learner": "learner_precision", "engine": "precision"}  # who -> its key in the numbers
NUM_PROMPTS, NUM_SAMPLES, MAX_NEW_TOKENS = 4, 4, 64  # at most
_BEHIND_WINDOW = 256  # tokens that the prompt for a window is longer, where there is room
_MOST_TOKENS = 4608  # of that prompt: eager attention takes the square; 4,096 is the window of many models


def check_engine(run: ActiveRun, report: Report) -> None:
    """The engine that is chosen; where it is vLLM, its version and `engine_options`. Opens nothing."""
    config = run.config.generate
    name, why = choose_engine(config.engine)
    is_vllm, options = name == "vllm", ", ".join(config.engine_options)
    needed = "a vLLM that works with this version" if is_vllm else ""
    with report.check("engine", f"{name} ({why})", needed) as engine:
        usable_engine(run)
    if is_vllm and engine.level == "ok":
        with report.check("engine options", options or "none", "engine arguments of vLLM"):
            make_engine(config, name, "", None, longest_prompt=1)  # checks them; load() would open it
    elif options and not is_vllm:
        with report.check("engine options", options, "none: they are vLLM's") as check:
            check.warn("leave generate.engine_options out, or set generate.engine: vllm")


def check_agreement(run: ActiveRun, report: Report, checkpoint: Path, rows: list[Row]) -> None:
    """Open the engine on the starting policy, sample, and compare; the numbers are in the report too."""
    _check_engine_and_learner(run, report, checkpoint, rows)
    if not report.agreement:
        return
    with report.check("plain transformers", "", "log-probs as in eager attention") as check:
        apart = {who: report.agreement[f"{who}_to_plain"] for who in ("learner", "engine")}
        check.found = ", ".join(f"{who} {mean:.1e}" for who, mean in apart.items()) + " nats per token apart"
        computed_in = {who: report.agreement[key] for who, key in _PRECISION.items()}
        for who, mean in apart.items():
            is_float32 = computed_in[who] == "float32"
            allowed = FLOAT32_TOLERANCE if is_float32 else MISMATCH_WARNING
            found = f"the {who} is {mean:.1e} nats per token from plain transformers in eager attention"
            right = f"at most {allowed:g} is right in {computed_in[who]}"
            if not mean <= allowed and (is_float32 or not np.isfinite(mean)):
                raise EngineError(f"{found}, {right}; it does not compute this model: take another")
            if mean > allowed:
                check.warn(f"{found}, {right}")
    if (window := attention_window(load_config(checkpoint))) is not None:
        met = report.agreement["longest_prompt_tokens"]
        found, needed = f"{window:,} tokens; the longest prompt has {met:,}", "compared behind the window too"
        with report.check("attention window", found, needed) as check:
            if met <= window:
                check.warn(
                    f"a window of {window:,} tokens was not met: no prompt is longer, and one that is does"
                    f" not fit into the model's context, or {_MOST_TOKENS:,} tokens"
                )


def _check_engine_and_learner(run: ActiveRun, report: Report, checkpoint: Path, rows: list[Row]) -> None:
    with report.check("agreement", "", AGREEMENT) as check:
        try:
            numbers = report.agreement = _measure(run, report, checkpoint, rows)
        except torch.OutOfMemoryError as error:
            way = "lower gpu_memory_utilization, or end other processes"
            raise ResourceError(f"the GPU ran out of memory: {first_line(error)}; {way}") from None
        found = f"{numbers['weight_check_difference']:.1e} nats per token apart; it follows a perturbed copy"
        report.checks.append(Check("weight sync", found, "the engine computes the weights it was given"))
        # Both in float32 must agree to rounding; what is coarser is what it is, and is reported.
        mean, engine, learner = (numbers[key] for key in ("mismatch_mean", "precision", "learner_precision"))
        is_float32 = engine == learner == "float32"
        allowed = FLOAT32_TOLERANCE if is_float32 else MISMATCH_WARNING
        types = engine if engine == learner else f"{engine} (engine) and {learner} (learner)"
        check.found = f"mismatch {mean:.1e} nats per token in {types}"
        if not is_float32:
            check.note = mismatch_says(mean)
        check.needed = f"at most {allowed:g}"
        apart = f"engine and learner are {mean:.1e} nats per token apart, {check.needed} is right in {types}"
        if not mean <= allowed and (is_float32 or not np.isfinite(mean)):
            raise EngineError(f"{apart}; they do not compute the same model")
        if mean > allowed:
            finer = "update.precision" if engine == "float32" else "engine_options dtype"
            check.warn(f"{apart}; set {finer}: float32, or update.sampler_correction (docs/math.md)")


def _measure(run: ActiveRun, report: Report, checkpoint: Path, rows: list[Row]) -> dict[str, Any]:
    """The numbers of the comparison. Raises EngineError (exit 8) where a reload is not followed."""
    config, device = run.config.generate, best_device()
    name, _ = choose_engine(config.engine)
    attention = run.config.model_options.attn_implementation
    model_config = load_config(checkpoint)
    limit, context = min(config.max_new_tokens, MAX_NEW_TOKENS), context_length(model_config)
    requests = _requests(run, checkpoint, rows, limit, context)
    shards, window = [requests], attention_window(model_config)
    if window is not None and (
        long := _behind(window, requests, None if context is None else context - limit)
    ):
        shards, requests = [requests, long], [*requests, *long]
    longest = max(len(request.prompt_token_ids) for request in requests)
    with closing(make_engine(config, name, device, context, longest, attention)) as engine:
        weight_sync = WeightSync(engine, run.console.say, attention)
        chat = chat_of(run.config.prompts, run.imports)
        check = weight_check_of(checkpoint, rows[:CHECK_PROMPTS], chat, attention)
        report.say(f"doctor: opening {name} on {device}, with the model and a perturbed copy")
        weight_sync.open(checkpoint, check)
        difference = weight_sync.bring("starting policy", checkpoint, check)
        report.say(f"doctor: sampling {sum(len(each.seeds) for each in requests)} responses")
        groups = list(engine.sample(shards, Sampling(config.temperature, limit), lambda *_: None))
        weight_sync.release()
        taken = [(requests[group.group_id], sample) for group in groups for sample in group.samples]
        opened = {"engine": name, "device": device, "precision": engine.precision}
        sampled = {"prompts": len(requests), "longest_prompt_tokens": longest, "rollouts": len(taken)}
        compared = _compare(run, report, checkpoint, taken)
    learner = resolved(run.config.update, on_gpu=device != "cpu").precision
    at = {"learner_precision": learner, "temperature": config.temperature}
    return {**opened, **sampled, **at, "weight_check_difference": difference, **compared}


def _requests(
    run: ActiveRun, checkpoint: Path, rows: list[Row], limit: int, context: int | None
) -> list[Request]:
    """The first prompts that leave room for `limit` tokens; with seeds of iteration 0."""
    token_ids = encode(rows, load_tokenizer(checkpoint), chat_of(run.config.prompts, run.imports))[1]
    fitting = [ids for ids in token_ids if context is None or len(ids) + limit <= context][:NUM_PROMPTS]
    if not fitting:
        raise DataError(f"prompts.source: no prompt leaves room for {limit} tokens in a context of {context}")
    samples = range(min(run.config.generate.samples_per_prompt, NUM_SAMPLES))
    seed = run.config.seed
    return [Request(n, ids, [group_seed(seed, 0, n) + s for s in samples]) for n, ids in enumerate(fitting)]


def _behind(window: int, requests: list[Request], room: int | None) -> list[Request]:
    """A prompt longer than the window, of the others' tokens again and again; none where it has no room."""
    token_ids = [token for request in requests for token in request.prompt_token_ids]
    length = min(window + _BEHIND_WINDOW, _MOST_TOKENS, *([] if room is None else [room]))
    if length <= window:
        return []
    times = -(-length // len(token_ids))
    return [Request(len(requests), (token_ids * times)[:length], requests[0].seeds[:2])]  # two, that share it


def _compare(
    run: ActiveRun, report: Report, checkpoint: Path, taken: list[tuple[Request, Sample]]
) -> dict[str, float]:
    """The learner's log-probs of what was sampled, against the sampler's."""
    old = [sample.logprobs for _, sample in taken]
    rollouts = Rollouts(
        keys=np.array([(0, request.group_id, n) for n, (request, _) in enumerate(taken)]),
        prompts=[np.array(request.prompt_token_ids) for request, _ in taken],
        responses=[sample.token_ids.astype(np.int64) for _, sample in taken],
        masks=[np.ones(len(logprobs), dtype=bool) for logprobs in old],
        old_logprobs=old,
        advantages=np.zeros(len(taken)),
        temperatures=np.full(len(taken), run.config.generate.temperature),
    )
    report.say("doctor: reading them with the learner")
    learner = Learner(
        run.config.update, best_device(), attention=run.config.model_options.attn_implementation
    )
    learner.load(checkpoint, None, "starting policy")
    lengths = [(len(request.prompt_token_ids), len(sample.token_ids)) for request, sample in taken]
    longest_prompt, longest_response = map(max, zip(*lengths, strict=True))
    learner.check_layout(rollouts, (longest_prompt, longest_response))  # as an update begins
    found = learner.policy_logprobs(rollouts, np.arange(len(taken)))
    own = [found[row] for row in range(len(taken))]
    del learner  # the memory is for another copy of the model
    report.say("doctor: reading them with plain transformers")
    responses = [sample.token_ids.tolist() for _, sample in taken]
    pairs = zip([list(request.prompt_token_ids) for request, _ in taken], responses, strict=True)
    plain_N = np.concatenate(plain_logprobs(checkpoint, pairs, run.config.generate.temperature))
    ratio_N = np.exp(np.concatenate(own).astype(np.float64) - np.concatenate(old))
    return {
        "tokens": int(rollouts.num_tokens.sum()),
        **mismatch(zip(own, old, strict=True)),
        "largest_ratio_error": float(np.abs(ratio_N - 1).max()),
        "learner_to_plain": float(np.abs(np.concatenate(own) - plain_N).mean()),
        "engine_to_plain": float(np.abs(np.concatenate(old) - plain_N).mean()),
    }
