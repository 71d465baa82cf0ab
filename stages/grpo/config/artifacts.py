"""config.artifacts: the artifacts section of pipeline.yaml."""

import re
from typing import Annotated

from pydantic import AfterValidator

from grpo.config.section import Section

_BUCKET = "[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
_FOLDER = "[A-Za-z0-9_][A-Za-z0-9._=-]*"
_ADDRESS = re.compile(f"s3://{_BUCKET}(/{_FOLDER})*")


def mirror_address(value: str) -> str:
    """The address of a folder in a bucket, without a slash at its end. Raises ValueError for any other."""
    address = value.rstrip("/")
    if not _ADDRESS.fullmatch(address):
        raise ValueError(
            "expected s3://bucket or s3://bucket/prefix: a bucket of 3 to 63 small letters, digits, . -;"
            " a prefix of letters, digits, . _ = -"
        )
    return address


class ArtifactsConfig(Section):
    """Where runs are kept beside artifacts/. In no stage's fingerprint: it changes no result."""

    mirror: Annotated[str, AfterValidator(mirror_address)] | None = None
    """An S3 address, `s3://bucket/prefix`: what is committed is copied to a folder of the run's name there,
    in the background (docs/mirror.md). null: it is not."""
