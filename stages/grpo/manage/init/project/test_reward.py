"""A wrong reward trains the wrong thing: write down what it must give. Run: pytest (pip install pytest)."""

from reward import correct


def test_the_answer_and_nothing_else_is_right():
    """Three responses to one prompt: right, wrong, and right with more behind it."""
    completions = ["7", "34", "7 or 8"]
    assert correct(["3+4="] * 3, completions, answer=["7"] * 3) == [1.0, 0.0, 0.0]


def test_a_chat_response_is_read_too():
    """With `chat: true` a response is a list of messages."""
    completions = [[{"role": "assistant", "content": " 7\n"}]]
    assert correct([[{"role": "user", "content": "3+4="}]], completions, answer=["7"]) == [1.0]
