# transformers' models and configurations are not typed well enough for:
# mypy: disable-error-code="no-untyped-call,arg-type"
"""Tiny random classifiers over one-letter tokens: <eos> is 0, a is 1, b is 2, ... h is 8."""

import string
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from grpo.errors import GrpoError, InputError
from grpo.score.outcome import Outcome
from grpo.score.reward_model import RewardModel

VOCABULARY = ["<eos>", *string.ascii_lowercase, "\n", ":"]
SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "num_labels": 1,
    "bos_token_id": None,
    "eos_token_id": 0,
}
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}<eos>{% endfor %}"
RESPONSES = ["a", "abcabcabcabc", "hgf", "b" * 30, "", "cab", "abcdefgh" * 3]


def save(directory: Path, model: Any, chat_template: str | None = None) -> Path:
    words = Tokenizer(WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="a"))
    words.pre_tokenizer = Split(Regex("[\\s\\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    return directory


def random_model(kind: str, pad_token_id: int | None) -> Any:
    torch.manual_seed(0)
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**SMALL, pad_token_id=pad_token_id)).eval()
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        shared = {
            key: SMALL[key] for key in ("vocab_size", "initializer_range", "num_labels", "eos_token_id")
        }
        return GPT2ForSequenceClassification(GPT2Config(**shared, **sizes, pad_token_id=pad_token_id)).eval()
    return Qwen2ForSequenceClassification(Qwen2Config(**SMALL, pad_token_id=pad_token_id)).eval()


def last_token_model() -> Qwen2ForSequenceClassification:
    """A Qwen2 whose score is worked out by hand: sqrt(32) x the id of the last token.

    Attention and MLP add 0, so the hidden state is the embedding: 1 at position `id` of 32. RMSNorm divides
    by sqrt(1/32 + 1e-6), and the head multiplies position i by i.
    """
    model = random_model("qwen2", pad_token_id=0)
    assert isinstance(model, Qwen2ForSequenceClassification)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(32))
        model.score.weight.copy_(torch.arange(32.0)[None])
    return model


def values(outcomes: list[Outcome]) -> list[float]:
    assert [outcome.status for outcome in outcomes] == ["ok"] * len(outcomes)
    return [outcome.value for outcome in outcomes if outcome.value is not None]


@pytest.mark.parametrize(
    ("kind", "pad_token_id"),
    [("qwen2", None), ("qwen2", 0), ("qwen2", 30), ("gpt2", None), ("gpt2", 0), ("bert", 0), ("bert", 30)],
)
@pytest.mark.parametrize("chat_template", [None, TEMPLATE])
def test_batches_do_not_change_a_value(
    tmp_path: Path, kind: str, pad_token_id: int | None, chat_template: str | None
) -> None:
    model = random_model(kind, pad_token_id)
    reward_model = RewardModel(save(tmp_path, model, chat_template), "cpu")
    prompts = ["ab"] * len(RESPONSES)
    # The plain forward pass of each rollout alone, with the pad token out of the way (none has a ":").
    expected = []
    for response in RESPONSES:
        text = f"u:ab<eos>a:{response}<eos>" if chat_template else f"ab{response}"
        letters = text.replace("<eos>", "#")
        token_ids = [0 if letter == "#" else VOCABULARY.index(letter) for letter in letters]
        model.config.pad_token_id = 29
        with torch.inference_mode():
            expected.append(float(model(input_ids=torch.tensor([token_ids])).logits))
    assert max(expected) - min(expected) > 0.01  # else equal values would prove nothing
    for max_tokens_per_batch in (1, 60, 100_000):
        outcomes = reward_model.score(prompts, RESPONSES, max_tokens_per_batch)
        assert values(outcomes) == pytest.approx(expected, abs=1e-5)


def test_value_is_read_at_the_last_token_even_when_it_is_the_pad_token(tmp_path: Path) -> None:
    # pad = eos = 0. "c<eos>" ends with token 0 and scores 0; reading the "c" before it would give 3 x 5.657.
    reward_model = RewardModel(save(tmp_path, last_token_model()), "cpu")
    outcomes = reward_model.score(["a", "a", "a"], ["c<eos>", "b", "bbbbh"], 100_000)
    root = (1 / 32 + 1e-6) ** -0.5  # 5.657
    assert values(outcomes) == pytest.approx([0.0, 2 * root, 8 * root], abs=1e-4)


def test_rows_that_end_with_every_small_token_still_find_a_pad(tmp_path: Path) -> None:
    reward_model = RewardModel(save(tmp_path, last_token_model()), "cpu")
    letters = ["<eos>", "a", "b", "bc"]
    root = (1 / 32 + 1e-6) ** -0.5
    # Last tokens 0, 1, 2, 3.
    outcomes = reward_model.score([""] * 4, letters, 100_000)
    assert values(outcomes) == pytest.approx([0.0, root, 2 * root, 3 * root], abs=1e-4)


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    # The template's last letter is the last message's first: its score tells what the template saw.
    template = (
        "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}{{ messages[0]['role'][0] }}"
    )
    reward_model = RewardModel(save(tmp_path, last_token_model(), template), "cpu")
    chat = [{"role": "harsh", "content": "ab"}, {"role": "user", "content": "c"}]
    outcomes = reward_model.score([chat, "ab"], [[{"role": "assistant", "content": "d"}], "d"], 100)
    root = (1 / 32 + 1e-6) ** -0.5
    assert values(outcomes) == pytest.approx(
        [8 * root, 21 * root], abs=1e-4
    )  # h is 8; a text is a user's: u is 21


def test_messages_without_a_template_are_joined_by_newlines(tmp_path: Path) -> None:
    reward_model = RewardModel(save(tmp_path, random_model("bert", 30)), "cpu")
    chat = [{"role": "system", "content": "ab"}, {"role": "user", "content": "c"}]
    joined = reward_model.score([chat], [[{"role": "assistant", "content": "d"}]], 100)
    assert values(joined) == values(reward_model.score(["ab\nc\n"], ["d"], 100))


def test_a_template_that_refuses_is_an_error_of_that_rollout(tmp_path: Path) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + TEMPLATE
    )
    reward_model = RewardModel(save(tmp_path, random_model("qwen2", 0), template), "cpu")
    chat = [{"role": "system", "content": "ab"}]
    outcomes = reward_model.score([chat, "a"], ["b", "b"], 100)
    text = "the reward model's chat template refuses the messages: no system role"
    assert outcomes[0] == Outcome(None, "error", text)
    assert outcomes[1].status == "ok"


def test_too_long_and_empty_rollouts_are_errors_and_the_others_are_scored(tmp_path: Path) -> None:
    reward_model = RewardModel(save(tmp_path, last_token_model()), "cpu")
    outcomes = reward_model.score(["aa", "aa", "", "a"], ["b" * 62, "b" * 63, "", "a"], 100)
    root = (1 / 32 + 1e-6) ** -0.5
    assert outcomes[0].value == pytest.approx(2 * root, abs=1e-4)  # 2 + 62 tokens fit in 64
    too_long = "prompt and response are 65 tokens, the reward model's context is 64"
    assert outcomes[1] == Outcome(None, "error", too_long)
    assert outcomes[2] == Outcome(None, "error", "prompt and response together are no tokens")
    assert outcomes[3].value == pytest.approx(root, abs=1e-4)


def test_roberta_has_fewer_positions_than_its_table(tmp_path: Path) -> None:
    # Positions start behind padding_idx 1: of 64 rows of the table, 62 are left.
    sizes = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    model = RobertaForSequenceClassification(RobertaConfig(**sizes, pad_token_id=1))
    reward_model = RewardModel(save(tmp_path, model), "cpu")
    outcomes = reward_model.score(["b", "b"], ["c" * 61, "c" * 62], 1000)
    assert outcomes[0].status == "ok"
    too_long = "prompt and response are 63 tokens, the reward model's context is 62"
    assert outcomes[1] == Outcome(None, "error", too_long)


def test_a_number_too_large_for_float32_is_nonfinite(tmp_path: Path) -> None:
    model = last_token_model()
    with torch.no_grad():
        model.score.weight[:] = 3e38  # finite, as every weight must be
    outcomes = RewardModel(save(tmp_path, model), "cpu").score(["a"], ["b"], 100)
    assert [outcome.status for outcome in outcomes] == ["nonfinite"]


def test_half_precision_checkpoints_run_in_float32(tmp_path: Path) -> None:
    reward_model = RewardModel(save(tmp_path, last_token_model().to(torch.bfloat16)), "cpu")
    root = (1 / 32 + 1e-6) ** -0.5
    # In bfloat16, 26 x 5.6568 = 147.076 would come out as 147: it has 8 binary digits. z is 26.
    assert values(reward_model.score([""], ["z"], 100)) == pytest.approx([26 * root], abs=1e-3)


# ---- checkpoints that cannot be used ----


def load_error(directory: Path) -> str:
    with pytest.raises(GrpoError) as caught:
        RewardModel(directory, "cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_directory(tmp_path: Path) -> None:
    assert load_error(tmp_path / "none").startswith(
        f"reward model {tmp_path / 'none'}: no such directory; a Hugging Face checkpoint"
    )


def test_empty_directory(tmp_path: Path) -> None:
    assert load_error(tmp_path).startswith(f"reward model {tmp_path}: holds no .safetensors weights; ")


def test_several_labels(tmp_path: Path) -> None:
    model = Qwen2ForSequenceClassification(Qwen2Config(**{**SMALL, "num_labels": 3}))
    save(tmp_path, model)
    assert load_error(tmp_path) == f"reward model {tmp_path}: has 3 labels; a reward needs exactly 1"


def test_language_model_is_no_classifier(tmp_path: Path) -> None:
    save(tmp_path, Qwen2ForCausalLM(Qwen2Config(**SMALL)))
    expected = f"reward model {tmp_path}: is not a trained classifier; its weights lack score.weight"
    assert load_error(tmp_path) == expected


def test_missing_weights(tmp_path: Path) -> None:
    save(tmp_path, random_model("qwen2", 0))
    (tmp_path / "model.safetensors").unlink()
    assert load_error(tmp_path).startswith(f"reward model {tmp_path}: holds no .safetensors weights; ")


def test_truncated_weights(tmp_path: Path) -> None:
    save(tmp_path, random_model("qwen2", 0))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert load_error(tmp_path).startswith(f"reward model {tmp_path}: its weights cannot be read: ")


def test_missing_tokenizer_is_an_input_error(tmp_path: Path) -> None:
    random_model("qwen2", 0).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"tokenizer"):
        RewardModel(tmp_path, "cpu")
