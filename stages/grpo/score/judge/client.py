"""client: questions -> answers of a language model, through an OpenAI-compatible endpoint.

Repeating, growing pauses and Retry-After are those of the `openai` package. The key is in the client alone:
it is taken out of every message.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import quote

from grpo.config import RewardConfig
from grpo.errors import UsageError
from grpo.score.judge.completion import Judgement, failure, judgement_of
from grpo.score.judge.rubric import compiled
from grpo.score.outcome import Key

# What a kill loses: answers wait this long, or for this many, until they are handed on to be committed.
BATCH_S, BATCH_ANSWERS = 1.0, 64
POLL_S = 0.2  # how often it is looked whether to stop: no request is waited for then
# With so many failures in a row the endpoint is down or refuses us all: the rest would only wait in turn.
MAX_FAILURES_IN_A_ROW = 32
LONGEST_PAUSE_S = 120.0  # that the openai package waits when Retry-After asks for it
_OF_ONE_QUESTION = (400, 413, 422)  # statuses that say nothing of the others
_Result = TypeVar("_Result")
_UnderWay = dict[asyncio.Task[Judgement], Key]


class Judge:
    """The endpoint of a reward; connections stay open between calls. Calls come from one thread.

    rubric: its text. Raises UsageError where the `openai` package or the key is missing.
    """

    def __init__(self, reward: RewardConfig, rubric: str) -> None:
        assert reward.judge is not None
        self.rubric = rubric
        place = f"score.rewards: {reward.name}"
        try:
            import openai

            from grpo.score.judge.transport import BoundedClient, CannotConnect
        except ImportError as error:
            how = "pip install 'grpo-stages[judge]'"
            raise UsageError(f"{place}: a judge needs the package openai ({error}); {how}") from None
        self._config = config = reward.judge
        try:
            compiled(config.pattern)
        except ValueError as error:
            raise UsageError(f"{place}: {error}") from None
        self._timeout_s = reward.timeout_s  # of one request
        self._key = os.environ.get(config.api_key_env, "").strip() if config.api_key_env else ""
        if config.api_key_env and not self._key:
            raise UsageError(f"{place}: api_key_env: {config.api_key_env} is not set in the environment")
        if not (self._key.isascii() and self._key.isprintable()):  # an error of httpx would quote it
            raise UsageError(f"{place}: api_key_env: {config.api_key_env} holds what no HTTP header can")
        self._interval_s = 60 / config.requests_per_minute if config.requests_per_minute else 0.0
        self._next_turn = 0.0
        key = self._key or "none"  # the package wants one
        try:
            http_client = BoundedClient(reward.timeout_s, self._take_turn, f"Bearer {key}")
            self._client = openai.AsyncOpenAI(
                base_url=config.url,
                api_key=key,
                timeout=reward.timeout_s,
                max_retries=config.retries,
                http_client=http_client,
            )
        except CannotConnect as error:
            of = "HTTPS_PROXY, SSL_CERT_FILE and the like are taken from the environment"
            raise UsageError(f"{place}: url {config.url} cannot be asked: {error} ({of})") from None
        self._loop = asyncio.Runner()
        self._thread = ThreadPoolExecutor(1)  # begins with the first call that is made in it
        self._failures = 0  # requests in a row that failed as any other would

    def close(self) -> None:
        """End the connections."""
        self._run(self._client.close())
        self._call(self._loop.close)
        self._thread.shutdown()

    def _run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        found: _Result = self._call(self._loop.run, work)
        return found

    def _call(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Call it in this thread; in another where this one is within a loop, as a notebook's always is."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            found: _Result = function(*arguments)
            return found
        return self._thread.submit(function, *arguments).result()

    def ask(
        self, questions: Mapping[Key, str], stopping: Callable[[], bool]
    ) -> Generator[dict[Key, Judgement], None, None]:
        """Yield judgements as they come, some at a time; what fails is one too.

        When stopping() is true it ends at once, and those that are under way are not waited for.
        """
        self._failures = 0
        remaining = iter(questions.items())
        under_way: _UnderWay = {}
        try:
            while batch := self._run(self._batch(remaining, under_way, stopping)):
                yield batch
        finally:
            for task in under_way:
                task.cancel()
            if under_way:
                self._run(asyncio.wait(under_way))

    async def _batch(
        self, remaining: Iterator[tuple[Key, str]], under_way: _UnderWay, stopping: Callable[[], bool]
    ) -> dict[Key, Judgement]:
        """What has come in the second after the first to come; empty when all is done."""
        clock = asyncio.get_running_loop().time
        batch: dict[Key, Judgement] = {}
        end = 0.0
        while len(batch) < BATCH_ANSWERS and not stopping():
            for key, question in islice(remaining, self._config.concurrency - len(under_way)):
                under_way[asyncio.create_task(self._ask(question))] = key
            if not under_way or (batch and clock() >= end):
                break
            left_s = min(end - clock(), POLL_S) if batch else POLL_S
            done, _ = await asyncio.wait(under_way, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if done and not batch:
                end = clock() + BATCH_S
            batch |= {under_way.pop(task): task.result() for task in done}
        return batch

    async def _ask(self, question: str) -> Judgement:
        if self._failures >= MAX_FAILURES_IN_A_ROW:
            return failure("error", f"not asked, since {self._failures} requests in a row failed")
        judgement, works = await self._request(question)
        self._failures = 0 if works else self._failures + 1
        return judgement

    async def _request(self, question: str) -> tuple[Judgement, bool]:
        """The judgement, and whether the endpoint works: false for what would befall any question."""
        import openai

        from grpo.score.judge.transport import CUT

        config = self._config
        sampling = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        request: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
        request["messages"] = [{"role": "user", "content": question}]
        create = self._client.chat.completions.with_raw_response.create
        # Of a question with all its repetitions and the pauses between them.
        turn_s = config.concurrency * self._interval_s
        late = failure("timeout", f"no answer within {self._timeout_s:g} s")
        limit_s = (config.retries + 1) * (self._timeout_s + LONGEST_PAUSE_S + turn_s)
        try:
            async with asyncio.timeout(limit_s):
                raw = await create(model=config.model, extra_body=config.extra_body, **request)
            if cut := raw.http_response.extensions.get(CUT):
                return failure("error", self._without_key(cut)), False
            return self._hidden(judgement_of(self._without_key(raw.text), raw.retries_taken + 1)), True
        except (openai.APITimeoutError, TimeoutError):
            return late, False
        except openai.APIStatusError as error:
            text = error.message
            if error.status_code in range(300, 400):
                target = error.response.headers.get("location", "nowhere")
                text = f"redirected ({error.status_code}) to {target}, which is not followed; name it as url"
            return failure("error", self._without_key(text)), error.status_code in _OF_ONE_QUESTION
        except openai.OpenAIError as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            return failure("error", self._without_key(f"{error}{cause}")), False

    async def _take_turn(self) -> None:
        """Requests begin evenly, repeated ones too."""
        now = asyncio.get_running_loop().time()
        turn = max(now, self._next_turn)
        self._next_turn = turn + self._interval_s
        await asyncio.sleep(turn - now)

    def _without_key(self, text: str) -> str:
        """Without the key, as it is or as a URL has it."""
        for key in {self._key, quote(self._key, safe="")} - {""}:
            text = text.replace(key, "***")
        return text

    def _hidden(self, judgement: Judgement) -> Judgement:
        """Without the key that escapes of JSON had hidden in the body."""
        values = judgement._asdict().items()
        texts: dict[str, Any] = {k: self._without_key(v) for k, v in values if isinstance(v, str)}
        return judgement._replace(**texts)
