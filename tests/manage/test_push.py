"""Uploading to a hub: a server on this machine that takes what the library sends."""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from grpo.errors import ResourceError, UsageError
from grpo.manage.export import check_repository, push


@dataclass
class Hub:
    """What was asked of the server: repositories made, and files by name."""

    made: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            found.paths.append(self.path)
            self.answer(reply_to(found, self.path, body))

        def answer(self, document: dict[str, Any]) -> None:
            content = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield found
    server.shutdown()
    server.server_close()


def reply_to(hub: Hub, path: str, body: str) -> dict[str, Any]:
    if path == "/api/repos/create":
        hub.made.append(json.loads(body))
        return {"url": "https://huggingface.co/me/policy", "id": "me/policy"}
    if "/preupload/" in path:
        asked = json.loads(body)["files"]
        return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
    if "/commit/" in path:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"commitUrl": "https://huggingface.co/me/policy/commit/1", "commitOid": "1"}
    return {"errors": [], "warnings": []}  # of a model card's front matter


def test_a_folder_is_uploaded_to_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\n---\n")
    push(tmp_path, "me/policy")
    [made] = hub.made
    assert (made["name"], made["organization"]) == ("policy", "me")
    assert made.get("visibility") == "private" or made.get("private") is True  # by the library's release
    assert hub.files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_hub_that_cannot_be_reached_leaves_the_folder(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ResourceError) as caught:
        push(tmp_path, "me/policy")
    assert str(caught.value).startswith("--push me/policy: ")
    way = f"; the folder is complete: `hf upload me/policy {tmp_path}` tries again"
    assert str(caught.value).endswith(way)
    assert hub.paths == []
    assert (tmp_path / "config.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["policy", "a/b/c", "me/", "me/po licy", "me/..", "https://hub/me/policy"])
def test_a_name_that_is_no_repository_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"^--push "):
        check_repository(name)
