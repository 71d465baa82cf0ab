"""An OpenAI-compatible endpoint on 127.0.0.1 for tests: it answers as it is told, or passes questions on.

It notes every request, so that a test can count what was asked and what was answered.
"""

import json
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

HANG_S = 600.0


@dataclass(frozen=True)
class Reply:
    """A status and a body; or the connection is dropped, or nothing comes."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    drops: bool = False
    hangs: bool = False


@dataclass
class Asked:
    """One request: the text of the question, the request itself, and what was replied."""

    question: str
    request: dict[str, Any]
    headers: dict[str, str]
    reply: Reply


Answer = Callable[[str, dict[str, Any]], Reply]
"""answer(question, request) -> reply; called in a thread of its own."""


def says(text: str | None, **message: Any) -> Reply:
    """A chat completion of `text`."""
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text, **message},
    }
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    shared = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge-1"}
    return Reply(body=json.dumps({**shared, "choices": [choice], "usage": usage}).encode())


def fails(status: int, message: str = "injected", **headers: str) -> Reply:
    """An error as OpenAI words it; headers with `_` for `-`."""
    body = json.dumps({"error": {"message": message}}).encode()
    return Reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass
class Endpoint:
    """What a test sees of a running one."""

    url: str
    asked: list[Asked] = field(default_factory=list)
    answer: Answer = lambda question, request: says("Score: 1")

    def answered(self) -> Counter[str]:
        """How often each question got a successful reply."""
        return Counter(one.question for one in self.asked if one.reply.status == 200 and one.reply.body)

    def forget(self) -> None:
        """Count anew."""
        self.asked.clear()


@contextmanager
def serve(answer: Answer | None = None) -> Iterator[Endpoint]:
    """A running endpoint; every reply is made in a thread of its own."""
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            question = request["messages"][0]["content"]
            reply = endpoint.answer(question, request)
            endpoint.asked.append(Asked(question, request, dict(self.headers), reply))
            if reply.hangs:
                released.wait(HANG_S)
            if reply.hangs or reply.drops:
                self.close_connection = True
                return
            self.send_response(reply.status)
            for name, value in {"content-type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that was killed or gave up is what these tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1")
    if answer is not None:
        endpoint.answer = answer
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        released.set()
        server.shutdown()
        server.server_close()


def passes_on(url: str) -> Answer:
    """Ask another endpoint."""

    def answer(question: str, request: dict[str, Any]) -> Reply:
        wanted = urllib.request.Request(
            f"{url}/chat/completions", json.dumps(request).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(wanted) as found:
            return Reply(found.status, found.read())

    return answer


def now_and_then(answer: Answer, share: float, seed: int = 0, retry_after: str = "1") -> Answer:
    """`share` of the requests fail, in four ways in turn, before they are passed on."""
    random, lock = Random(seed), threading.Lock()
    failures = [fails(500), fails(429, Retry_After=retry_after), Reply(drops=True), Reply(hangs=True)]
    count = 0

    def flaky(question: str, request: dict[str, Any]) -> Reply:
        nonlocal count
        with lock:
            bad = random.random() < share
            count += bad
            kind = count % len(failures)
        return failures[kind] if bad else answer(question, request)

    return flaky
