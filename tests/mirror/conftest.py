"""A bucket for each test, and the environment that leads to it."""

from collections.abc import Iterator
from itertools import count

import pytest
from tests.mirror.s3 import Bucket, Server

_NUMBERS = count()


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def server(shared_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", shared_server.address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    yield shared_server
    shared_server.reset()


@pytest.fixture
def bucket(server: Server) -> Bucket:
    return Bucket(f"runs-{next(_NUMBERS)}")
