"""A judge's endpoint that drips, never ends, unpacks to gigabytes, redirects, or echoes the key."""

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from tests.score.judge.endpoint import Reply, says, serve
from tests.score.judge.test_judge import KEY, ask, judge_of

from grpo.score.judge.completion import Judgement

Talk = Callable[[socket.socket], None]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
DEADLINE_S = 1.0


class Raw:
    """What `judge_of` needs of an endpoint, and how many bytes it could send."""

    def __init__(self, url: str) -> None:
        self.url, self.connections = url, 0


@contextmanager
def raw(talk: Talk) -> Iterator[Raw]:
    """A socket on 127.0.0.1 that reads a request and then talks as it likes."""
    listener = socket.create_server(("127.0.0.1", 0))
    endpoint = Raw(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(2**20)
            talk(connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                endpoint.connections += 1
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield endpoint
    finally:
        listener.close()


def again_and_again(head: bytes, piece: bytes, pause_s: float = 0.0) -> Talk:
    def talk(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)
            time.sleep(pause_s)

    return talk


def once(data: bytes) -> Talk:
    return lambda connection: connection.sendall(data)


CHUNK = b"10000\r\n" + b" " * 2**16 + b"\r\n"
ENDLESS: dict[str, tuple[Talk, str, str]] = {
    "drips a body": (again_and_again(HEAD + b"\r\n", b" ", 0.05), "timeout", "no answer within 1 s"),
    "drips headers": (again_and_again(HEAD, b"x: y\r\n", 0.05), "timeout", "no answer within 1 s"),
    "drips a status": (again_and_again(b"HTTP/1.1 2", b"", 0.05), "timeout", "no answer within 1 s"),
    "continues for ever": (
        again_and_again(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01),
        "timeout",
        "no answer within 1 s",
    ),
    "endless chunks": (
        again_and_again(HEAD + b"transfer-encoding: chunked\r\n\r\n", CHUNK),
        "error",
        "a body of more than 4 MiB",
    ),
    "300 MB": (
        again_and_again(HEAD + b"content-length: 300000000\r\n\r\n", b" " * 2**16),
        "error",
        "a body of more than 4 MiB",
    ),
    "endless headers": (again_and_again(HEAD, b"x: " + b"y" * 2**14 + b"\r\n"), "error", ""),
    "an endless error": (
        again_and_again(b"HTTP/1.1 400 Bad\r\n\r\n", b"x" * 2**16),
        "error",
        "Error code: 400",
    ),
    "silence": (lambda connection: time.sleep(60), "timeout", "no answer within 1 s"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_never_ends_is_ended(name: str) -> None:
    talk, status, error = ENDLESS[name]
    started = time.monotonic()
    with raw(talk) as endpoint:
        [found] = ask(judge_of(endpoint, timeout_s=DEADLINE_S, retries=0), "a")  # type: ignore[arg-type]
    assert (found.status, found.answer) == (status, None)
    assert str(found.error).startswith(error)
    assert time.monotonic() - started < 8


BROKEN = {
    "nothing": b"",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a header without a colon": HEAD + b"no colon\r\n\r\n{}",
    "a header that is not ASCII": HEAD + b"x: \xff\xfe\r\ncontent-length: 2\r\n\r\n{}",
    "an encoding that is not ASCII": HEAD + b"content-encoding: \xff\r\ncontent-length: 2\r\n\r\n{}",
    "a charset that is none": HEAD.replace(b"json", b"json; charset=\xffq") + b"content-length: 2\r\n\r\n{}",
    "two lengths": HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "a negative length": HEAD + b"content-length: -1\r\n\r\n{}",
    "a body that is cut": HEAD + b"content-length: 100\r\n\r\n{}",
    "a chunk that is none": HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "a status that is none": b"HTTP/1.1 999999 OK\r\n\r\n",
    "status 000": b"HTTP/1.1 000 OK\r\ncontent-length: 0\r\n\r\n",
    "a switch of protocol": b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_answer_is_an_error(name: str) -> None:
    with raw(once(BROKEN[name])) as endpoint:
        [found] = ask(judge_of(endpoint, timeout_s=DEADLINE_S, retries=0), "a")  # type: ignore[arg-type]
    assert found.status == "error", found
    assert found.error


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "x-unknown"])
def test_what_is_packed_is_refused(encoding: str) -> None:
    bomb = gzip.compress(b" " * 2**24)
    reply = Reply(body=bomb, headers={"content-encoding": encoding})
    with serve(lambda question, request: reply) as endpoint:
        [found] = ask(judge_of(endpoint), "a")
        [asked] = endpoint.asked
    assert found == Judgement(
        "error", error=f"a body in content-encoding {encoding}, which was not asked for"
    )
    assert {name.lower(): value for name, value in asked.headers.items()}["accept-encoding"] == "identity"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    with serve() as elsewhere:
        target = f"{elsewhere.url}/chat/completions"
        reply = Reply(status, headers={"location": target})
        with serve(lambda question, request: reply) as endpoint:
            [found] = ask(judge_of(endpoint), "a")
        assert elsewhere.asked == []
        assert len(endpoint.asked) == 1
    assert found == Judgement(
        "error", error=f"redirected ({status}) to {target}, which is not followed; name it as url"
    )


def escaped(text: str) -> str:
    return "".join(f"\\u{ord(c):04x}" for c in text)


ECHOES = {
    "in an error": Reply(401, json.dumps({"error": {"message": f"no {KEY}"}}).encode()),
    "escaped in an error": Reply(401, f'{{"error": {{"message": "no {escaped(KEY)}"}}}}'.encode()),
    "at the cut of an error": Reply(401, f'{{"error": "{"x" * 470}{KEY}"}}'.encode()),
    "in no JSON": Reply(200, b"x" * 190 + KEY.encode()),
    "in an answer": says(f"Score: 1 {KEY}"),
    "escaped in an answer": Reply(200, says("Score: 1 @").body.replace(b"@", escaped(KEY).encode())),
    "as the model": Reply(200, says("Score: 1").body.replace(b"judge-1", escaped(KEY).encode())),
    "in a refusal": says(None, refusal=f"{KEY} is refused"),
    "in a redirect": Reply(302, headers={"location": f"http://127.0.0.1:1/?key={KEY}"}),
    "in a content-encoding": Reply(200, b"x", headers={"content-encoding": KEY}),
}


@pytest.mark.parametrize("name", ECHOES)
def test_a_key_that_is_echoed_is_not_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")  # as a file gives it
    with serve(lambda question, request: ECHOES[name]) as endpoint:
        [found] = ask(judge_of(endpoint, api_key_env="JUDGE_KEY", retries=0), "a")
    assert endpoint.asked[0].headers["authorization"] == f"Bearer {KEY}"
    assert KEY[:12] not in repr(found)
    assert "***" in repr(found) or name == "at the cut of an error"
