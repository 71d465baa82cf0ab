"""vllm_requests: a group as vLLM is asked for it, and as it answers."""

from typing import TYPE_CHECKING

import numpy as np

from grpo.generate.engines.protocol import Group, Request, Sample, Sampling

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput


def params_of(request: Request, sampling: Sampling, stop_ids: list[int]) -> "SamplingParams":
    """vLLM's parameters of a group."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    structure = sampling.structured_outputs
    return SamplingParams(
        n=len(request.seeds),
        seed=request.seeds[0],  # sample s gets this plus s, which is request.seeds[s]
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or 0,
        min_p=sampling.min_p,
        max_tokens=sampling.max_new_tokens,
        stop_token_ids=stop_ids,
        ignore_eos=True,  # stop_token_ids holds every end-of-sequence id already
        logprobs=0,
        flat_logprobs=True,
        repetition_penalty=sampling.repetition_penalty,
        detokenize=bool(sampling.stop),
        stop=list(sampling.stop),
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        structured_outputs=None if structure is None else StructuredOutputsParams(**structure),
    )


def group_of(output: "RequestOutput") -> Group:
    """The group that was asked for under its number."""
    samples = [
        Sample(
            token_ids=np.array(completion.token_ids, dtype=np.int32),
            logprobs=np.array(completion.logprobs.logprobs, dtype=np.float32),
            finish_reason=completion.finish_reason,
        )
        for completion in output.outputs
    ]
    return Group(int(output.request_id), samples)
