"""The table of surrogates; their numbers are in test_loss.py."""

from dataclasses import fields
from typing import get_args

from tests.update.examples import settings

from grpo.config import UpdateConfig
from grpo.update.objective import objective_of
from grpo.update.surrogates import SURROGATES, Objective


def test_every_surrogate_of_the_configuration_is_in_the_table() -> None:
    assert set(SURROGATES) == set(get_args(UpdateConfig.model_fields["surrogate"].annotation))


def test_the_constants_are_those_of_the_configuration() -> None:
    config = settings("cispo", entropy_coefficient=0.5)
    objective = objective_of(config)
    assert {each.name: getattr(objective, each.name) for each in fields(Objective)} == {
        each.name: getattr(config, each.name) for each in fields(Objective)
    }
    assert objective.bounds == (float("-inf"), 5.0)  # clip_low null, clip_high 4
    assert objective.cap == float("inf")
