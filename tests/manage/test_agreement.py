"""What `doctor` says of a configuration, what `run --dry-run` does, and what becomes of the run: the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.conftest import EVALUATE, HELD_OUT, REWARD, Grpo

Build = Callable[[], object]
JUDGE = "{url: 'http://127.0.0.1:9/v1', model: m, rubric: 'Rate {response} %s', api_key_env: %s}"


class Fault(NamedTuple):
    """One thing that is wrong with a project that is right otherwise; text: a part of the message."""

    name: str
    settings: list[str]
    code: int
    text: str
    build: Build = lambda: None


def one(name: str, setting: str, code: int, text: str, build: Build = lambda: None) -> Fault:
    return Fault(name, [setting], code, text, build)


def append(name: str, text: str) -> Build:
    return lambda: Path(name).write_text((Path(name).read_text() if Path(name).exists() else "") + text)


def held_out(source: str) -> Build:
    def build() -> None:
        append("pipeline.yaml", EVALUATE.replace("held_out.jsonl", source))()
        Path("held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))

    return build


def many_then(line: str) -> Build:
    rows = "".join(json.dumps({"prompt": f"{n}", "answer": "1"}) + "\n" for n in range(1200))
    return lambda: Path("prompts.jsonl").write_text(rows + line + "\n")


def untemplated() -> None:
    Path("model/chat_template.jinja").unlink()


def adapter(name: str, whole: bool = False) -> Build:
    """What TRL saves of LoRA training; whole: with weights beside it, which transformers passes over."""

    def build() -> None:
        shutil.copytree("model", name)
        if not whole:
            Path(name, "config.json").unlink()
            Path(name, "model.safetensors").rename(Path(name, "adapter_model.safetensors"))
        Path(name, "adapter_config.json").write_text('{"base_model_name_or_path": "model", "r": 8}')

    return build


def gguf(path: str) -> Build:
    """A GGUF file, in a folder of its own or not."""

    def build() -> None:
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(b"GGUF\3\0\0\0")

    return build


TAKES_A_MODEL = {  # every key that names a checkpoint
    "model": "model={}",
    "update.reference": "update.reference={}",
    "score.teachers": "score.teachers=[{{model: {}}}]",
    "score.rewards": "score.rewards=[{{model: {}}}]",
}
GGUFS = [
    one(f"{key}: {name}", setting.format(name), 4, "m.Q4.gguf: GGUF is not read; take the", gguf(path))
    for key, setting in TAKES_A_MODEL.items()
    for name, path in (("./m.Q4.gguf", "m.Q4.gguf"), ("./only", "only/m.Q4.gguf"))
]
FAULTS = [
    *GGUFS,
    one("an adapter", "model=./lora", 4, "lora: is a peft adapter", adapter("lora")),
    one("an adapter and weights", "model=./lora", 4, "lora: is a peft adapter", adapter("lora", whole=True)),
    one("an adapter as reference", "update.reference=./lora", 4, "merge it first", adapter("lora")),
    one("an adapter as teacher", "score.teachers=[{model: ./lora}]", 4, "merge it first", adapter("lora")),
    one("an adapter as reward", "score.rewards=[{model: ./lora}]", 4, "merge it first", adapter("lora")),
    one("no model", "model=./none", 4, "none: no such directory; a Hugging Face checkpoint"),
    one("model: a file", "model=./reward.py", 4, "reward.py: is no directory; a Hugging Face checkpoint"),
    one("no tokenizer", "model=./model", 4, "tokenizer", lambda: Path("model/tokenizer.json").unlink()),
    one("no reference", "update.reference=./none", 4, "none: no such directory"),
    one("no prompts", "prompts.source=none.jsonl", 3, "none.jsonl: no such file"),
    one("row 1,201", "seed=0", 3, "prompts.jsonl:1201: ", many_then("{")),
    one("no column", "prompts.columns={prompt: question}", 3, "prompts.jsonl:1: no column question"),
    one("a long prompt", "generate.max_new_tokens=61", 3, "prompt of 4 tokens"),
    one("no room", "generate.max_new_tokens=64", 2, "64 leaves no room for a prompt"),
    one("no template", "prompts.chat=true", 4, "no chat template", untemplated),
    one("no template file", "prompts.chat_template=no.jinja", 2, "prompts.chat_template"),
    one("template for no chat", "prompts.chat_template_arguments={a: 1}", 2, "no prompt is a chat"),
    one("no function", "score.rewards=[{function: 'reward:nope'}]", 2, "nope"),
    one("a file's name", "score.rewards=[{function: 'reward.py:code'}]", 2, "reward:code"),
    one("no built-in", "score.rewards=[{function: exact_anser}]", 2, "exact_answer"),
    one(
        "a column that is not there",
        "score.rewards=[{function: 'reward:needs'}]",
        2,
        "needs solution",
        append("reward.py", "\n\ndef needs(completions, solution):\n    return [1.0 for _ in completions]\n"),
    ),
    one(
        "a column without values",
        "score.rewards=[{function: exact_answer}]",
        2,
        "no row of the prompts has a value there",
        lambda: Path("prompts.jsonl").write_text('{"prompt": "1"}\n{"prompt": "2", "answer": null}\n'),
    ),
    one(
        "wrong arguments", "score.rewards=[{function: 'reward:code', arguments: {prompts: 1}}]", 2, "prompts"
    ),
    one("no reward model", "score.rewards=[{model: ./none}]", 4, "none: no such directory"),
    one("no key", f"score.rewards=[{{judge: {JUDGE % ('', 'NO_KEY')}}}]", 2, "NO_KEY is not set"),
    one("no such column", f"score.rewards=[{{judge: {JUDGE % ('{nope}', 'null')}}}]", 2, "nope"),
    one("no teacher", "score.teachers=[{model: ./none}]", 4, "none: no such directory"),
    one("a condition", "advantage.where=nope > 1", 2, "nope"),
    one("no estimator", "advantage.sql=none.sql", 2, "none.sql: no such file"),
    one("an estimator", "advantage.sql=own.sql", 2, "own.sql", append("own.sql", "select 1 as nope")),
    one("no query", "generate.prompts_sql=none.sql", 2, "none.sql: no such file"),
    one("a query", "generate.prompts_sql=own.sql", 2, "own.sql", append("own.sql", "selec 1")),
    one("no surrogate", "update.surrogate=loss:f", 2, "loss.py: no such file"),
    one(
        "a surrogate",
        "update.surrogate=loss:f",
        2,
        "update.surrogate: loss:f: ",
        append("loss.py", "def f(logprobs):\n    return 1.0\n"),
    ),
    one("no layer", "update.lora={rank: 2, alpha: 4, targets: [q]}", 2, "update.lora.targets: 'q'"),
    Fault(
        "truncated sampling",
        ["generate.top_k=4", "generate.allow_truncated_sampling=true"],
        2,
        "generate.top_k: needs engine: vllm",
    ),
    one("no held-out prompts", "seed=0", 3, "none.jsonl: no such file", held_out("none.jsonl")),
    Fault(
        "a column that held-out prompts have not",
        ["score.rewards=[{function: 'reward:needs'}]"],
        2,
        "needs hint",
        lambda: [
            held_out("held_out.jsonl")(),
            append(
                "reward.py", "\n\ndef needs(completions, hint):\n    return [0.0 for _ in completions]\n"
            )(),
            Path("prompts.jsonl").write_text('{"prompt": "1", "hint": "2"}\n'),
        ],
    ),
]


def three(grpo: Grpo, *settings: str) -> list[tuple[int, str]]:
    """Exit code and all that was said: by `doctor`, by `run --dry-run` and, last, by `run`."""
    options = [part for setting in settings for part in ("--set", setting)]
    commands = (["doctor"], ["run", "--dry-run"], ["run", "--until", "1"])
    found = [grpo(*command, *options) for command in commands]
    return [
        (code, f"{out if command == ['doctor'] else ''}{err}")
        for command, (code, out, err) in zip(commands, found, strict=True)
    ]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_what_one_refuses_all_refuse(project: Path, grpo: Grpo, fault: Fault) -> None:
    fault.build()
    found = three(grpo, *fault.settings)
    assert [code for code, _ in found] == [fault.code] * 3, found
    assert all(fault.text in " ".join(said.split()) for _, said in found), found
    assert not list(Path().glob("artifacts/tiny/iteration=*"))


def other_prompts() -> None:
    Path("prompts.jsonl").write_text('{"prompt": "8+1=", "answer": "9"}\n')


def other_model() -> None:
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


def damage() -> None:
    Path("artifacts/tiny/run.json").write_text("{")


def stale() -> None:
    path = next(Path("artifacts/tiny/iteration=000000").glob("rewards"))
    path.rename("gone")


BEGUN = [
    one("seed", "seed=1", 4, "seed: fixed for the run tiny, but changed (0 -> 1)"),
    one("model", "seed=0", 4, "model: fixed for the run tiny, but changed", other_model),
    one("a model from the hub", "model=someone/nothing", 4, "changed (./model -> someone/nothing)"),
    one("prompts", "seed=0", 4, "prompts: fixed for the run tiny, but changed", other_prompts),
    one("chat", "prompts.chat=true", 4, "prompts: fixed for the run tiny, but changed"),
    one("run.json", "seed=0", 6, "run.json: is not JSON", damage),
    one("rewards that are gone", "iterations=3", 4, "is stale", stale),
    one("a reward", "score.rewards=[{function: 'reward:nope'}]", 2, "nope"),
]


@pytest.mark.parametrize("fault", BEGUN, ids=lambda fault: fault.name)
def test_so_of_a_run_that_has_begun(finished: Path, grpo: Grpo, fault: Fault) -> None:
    fault.build()
    options = [part for setting in [*fault.settings, "iterations=3"] for part in ("--set", setting)]
    for command in (["doctor"], ["run", "--dry-run"], ["run"]):
        code, out, err = grpo(*command, *options)
        assert code == fault.code, (command, out, err)
        assert fault.text in " ".join(f"{out} {err}".split()), (command, out, err)


# What begins, and learns nothing

ALIKE = "def alike(completions):\n    return [0.5 for _ in completions]\n"
NONE = "def none(completions):\n    return [None for _ in completions]\n"
LONG_ANSWER = '{"prompt": "1+", "answer": "12345"}\n'
DULL = [
    one(
        "alike",
        "score.rewards=[{function: 'dull:alike'}]",
        0,
        "gives 0.5 to a right answer",
        append("dull.py", ALIKE),
    ),
    one("none", "score.rewards=[{function: 'dull:none'}]", 0, "applies to none", append("dull.py", NONE)),
    one("weights", "score.rewards=[{function: 'reward:code', weight: 0}]", 0, "every weight is 0"),
    one("greedy", "generate.temperature=0.01", 0, "0.01 is nearly greedy"),
    one(
        "too short",
        "generate.max_new_tokens=1",
        0,
        "1 tokens hold no answer",
        lambda: Path("prompts.jsonl").write_text(LONG_ANSWER),
    ),
    one("stop", "generate.stop=['3']", 0, "'3' is in 1 of 6 answers"),
    one("no step", "update.learning_rate=0", 0, "update.learning_rate: 0"),
]


@pytest.mark.parametrize("fault", DULL, ids=lambda fault: fault.name)
def test_what_learns_nothing_is_named(project: Path, grpo: Grpo, fault: Fault) -> None:
    fault.build()
    code, out, _ = grpo("doctor", "--set", *fault.settings)
    said = " ".join(out.split())
    assert (code, fault.text in said, "it can begin; read the 1 warning first" in said) == (0, True, True), (
        out
    )


@pytest.mark.parametrize("fault", DULL[:4], ids=lambda fault: fault.name)
def test_and_does_learn_nothing(project: Path, grpo: Grpo, fault: Fault) -> None:
    fault.build()
    code, _, err = grpo("run", "--until", "1", "--set", "update.kl_coefficient=0", "--set", *fault.settings)
    if fault.name == "none":
        assert (code, "no rollout is kept" in err) == (3, True)
    else:
        _, out, _ = grpo("sql", "--json", "select max(abs(advantage)) as most from advantages")
        assert (code, json.loads(out)[0]["most"] or 0.0) == (0, 0.0)
    said = "no rollout is kept (every reward has weight 0, and counts for nothing), so update has"
    assert (said in err) == (fault.name == "weights"), err
    assert ("unscored" in err) == (fault.name == "none"), err  # its rewards are null


def test_a_reward_that_fails_whatever_it_is_given(project: Path, grpo: Grpo) -> None:
    Path("reward.py").write_text(REWARD.replace("return [float(sum", "return [1 / 0 + float(sum"))
    found = three(grpo)
    assert [code for code, _ in found] == [8, 8, 8]
    assert all("ZeroDivisionError" in said for _, said in found)


def test_what_differs_is_said_alike(finished: Path, grpo: Grpo) -> None:
    changed = ["--set", "generate.samples_per_prompt=4"]
    line = "from iteration 2: generate.samples_per_prompt: 2 -> 4\n"
    assert grpo("run", "--dry-run", *changed)[2] == f"{line}2 of 2 iterations are complete\n"
    assert grpo("run", *changed)[2] == f"{line}run tiny: 2 iterations are complete; nothing to do\n"
    assert line in grpo("run", "--dry-run", "--set", "iterations=3", *changed)[2]


def test_a_schedule_that_steps_is_said(project: Path, grpo: Grpo) -> None:
    cosine = ["--set", "update.schedule=cosine"]
    assert grpo("run", *cosine)[0] == 0
    # 2 steps of 0.01: 0.01 and 0.005; as steps 2 of 4 the next is at 0.01 * (1 + cos(pi / 2)) / 2 = 0.005.
    line = "from iteration 2: iterations: 2 -> 4; the learning rate steps from 0.005 to 0.005\n"
    assert line in grpo("run", "--dry-run", "--set", "iterations=4", *cosine)[2]
    assert line in grpo("run", "--until", "3", "--set", "iterations=4", *cosine)[2]


def test_a_run_without_rollouts_is_begun_anew(project: Path, grpo: Grpo) -> None:
    assert grpo("run", "--until", "0")[0] == 0
    other_prompts()
    code, _, err = grpo("run", "--until", "0", "--set", "seed=1", "--set", "model=model/")
    says = "run tiny holds no rollouts yet, so it starts over with seed: 0 -> 1; "
    assert (code, err.splitlines()[0].startswith(says)) == (0, True), err
    assert "prompts: their content" in err
    assert json.loads(grpo("sql", "--json", "select prompt from prompts")[1]) == [{"prompt": "8+1="}]
    assert grpo("run", "--set", "seed=1")[0] == 0
    other_model()
    assert grpo("run", "--set", "seed=1")[0] == 4  # now it has


@pytest.mark.parametrize("path", ["model", "./model/", "model/../model", "{}/model"])
def test_a_model_by_any_path_is_the_same(finished: Path, grpo: Grpo, path: str) -> None:
    assert grpo("run", "--set", f"model={path.format(finished)}")[2].endswith("complete; nothing to do\n")


def test_every_null_that_stands_for_a_value_is_shown_as_it(measured_project: Path, grpo: Grpo) -> None:
    shown = json.loads(grpo("run", "--dry-run", "--json")[1])
    assert shown["update"]["reference"] == "./model"
    names = ("pass_reward", "temperature", "max_new_tokens")
    assert [shown["evaluate"][name] for name in names] == ["code", 1.0, 4]


@pytest.mark.parametrize("command", ["run", "doctor", "status", "generate", "show", "report", "verify", "gc"])
def test_an_empty_folder_names_init(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grpo: Grpo, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = grpo(command)
    assert (code, out, "`grpo init` makes a project here" in err) == (2, "", True)
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_nobody_is_logged_in_to(
    project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grpo.inspect import track

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(project / "netrc"))
    monkeypatch.setattr(track, "find_spec", lambda name: name if name == "wandb" else None)
    _, out, _ = grpo("doctor", "--set", "track=wandb")
    assert "nobody is logged in to api.wandb.ai: `wandb login`" in out
    (project / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert "everything that it needs is here" in grpo("doctor", "--set", "track=wandb")[1]
    code, out, _ = grpo("doctor", "--set", "track=trackio")
    assert (code, "track: trackio: is not installed; pip install 'grpo-stages[trackio]'" in out) == (2, True)
