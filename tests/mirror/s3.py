"""An S3 server in this process (moto), with an ear for each request, so that something may happen in it."""

import re
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.backends import get_backend
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.local import LocalProxy
from werkzeug.serving import WSGIRequestHandler, make_server


def _absent(proxy: LocalProxy[Any], name: str) -> Any:
    raise AttributeError(name)


# As it opens, vLLM asks all that any module holds for an attribute. Flask's `request` of no request would
# raise RuntimeError then, and end vLLM.
vars(LocalProxy)["__getattr__"].fallback = _absent

ETAG = re.compile(rb'(<ETag>(?:"|&quot;))([0-9a-f]{32})')


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: object) -> None:
        """Nothing: `seen` has it."""


class Server:
    """seen: (method, key) of each request; before, after: called with them, around it.

    Where they return a status, that is the answer: nothing was done, or what was done is not said. ignores:
    headers of conditions that this store does not know. encrypts: etags are no digests of the content, as
    where S3 encrypts with a key of the user's.
    """

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self.reset()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.before: Callable[[str, str], int | None] = lambda method, key: None
        self.after: Callable[[str, str], int | None] = lambda method, key: None
        self.ignores: set[str] = set()
        self.encrypts = False

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        method, key = environ["REQUEST_METHOD"], environ["PATH_INFO"].lstrip("/").partition("/")[2]
        self.seen.append((method, key))
        if status := self.before(method, key):
            start(f"{status} Refused", [("Content-Length", "0")])
            return [b""]
        if self.encrypts and "HTTP_IF_MATCH" in environ:
            environ["HTTP_IF_MATCH"] = environ["HTTP_IF_MATCH"].replace('"e', '"')
        for name in self.ignores:
            environ.pop(f"HTTP_{name.upper().replace('-', '_')}", None)
        said: list[Any] = []
        answer = [*self._app(environ, lambda *status, **options: said.append(status))]
        if status := self.after(method, key):
            start(f"{status} Lost", [("Content-Length", "0")])
            return [b""]
        status, headers = said[0]
        if self.encrypts:
            answer = [ETAG.sub(rb"\g<1>e\g<2>", piece) for piece in answer]
            headers = [
                (name, f'"e{value[1:]}' if name.lower() == "etag" else value) for name, value in headers
            ]
            sizes = ("Content-Length", str(sum(map(len, answer))))
            headers = [
                sizes if name.lower() == "content-length" else (name, value) for name, value in headers
            ]
        start(status, headers)
        return answer


class Bucket:
    """The objects of a bucket, beside the way through the server."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._backend = get_backend("s3")["123456789012"]["aws"]
        self._backend.create_bucket(name, "us-east-1")

    def names(self, prefix: str = "") -> list[str]:
        held = self._backend.get_bucket(self.name).keys
        return sorted(key for key in held if key.startswith(prefix))

    def read(self, key: str) -> bytes:
        found = self._backend.get_object(self.name, key)
        assert found is not None, key
        return bytes(found.value)

    def write(self, key: str, content: bytes) -> None:
        self._backend.put_object(self.name, key, content)

    def remove(self, key: str) -> None:
        self._backend.delete_object(self.name, key)

    def content(self, prefix: str = "") -> dict[str, bytes]:
        return {key: self.read(key) for key in self.names(prefix)}
