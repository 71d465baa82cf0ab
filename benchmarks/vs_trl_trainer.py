"""TRL's half of vs_trl.py: a job as JSON in, its optimiser steps as JSON out. Run with TRL's own Python.

Each phase is timed around TRL's own method. generate: `_generate` (tokenizing and decoding included).
reference: the log-probs of the reference model. update: from the first micro-batch, once its inputs are
there, to the end of the optimiser's step. whole: from the end of a step to the end of the next.

With `rollouts`, TRL takes those instead of sampling, in the order given, and two steps on each.
"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from vs_trl_reward import share_of_ascii

# What makes TRL fastest and its loss ours; `defaults` leaves these as TRL has them.
TUNED = {"gradient_checkpointing": False, "use_bias_correction_kl": False, "loss_type": "grpo"}
DEFAULT_BATCH_SIZE = 8  # of TRL, per device


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    trainer = build(job)
    trainer.train()
    result = {
        "steps": trainer.steps.rows[: job["steps"]],
        "versions": {module.__name__: module.__version__ for module in (trl, transformers, torch)},
        "threads": torch.get_num_threads(),
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


def build(job: dict[str, Any]) -> "TimedTrainer":
    num_rollouts = job["num_prompts"] * job["k"]
    tuned = job["variant"] == "tuned"
    batch_size = num_rollouts if tuned else DEFAULT_BATCH_SIZE
    config = GRPOConfig(
        output_dir=job["folder"],
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=num_rollouts // batch_size,
        num_generations=job["k"],
        max_completion_length=job["max_new_tokens"],
        num_iterations=job["steps_per_rollouts"],
        max_steps=job["steps"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.0,
        optim="adamw_torch_fused",
        beta=job["kl_coefficient"],
        temperature=1.0,
        scale_rewards="group",
        shuffle_dataset=False,
        bf16=False,
        seed=job["seed"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **(TUNED if tuned else {}),
    )
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, attn_implementation="sdpa"
    )
    prompts = Path(job["prompts"]).read_text().splitlines()
    trainer = TimedTrainer(
        model=model,
        reward_funcs=share_of_ascii,
        args=config,
        train_dataset=Dataset.from_list([json.loads(line) for line in prompts]),
        processing_class=tokenizer,
        rollout_func=stored_rollouts(job["rollouts"]) if job["rollouts"] else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(trainer.steps)
    return trainer


def stored_rollouts(iterations: list[dict[str, Any]]) -> Any:
    """A rollout_func that hands out what is stored, an iteration at each call."""
    calls = iter(iterations)

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        found = next(calls)
        assert len(found["prompt_ids"]) == len(prompts)
        return found

    return rollouts


class Steps(TrainerCallback):
    """A row for each optimiser step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.seconds: defaultdict[str, float] = defaultdict(float)  # of the step that runs, by part
        self.lengths: list[int] = []  # of the responses
        self.loss = 0.0
        self.ended: float | None = None

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.seconds["update"] = time.perf_counter() - self.began - self.seconds["prepare"]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        ended = time.perf_counter()
        row = {part: self.seconds[part] for part in ("generate", "reference", "update")}
        whole = ended - (self.ended or self.began)
        self.rows.append({**row, "whole": whole, "loss": self.loss, "lengths": self.lengths})
        self.seconds.clear()
        self.loss, self.ended = 0.0, ended

    def on_log(self, *_: Any, **event: Any) -> None:
        logs = event["logs"]
        if "grad_norm" in logs:  # not the summary at the end
            names = ("grad_norm", "entropy", "kl", "reward")
            self.rows[-1] |= {name: logs[name] for name in names if name in logs}


class TimedTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer, with a clock around its own methods."""

    def __init__(self, **arguments: Any) -> None:
        self.steps = Steps()
        super().__init__(**arguments)

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        with self.steps.clock("prepare"):
            return super()._prepare_inputs(*args, **kwargs)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.steps.clock("generate"):
            generated = super()._generate(*args, **kwargs)
        _, completion_ids, *_ = generated
        self.steps.lengths = [len(ids) for ids in completion_ids]
        return generated

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        with self.steps.clock("reference" if model is self.ref_model else "policy"):
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.steps.loss += loss.item()
        return loss


if __name__ == "__main__":
    main()
