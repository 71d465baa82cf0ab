"""The reward: how good is a response? Training makes high rewards more likely, whatever they stand for."""


def correct(prompts, completions, answer, **columns):
    """1.0 where the response is the `answer` of its row in prompts.jsonl, else 0.0.

    One value per response. Every column of the data arrives by its name; None in place of a number means that
    the reward does not apply to this response.
    """
    return [float(text_of(c).strip() == right) for c, right in zip(completions, answer, strict=True)]


def text_of(completion):
    """The text of a response: a string, or with chat prompts a list of one message."""
    return completion if isinstance(completion, str) else completion[0]["content"]
