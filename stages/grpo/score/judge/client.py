"""client: questions -> answers of a language model, through an OpenAI-compatible endpoint

Repeating, growing pauses and Retry-After are those of the `openai` package. Answers are handed on as they
come, so that they are on disk before the last question is asked. The key is in the client alone: it is taken
out of every message.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any

from grpo.config import JudgeConfig
from grpo.errors import UsageError
from grpo.score.judge.completion import Judgement, failure, judgement_of

# What a kill loses: answers wait this long, or for this many, until they are handed on to be committed.
BATCH_S, BATCH_ANSWERS = 1.0, 64
# With so many failures in a row the endpoint is down or refuses us all: the rest would only wait in turn.
MAX_FAILURES_IN_A_ROW = 32
LONGEST_PAUSE_S = 120.0  # that the openai package waits when Retry-After asks for it
_OF_ONE_QUESTION = (400, 413, 422)  # statuses that say nothing of the others


class Judge:
    """An endpoint and how it is asked; connections stay open between calls. Calls come from one thread.

    where: the reward, for messages; timeout_s: of one request. Raises UsageError where the `openai` package
    or the key is missing.
    """

    def __init__(self, where: str, config: JudgeConfig, timeout_s: float) -> None:
        try:
            import openai
        except ImportError as error:
            how = "pip install 'grpo-stages[judge]'"
            raise UsageError(f"{where}: judge: needs the package openai ({error}); {how}") from None
        self._config = config
        self._timeout_s = timeout_s
        self._key = _key(where, config)
        self._pace = _Pace(config.requests_per_minute)
        self._client = openai.AsyncOpenAI(
            base_url=config.url,
            api_key=self._key or "none",  # the package wants one
            timeout=timeout_s,
            max_retries=config.retries,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [self._pace.wait]}),
        )
        self._loop = asyncio.Runner()

    def close(self) -> None:
        """End the connections."""
        self._loop.run(self._client.close())
        self._loop.close()

    def ask(
        self, questions: Sequence[str], stopping: Callable[[], bool]
    ) -> Generator[list[tuple[int, Judgement]], None, None]:
        """Yield (place of the question, judgement) as they come, some at a time.

        What fails is a judgement too. When stopping() turns true no other question is asked, and it ends with
        those that are under way.
        """
        asking = _Asking(self._ask, questions, stopping)
        try:
            self._loop.run(asking.start(self._config.concurrency))
            while batch := self._loop.run(asking.batch()):
                yield batch
        finally:
            self._loop.run(asking.cancel())

    async def _ask(self, question: str) -> tuple[Judgement, bool]:
        """The judgement, and whether the endpoint works."""
        import openai

        try:
            async with asyncio.timeout(self._limit_s()):
                raw = await self._client.chat.completions.with_raw_response.create(**self._request(question))
            return judgement_of(self._without_key(raw.text), raw.retries_taken + 1), True
        except (openai.APITimeoutError, TimeoutError):
            return self._failure("timeout", f"no answer within {self._timeout_s:g} s"), False
        except openai.APIStatusError as error:
            return self._failure("error", error.message), error.status_code in _OF_ONE_QUESTION
        except openai.OpenAIError as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            return self._failure("error", f"{error}{cause}"), False

    def _request(self, question: str) -> dict[str, Any]:
        config = self._config
        sampling = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        return {
            "model": config.model,
            "messages": [{"role": "user", "content": question}],
            "extra_body": config.extra_body,
            **{name: value for name, value in sampling.items() if value is not None},
        }

    def _limit_s(self) -> float:
        """Of a question with all its repetitions: the package's time-out starts anew with every byte."""
        turn_s = self._config.concurrency * self._pace.interval_s
        return (self._config.retries + 1) * (self._timeout_s + LONGEST_PAUSE_S + turn_s)

    def _failure(self, status: str, text: str) -> Judgement:
        return failure(status, self._without_key(text))

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _Asking:
    """Questions under way: tasks that take the next question each, until none is left.

    ask: question -> (judgement, whether the endpoint works: false for what would befall any question).
    """

    def __init__(
        self,
        ask: Callable[[str], Coroutine[Any, Any, tuple[Judgement, bool]]],
        questions: Sequence[str],
        stopping: Callable[[], bool],
    ) -> None:
        self._ask, self._stopping = ask, stopping
        self._remaining = iter(enumerate(questions))
        self._answers: asyncio.Queue[tuple[int, Judgement] | None] = asyncio.Queue()  # None: no more come
        self._tasks: list[asyncio.Task[None]] = []
        self._failures = 0

    async def start(self, concurrency: int) -> None:
        working = [asyncio.create_task(self._work()) for _ in range(concurrency)]
        self._tasks = [*working, asyncio.create_task(self._end(working))]

    async def _end(self, working: "list[asyncio.Task[None]]") -> None:
        await asyncio.wait(working)
        self._answers.put_nowait(None)

    async def _work(self) -> None:
        for index, question in self._remaining:  # shared by all tasks
            if self._failures >= MAX_FAILURES_IN_A_ROW:
                text = f"judge: not asked, since {self._failures} requests in a row failed"
                self._answers.put_nowait((index, Judgement("error", error=text)))
                continue
            judgement, works = await self._ask(question)
            self._failures = 0 if works else self._failures + 1
            self._answers.put_nowait((index, judgement))
            if self._stopping():
                return

    async def batch(self) -> list[tuple[int, Judgement]]:
        """What has come in the second after the first to come; empty when all is done."""
        batch: list[tuple[int, Judgement]] = []
        try:
            async with asyncio.timeout(None) as limit:
                while len(batch) < BATCH_ANSWERS:
                    found = await self._answers.get()
                    if found is None:
                        self._answers.put_nowait(None)  # for the call after this one
                        break
                    if not batch:
                        limit.reschedule(asyncio.get_running_loop().time() + BATCH_S)
                    batch.append(found)
        except TimeoutError:
            return batch
        if not batch:
            for task in self._tasks:
                task.result()  # raises what a task raised: a bug of ours
        return batch

    async def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class _Pace:
    """At most so many requests a minute, evenly; None: no bound."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self.interval_s = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0

    async def wait(self, _request: object) -> None:
        now = asyncio.get_running_loop().time()
        turn = max(now, self._next)
        self._next = turn + self.interval_s
        if turn > now:
            await asyncio.sleep(turn - now)


def _key(where: str, config: JudgeConfig) -> str:
    if config.api_key_env is None:
        return ""
    key = os.environ.get(config.api_key_env, "")
    if not key:
        raise UsageError(f"{where}: judge.api_key_env: {config.api_key_env} is not set in the environment")
    return key
