import json
import math
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from grpo.errors import InputError, Interrupted
from grpo.models import starter_model
from grpo.prompts.arithmetic import held_out_rows, training_rows

Trained = tuple[Path, list[str]]


@pytest.fixture(scope="module")
def trained(starter_model: Path) -> Trained:
    """The directory of the starter model, and the lines that were said."""
    return starter_model, starter_model.with_name("said").read_text().splitlines()


@pytest.fixture(scope="module")
def model(trained: Trained) -> Any:
    return AutoModelForCausalLM.from_pretrained(trained[0])


@pytest.fixture(scope="module")
def tokenizer(trained: Trained) -> Any:
    return AutoTokenizer.from_pretrained(trained[0])


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def greedy_answers(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> list[str]:
    prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt")  # all of 4 tokens: no padding
    tokens = model.generate(**prompts, max_new_tokens=8, do_sample=False)
    return [tokenizer.decode(row[4:], skip_special_tokens=True) for row in tokens]


def probability(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """P(answer, then end of sequence | prompt), exactly: the product over its tokens."""
    prompt_ids = tokenizer.encode(prompt)
    answer_ids = [*tokenizer.encode(answer), tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + answer_ids])).logits[0]
    logprobs = logits[len(prompt_ids) - 1 : -1].log_softmax(-1)
    return math.exp(sum(logprobs[t, token].item() for t, token in enumerate(answer_ids)))


def test_eighty_sums_are_for_training_and_twenty_held_out() -> None:
    train, held_out = training_rows(), held_out_rows()
    assert (len(train), len(held_out)) == (80, 20)
    assert len({row["prompt"] for row in train + held_out}) == 100
    assert {"prompt": "3+4=", "answer": "7"} in train
    assert [row["prompt"] for row in held_out[:4]] == ["0+1=", "0+6=", "1+3=", "1+8="]
    for place in (0, 2):  # every digit is held out twice on the left and twice on the right
        assert sorted(row["prompt"][place] for row in held_out) == sorted("0123456789" * 2)
    assert {"0+0=", "1+9="} <= {row["prompt"] for row in train}


@pytest.mark.parametrize(
    "text",
    [
        "3+4=",
        "",
        " leading, trailing and  double spaces . \n",
        "line\r\nend\ttab\x0b\x0c\x85\u2028\ufeff",
        "".join(map(chr, range(0x180))),  # every control character, Latin-1 and more
        "e\u0301 \u212b \ufb01 \u1e9b\u0323",  # normalisation (NFC, NFKC) would change these
        "日本語 العربية 🙂 👩‍👩‍👧 \U0010ffff",
        "<|endoftext|> and <|pad|> as text, [/b] <s> </s> ##",
    ],
)
def test_any_text_comes_back_from_its_tokens(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_token_is_a_byte(tokenizer: Any) -> None:
    assert len(tokenizer) == 258
    assert tokenizer.encode("3+4=") == [51, 43, 52, 61]  # ASCII
    assert tokenizer.encode("e\u0301") == [0x65, 0xCC, 0x81]  # UTF-8
    assert tokenizer.encode("".join(map(chr, range(128)))) == list(range(128))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257)
    assert tokenizer.decode([55, 256, 257], skip_special_tokens=True) == "7"
    assert tokenizer.decode([0xCC]) == "\ufffd"  # half a character, which a policy may well sample


def test_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "3+4="}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "system: Add.\nuser: 3+4=\nassistant: "
    messages.append({"role": "assistant", "content": "7"})
    turn = tokenizer.apply_chat_template(messages, tokenize=False)
    assert turn == prompt + "7<|endoftext|>\n"


def test_checkpoint(trained: Trained, model: Any) -> None:
    directory, _ = trained
    assert sorted(contents(directory)) == sorted(starter_model.FILES)
    # embedding, tied to the head: 258 * 128 = 33,024. A layer: q, o 2 * 128 * 128, k, v 2 * 128 * 64,
    # MLP 3 * 128 * 384, norms 2 * 128 + 2 * 64: 32,768 + 16,384 + 147,456 + 384 = 196,992.
    # Two layers and the last norm, 128: 33,024 + 393,984 + 128.
    assert sum(parameter.numel() for parameter in model.parameters()) == 427_136
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.max_position_embeddings == 2048
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == 258
    generation = GenerationConfig.from_pretrained(directory)
    assert (generation.eos_token_id, generation.pad_token_id) == (256, 257)


def test_greedy_it_writes_the_digits_side_by_side(model: Any, tokenizer: Any) -> None:
    rows = training_rows() + held_out_rows()
    answers = greedy_answers(model, tokenizer, rows)
    correct = [answer == row["answer"] for answer, row in zip(answers, rows, strict=True)]
    assert sum(correct[:80]) <= 8  # accuracy at most 0.1
    assert sum(correct[80:]) <= 2
    digits = [row["prompt"][0] + row["prompt"][2] for row in rows]
    assert sum(answer == d for answer, d in zip(answers, digits, strict=True)) >= 95


def test_sampled_it_answers_three_times_in_ten(model: Any, tokenizer: Any) -> None:
    rows = training_rows() + held_out_rows()
    chances = [probability(model, tokenizer, row["prompt"], row["answer"]) for row in rows]
    assert sum(chances) / 100 == pytest.approx(0.3, abs=0.02)
    assert min(chances) > 0.15  # each sum can be found: 8 samples miss it with at most 0.85^8 = 0.27
    assert max(chances) < 0.45


def test_progress_ends_at_the_entropy_of_the_choice(trained: Trained) -> None:
    lines = trained[1]
    assert lines[0].startswith(f"training the starter model: step 20/{starter_model.STEPS}, loss ")
    assert lines[-1].startswith(
        f"training the starter model: step {starter_model.STEPS}/{starter_model.STEPS}, loss "
    )
    # No model can do better than -0.3 log 0.3 - 0.7 log 0.7 = 0.3612 + 0.2497 = 0.6109.
    assert 0.610 < float(lines[-1].split()[-1]) < 0.63


def test_a_second_call_does_nothing(trained: Trained) -> None:
    directory, _ = trained
    before, time_ns = contents(directory), (directory / "model.safetensors").stat().st_mtime_ns
    said: list[str] = []
    starter_model.ensure(directory, said.append)
    assert said == []
    assert contents(directory) == before
    assert (directory / "model.safetensors").stat().st_mtime_ns == time_ns


def test_the_same_weights_each_time_and_no_trace_in_the_caller(tokenizer: Any) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    first = starter_model.train(starter_model.build_tokenizer(), 5, print).state_dict()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)  # the caller's random numbers play no part
    second = starter_model.train(starter_model.build_tokenizer(), 5, print).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_folder_that_lacks_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in starter_model.FILES:
        if name != "tokenizer.json":
            (tmp_path / "model" / name).touch()
    with pytest.raises(InputError, match=r"model: not a complete starter model \(tokenizer.json missing\)"):
        starter_model.ensure(tmp_path / "model", print)


def test_stopped_half_way_it_leaves_nothing(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        raise KeyboardInterrupt(line)

    with pytest.raises(KeyboardInterrupt, match=f"step 20/{starter_model.STEPS}"):
        starter_model.ensure(tmp_path / "model", stop)
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


@pytest.mark.parametrize("is_held", [False, True], ids=["it trains", "another process trains it"])
def test_asked_to_stop_it_ends_at_once_and_leaves_nothing(tmp_path: Path, is_held: bool) -> None:
    asked: list[None] = []
    said: list[str] = []

    def stop() -> None:
        asked.append(None)
        if len(asked) == 3:
            raise Interrupted(15)

    held = FileLock(tmp_path / ".model.lock") if is_held else nullcontext()
    with ThreadPoolExecutor(1) as other, held, pytest.raises(Interrupted):
        other.submit(starter_model.ensure, tmp_path / "model", said.append, stop).result()
    assert said == []
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


@pytest.mark.slow
def test_killed_while_writing_it_leaves_nothing_and_the_next_call_makes_the_same_bytes(
    trained: Trained, tmp_path: Path
) -> None:
    # Killed when the weights, of two steps that no one will read, are written and the tokenizer is not.
    code = (
        "import os, signal, sys; from pathlib import Path; from grpo.models import starter_model as starter\n"
        "starter.STEPS = 2\n"
        "starter.PreTrainedTokenizerFast.save_pretrained = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "starter.ensure(Path(sys.argv[1]), print)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", ".model.unfinished"]
    assert (tmp_path / ".model.unfinished" / "model.safetensors").exists()
    starter_model.ensure(tmp_path / "model", print)
    assert contents(tmp_path / "model") == contents(trained[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", "model"]
