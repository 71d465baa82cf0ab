"""What a mismatch is: bands that meet, the same in status, doctor and docs."""

import re
from pathlib import Path

import pytest

from grpo.inspect.status import MISMATCH_BANDS, MISMATCH_WARNING, mismatch_says


@pytest.mark.parametrize(
    ("mean", "says"),
    [
        (0.0, "float32"),
        (3e-6, "float32"),
        (1e-4, "float32"),
        (1.1e-4, "bfloat16 on one side"),
        (1e-2, "bfloat16 on one side"),
        (2.4e-2, "update.sampler_correction"),  # SmolLM2-135M in bfloat16
        (0.05, "update.sampler_correction"),
        (0.051, "do not compute the same"),
        (9.0, "do not compute the same"),
    ],
)
def test_every_number_means_something(mean: float, says: str) -> None:
    assert says in mismatch_says(mean)


def test_the_page_has_the_same_bands() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reading-a-run.md").read_text()
    table = page.partition("| `mismatch_mean` | is |")[2].partition("\n\n")[0]
    limits = [float(number) for number in re.findall(r"^\| (?:below|to|above) ([0-9.]+) \|", table, re.M)]
    assert limits == [*(limit for limit, _ in MISMATCH_BANDS[:-1]), MISMATCH_WARNING]
