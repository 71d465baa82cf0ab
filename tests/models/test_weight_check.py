"""Worked streams, a plain restatement of the log-probs in float64, and the checks of real runs."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import Grpo

from grpo.artifacts import checkpoint_id, digest
from grpo.errors import CorruptError
from grpo.models.loading import load_model
from grpo.models.reader import Reader
from grpo.models.weight_check import WeightCheck, check_sequences, measure, perturb, read_weight_check
from grpo.update.execution import weights_digest

ARTIFACTS = Path("artifacts/tiny")


def update_of(iteration: int) -> Path:
    return ARTIFACTS / f"iteration={iteration:06d}" / "update"


# The sequences


def test_the_stream_begins_again_where_it_ends() -> None:
    # 32 tokens from a stream of 5: token n is prompt token n mod 5, and 31 mod 5 is 1.
    [sequence] = check_sequences([[7, 8], [], [9, 5, 6]], None)
    assert len(sequence) == 32
    assert sequence[:12] == [7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7, 8]
    assert sequence[31] == 8
    assert all(type(token) is int for token in sequence)


def test_a_long_stream_is_cut() -> None:
    prompts = [np.arange(start, start + 10, dtype=np.int32) for start in range(0, 100, 10)]
    sequences = check_sequences(prompts, 4096)  # type: ignore[arg-type]
    assert sequences == [list(range(32))]
    assert json.loads(json.dumps(sequences)) == sequences  # no numpy numbers are left


@pytest.mark.parametrize(("context", "length"), [(None, 32), (1000, 32), (33, 32), (32, 31), (4, 3)])
def test_a_sequence_leaves_a_position_of_the_context(context: int | None, length: int) -> None:
    [sequence] = check_sequences([[1, 2, 3]], context)
    assert len(sequence) == length


# What a model gives for them


def plain_logprobs(model: Any, sequence: list[int]) -> list[float]:
    """Each token's log-prob given those before it, one forward pass of its own per token, in float64."""
    found = []
    for position in range(1, len(sequence)):
        with torch.no_grad():
            logits_V = model(torch.tensor([sequence[:position]])).logits[0, -1].double()
        found.append((logits_V[sequence[position]] - torch.logsumexp(logits_V, -1)).item())
    return found


def test_measure_equals_a_plain_restatement(starter_model: Path) -> None:
    sequences = [list(b"12+34=46"), list(b"99-99=0;")]
    model = load_model(starter_model, "cpu")
    check = measure(Reader(model), sequences)
    exact = load_model(starter_model, "cpu").double()
    for sequence, logprobs in zip(sequences, check.logprobs, strict=True):
        assert len(logprobs) == len(sequence) - 1
        assert np.abs(np.array(logprobs) - plain_logprobs(exact, sequence)).max() <= 1e-5


def test_measure_leaves_a_model_in_training_as_it_is(tiny_model: Path) -> None:
    model = load_model(tiny_model, "cpu")
    model(torch.tensor([[50, 43, 49]])).logits.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    before = [gradient.clone() for gradient in gradients if gradient is not None]
    check = measure(Reader(model), [[50, 43, 49]])
    assert check == measure(Reader(load_model(tiny_model, "cpu")), [[50, 43, 49]])
    after = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(before) == len(after) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_difference_is_the_mean_over_all_tokens() -> None:
    check = WeightCheck([[1, 2, 3, 4], [5, 6]], [[-1.0, -2.0, -3.0], [-4.0]])
    other = [np.array([-1.5, -2.0, -2.0], np.float32), np.array([-4.25], np.float32)]
    # (0.5 + 0 + 1 + 0.25) / 4; each row's mean and then the rows' would be (0.5 + 0.25) / 2 = 0.375.
    assert check.difference(other) == 0.4375
    assert math.isnan(check.difference([other[0], np.array([np.nan])]))


# On disk


def test_a_weight_check_comes_back_with_the_same_bits(starter_model: Path, tmp_path: Path) -> None:
    check = measure(Reader(load_model(starter_model, "cpu")), check_sequences([list(b"3+4=")], 64))
    path = tmp_path / "weight_check.json"
    path.write_bytes(check.encode())
    found = read_weight_check(path)
    assert found == check
    bits = [np.array(one.logprobs, np.float32).tobytes() for one in (found, check)]
    assert bits[0] == bits[1]
    assert found.encode() == check.encode()


def test_a_weight_check_with_what_is_no_number_is_never_written() -> None:
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        WeightCheck([[1, 2]], [[float("nan")]]).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"junk", "is not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b'{"sequences": [[1]', "is not JSON: Expecting ',' delimiter: line 1 column 19 (char 18)"),
        (b"[1]", "expected a JSON object, found list"),
        (b"{}", "has no sequences of type list"),
        (b'{"sequences": []}', "has no logprobs of type list"),
    ],
)
def test_what_is_no_weight_check_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "weight_check.json"
    path.write_bytes(content)
    with pytest.raises(CorruptError) as caught:
        read_weight_check(path)
    assert (str(caught.value), caught.value.exit_code) == (f"{path}: {message}", 6)


# The perturbed model


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("name", ["tiny_model", "starter_model"])
def test_every_weight_of_a_perturbed_model_differs_and_moves_the_log_probs(
    name: str, request: pytest.FixtureRequest
) -> None:
    sequences = check_sequences([list(b"3+4=7;"), list(b"12-5=7;")], 64)
    models = [load_model(request.getfixturevalue(name), "cpu") for _ in range(2)]
    before, right = tensors_of(models[0]), measure(Reader(models[0]), sequences)
    places = {name: parameter.data_ptr() for name, parameter in models[0].named_parameters()}
    for model in models:
        perturb(model)
    after, again = map(tensors_of, models)
    assert {name: parameter.data_ptr() for name, parameter in models[0].named_parameters()} == places
    for key, tensor in before.items():
        assert torch.equal(after[key], again[key])  # the same noise every time
        assert not torch.equal(after[key], tensor), key
        # Noise of 0.1 of each weight: none of it is beyond 6 standard deviations.
        assert float((after[key] / tensor - 1).nan_to_num().abs().max()) < 0.6
        assert bool(((after[key] != tensor) == (tensor != 0)).all()), key
    moved = right.difference([np.array(row) for row in measure(Reader(models[0]), sequences).logprobs])
    assert moved > 5e-3  # fifty times the tolerance in float32


def test_noise_that_is_used_again_is_another_in_each_row() -> None:
    # 3 x 65,537 numbers and one more, in rows of 2: a row repeats only where 65,537 divides its distance.
    linear = torch.nn.Linear(2, 98_306, bias=False)
    torch.nn.init.ones_(linear.weight)
    perturb(linear)  # type: ignore[arg-type]
    rows, flat = linear.weight.detach(), linear.weight.detach().view(-1)
    assert len(torch.unique(rows, dim=0)) == 65_537
    assert torch.equal(flat[:65_537], flat[65_537:131_074])
    assert abs(float(flat.std()) - 0.1) < 1e-3
    assert abs(float(flat.mean()) - 1) < 1e-3


def test_a_perturbed_model_of_what_is_almost_too_large_is_finite(tiny_model: Path) -> None:
    model, largest = load_model(tiny_model, "cpu"), torch.finfo(torch.float32).max
    parameter = dict(model.named_parameters())["model.norm.weight"]
    torch.nn.init.constant_(parameter, largest)  # of these 16 some are drawn above the largest
    perturb(model)
    assert bool(parameter.isfinite().all())
    assert 0 < int((parameter == largest).sum()) < len(parameter)


def test_a_policy_whose_log_probs_overflow_is_refused_by_its_name(project: Path, grpo: Grpo) -> None:
    path = project / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] *= 3e38
    save_file(tensors, path, metadata={"format": "pt"})
    code, _, err = grpo("run")
    assert code == 6
    assert err.splitlines()[-1] == (
        f"error: {project}/model: its log-probs are not finite, though its weights are: too large for float32"
    )


# The checks of a run


def test_the_weight_check_of_each_policy_is_what_its_files_give(finished: Path) -> None:
    written = [(update_of(i), update_of(i).with_name("checkpoint") / "policy") for i in (0, 1)]
    folders = [(ARTIFACTS / "policy", Path("model")), *written]
    checks = [read_weight_check(where / "weight_check.json") for where, _ in folders]
    for check, (_, checkpoint) in zip(checks, folders, strict=True):
        assert measure(Reader(load_model(checkpoint, "cpu")), check.sequences) == check  # to the last bit
    # 6 prompts of 4 bytes, `0+1=` and on: 32 tokens of the stream of 24.
    assert checks[0].sequences == [list(b"0+1=1+1=2+1=3+1=4+1=5+1=0+1=1+1=")]
    assert checks[0].sequences == checks[1].sequences == checks[2].sequences
    logprobs = [check.logprobs for check in checks]
    assert logprobs[0] != logprobs[1] != logprobs[2] != logprobs[0]


def test_the_id_of_a_policy_is_of_its_weights_and_of_what_they_were_made_from(finished: Path) -> None:
    """Of no file: it is the same before they are on disk, and when they are there no more."""
    for iteration in (0, 1):
        made = json.loads((update_of(iteration) / "manifest.json").read_bytes())
        assert made["ids"]["policy"] == digest([made["fingerprint"], made["summary"]["weights"]])
        weights = load_model(update_of(iteration).with_name("checkpoint") / "policy", "cpu")
        assert weights_digest(weights) == made["summary"]["weights"]
    first = json.loads((ARTIFACTS / "policy" / "manifest.json").read_bytes())
    assert first["ids"]["policy"] == checkpoint_id(Path("model"))


@pytest.mark.parametrize("iteration", [0, 1])
def test_a_weight_check_that_was_tampered_with_is_found(finished: Path, grpo: Grpo, iteration: int) -> None:
    path = (ARTIFACTS / "policy" if iteration == 0 else update_of(iteration - 1)) / "weight_check.json"
    text = path.read_text()
    path.write_text(text.replace("-5", "-4", 1))
    assert len(path.read_text()) == len(text)
    assert path.read_text() != text
    code, out, err = grpo("generate", "--iteration", str(iteration), "--force")
    assert (code, out) == (6, "")
    assert err.splitlines()[-1].startswith(f"error: {path}: ")
    path.unlink()
    code, _, err = grpo("generate", "--iteration", str(iteration), "--force")
    assert code == 6
    assert err.splitlines()[-1].startswith(f"error: {path}: ")
