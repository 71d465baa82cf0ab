"""push: an exported folder -> a repository on the hub; only where the user names one."""

from pathlib import Path
from typing import Any

from grpo.errors import ResourceError, UsageError, first_line


def check_repository(name: str) -> None:
    """Raise UsageError (exit 2) unless `name` can be a repository of somebody's, first of all."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"--push {name}: {first_line(error)}") from None
    if name.count("/") != 1:
        raise UsageError(f"--push {name}: expected owner/name")


def push(folder: Path, name: str) -> str:
    """Upload `folder` to the repository `name`, made private where it is not there; returns its address.

    Raises ResourceError (exit 7) where the hub refuses or cannot be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # What a connection raises is the HTTP client's own error: httpx or httpx2, by the release of the library.
    client_error: Any = HfHubHTTPError.__mro__[1]

    api = HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="grpo export")
    except (client_error, OSError, ValueError) as error:
        raise ResourceError(
            f"--push {name}: {first_line(error)}; the folder is complete:"
            f" `hf upload {name} {folder}` tries again"
        ) from None
    return str(url)
