"""store: the objects of an S3 bucket, by obstore, which no other file imports.

Objects are written whole, and where it matters on a condition: create() where there is none, replace() where
it is the version that was read. What a store that honours both is asked for, it answers None for.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from grpo.artifacts import files
from grpo.artifacts.faults import operation
from grpo.errors import ResourceError, UsageError, first_line

KEY = "artifacts.mirror"
_ROLES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_METADATA_ENDPOINT",
)
_PIECE_BYTES = 2**23  # of a large object that is written in pieces, and what is read at a time
_MOST_PIECES = 9000  # S3 allows 10,000
_MOST_TRIES = 1000  # the time decides
_SAID = 300  # characters of what the library says: a page of XML may follow


class Found(NamedTuple):
    """An object of a listing; etag: the name that the store has for this version of it."""

    key: str
    bytes: int
    etag: str


class Store:
    """The folder at an address such as s3://bucket/prefix; keys are relative to it.

    patience_s: how long an answer is waited for, and asked for again where the store is too busy.
    Every method raises ResourceError (exit 7) then, or where the access is denied.
    """

    def __init__(self, address: str, patience_s: float = 60.0) -> None:
        self.address = address
        self._library = _library()
        _require_credentials(address)
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        patience = timedelta(seconds=patience_s)
        backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2}
        retry = {"max_retries": _MOST_TRIES, "backoff": backoff, "retry_timeout": patience}
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        waits = {"timeout": patience, "connect_timeout": timedelta(seconds=5)}
        options: dict[str, Any] = {"client_options": waits}
        if endpoint:
            options["endpoint"] = endpoint
            options["client_options"]["allow_http"] = endpoint.startswith("http://")
        if not os.environ.get("AWS_REGION"):  # the library reads that one alone
            options["region"] = os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        self._objects = self._library.store.S3Store(
            bucket, prefix=prefix or None, retry_config=retry, **options
        )

    def get(self, key: str) -> tuple[bytes, str] | None:
        """A small object and its etag; None: there is none."""
        with self._errors(key):
            try:
                found = self._library.get(self._objects, key)
                return bytes(found.bytes()), found.meta["e_tag"] or ""
            except FileNotFoundError:
                return None

    def read(self, key: str, num_bytes: int) -> Iterator[bytes]:
        """An object in pieces, of about that size. Raises FileNotFoundError where there is none."""
        with self._errors(key):
            if num_bytes <= _PIECE_BYTES:
                yield bytes(self._library.get(self._objects, key).bytes())
                return
            found = self._library.get(self._objects, key, options={"range": (0, _PIECE_BYTES)})
            yield bytes(found.bytes())
            for start in range(_PIECE_BYTES, found.meta["size"], _PIECE_BYTES):
                end = min(start + _PIECE_BYTES, found.meta["size"])
                yield bytes(self._library.get_range(self._objects, key, start=start, end=end))

    def put(self, key: str, chunks: Iterable[bytes], num_bytes: int) -> None:
        """Write an object of that size, whatever is there."""
        with self._writing(key, "put"):
            if num_bytes <= _PIECE_BYTES:
                self._library.put(self._objects, key, b"".join(chunks), use_multipart=False)
                return
            piece = max(_PIECE_BYTES, -(-num_bytes // _MOST_PIECES))
            self._library.put(self._objects, key, iter(chunks), chunk_size=piece, max_concurrency=4)

    def create(self, key: str, content: bytes) -> str | None:
        """Write an object that is not there; its etag. None: one is."""
        with self._writing(key, "create"):
            try:
                done = self._library.put(self._objects, key, content, mode="create", use_multipart=False)
            except (self._library.exceptions.AlreadyExistsError, self._library.exceptions.PreconditionError):
                return None
            return done["e_tag"] or ""

    def replace(self, key: str, content: bytes, etag: str) -> str | None:
        """Write an object in the place of the version `etag`; its etag. None: that is not there."""
        with self._writing(key, "replace"):
            mode = {"e_tag": etag}
            try:
                done = self._library.put(self._objects, key, content, mode=mode, use_multipart=False)
            except (
                self._library.exceptions.PreconditionError,
                self._library.exceptions.AlreadyExistsError,
                FileNotFoundError,
            ):
                return None
            return done["e_tag"] or ""

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        with self._errors(key), files.resource_errors(Path(key)):
            operation("delete", Path(key))
            try:
                self._library.delete(self._objects, key)
            except FileNotFoundError:
                return

    def listing(self, folder: str) -> Iterator[Found]:
        """Every object below a folder."""
        with self._errors(folder):
            for batch in self._library.list(self._objects, prefix=folder):
                for each in batch:
                    yield Found(each["path"], each["size"], each["e_tag"] or "")

    def folders(self) -> list[str]:
        """Names of the folders that are here."""
        with self._errors(""):
            found = self._library.list_with_delimiter(self._objects)
            return [str(path).rsplit("/", 1)[-1] for path in found["common_prefixes"]]

    @contextmanager
    def _writing(self, key: str, kind: str) -> Iterator[None]:
        with self._errors(key), files.resource_errors(Path(key)):
            operation(kind, Path(key))
            try:
                yield
            except FileNotFoundError as error:
                if error.filename is not None:  # of a file that was to be read
                    raise
                raise self._no_bucket() from None

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        kinds = self._library.exceptions
        place = f"{self.address}/{key}"
        try:
            yield
        except (kinds.PermissionDeniedError, kinds.UnauthenticatedError) as error:
            way = "the key in AWS_ACCESS_KEY_ID needs the right to list, read, write and delete there"
            raise ResourceError(f"{place}: access denied ({_said(error)}); {way}") from None
        except kinds.BaseError as error:
            if "404 Not Found" in str(error):  # of a listing; for an object it is a FileNotFoundError
                raise self._no_bucket() from None
            raise ResourceError(f"{place}: the store does not answer as it should: {_said(error)}") from None

    def _no_bucket(self) -> UsageError:
        bucket = self.address.removeprefix("s3://").partition("/")[0]
        return UsageError(f"{self.address}: no bucket {bucket}; make it first, or name another")


def _said(error: BaseException) -> str:
    return first_line(error)[:_SAID]


def _library() -> Any:
    """The package obstore. Raises UsageError (exit 2) where it is not installed."""
    try:
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise UsageError(f"{KEY}: obstore: is not installed; pip install 'grpo-stages[mirror]'") from None
    return obstore


def _require_credentials(address: str) -> None:
    """Raise UsageError (exit 2) without a key or a role: a machine's metadata is never asked unbidden."""
    has_key = os.environ.get("AWS_ACCESS_KEY_ID") and os.environ.get("AWS_SECRET_ACCESS_KEY")
    if not has_key and not any(os.environ.get(name) for name in _ROLES):
        raise UsageError(
            f"{address}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (a profile: `eval"
            ' "$(aws configure export-credentials --format env)"`), or AWS_METADATA_ENDPOINT for the'
            " machine's role"
        )


def check_conditions(store: Store, key: str, content: bytes) -> None:
    """Raise UsageError (exit 2) for a store that writes `key`, which is there, whatever the condition."""
    if store.create(key, content) is not None:
        raise UsageError(_ignores(store, "If-None-Match"))
    if store.replace(key, content, '"0"') is not None:
        raise UsageError(_ignores(store, "If-Match"))


def _ignores(store: Store, header: str) -> str:
    return (
        f"{store.address}: the store ignores {header}, so two commands could write one mirror; take one with"
        " conditional writes, as Amazon S3 has them"
    )
