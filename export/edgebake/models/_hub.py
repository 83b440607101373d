"""Hub ids: resolved to a commit, from the local cache where possible; telemetry off, credentials never shown."""

from __future__ import annotations

import os
import re
from pathlib import Path

from edgebake.errors import EdgebakeError, HubUnreachable, RecipeError

COMMIT = re.compile(r"[0-9a-f]{40}")
_TEXTS = ("*.json", "*.txt", "*.model", "*.jinja", "README.md")


def quiet() -> None:
    """Telemetry, progress bars and version nags of the Hugging Face libraries off; call before they are imported."""
    for name in (
        "HF_HUB_DISABLE_TELEMETRY",
        "DISABLE_TELEMETRY",
        "DO_NOT_TRACK",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "TQDM_DISABLE",
    ):
        os.environ[name] = "1"


def _unreachable(repo: str, error: BaseException) -> EdgebakeError:
    # The kind of error only: messages of HTTP libraries can carry URLs with credentials.
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return RecipeError(
            f"the hub refuses {repo!r} (HTTP {status}): it does not exist, is private, or is gated",
            where="model.path",
            fix="check the name; for a gated model accept its terms and log in with `hf auth login`; "
            "a folder is given relative to the recipe",
        )
    return HubUnreachable(
        f"{repo!r} is neither a folder beside the recipe nor in the local hub cache, "
        f"and the hub cannot be reached ({type(error).__name__})",
        where="model.path",
        fix=f"go online once, or copy the model with `hf download {repo}`, or give a folder relative to the recipe",
    )


def commit(repo: str, revision: str | None) -> str:
    """The commit that ``revision`` (default: the main branch) of ``repo`` means.

    A commit stays itself, a branch or tag is read from the local cache, else asked of the hub. HubUnreachable offline.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    quiet()
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        cached = snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=["config.json"])
    except OSError:  # not in the cache
        cached = None
    if cached is not None and COMMIT.fullmatch(Path(cached).name):
        return Path(cached).name
    try:
        found = HfApi().model_info(repo, revision=revision, timeout=20).sha
    except (OSError, HTTPError) as error:
        raise _unreachable(repo, error) from None
    return str(found)


def snapshot(repo: str, at: str, *, weights: bool, pickles: bool, code: bool) -> Path:
    """The local folder of ``repo`` at commit ``at``, downloaded when it is not cached."""
    quiet()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    patterns = [*_TEXTS]
    patterns += ["*.safetensors"] if weights else []
    patterns += ["*.bin"] if weights and pickles else []
    patterns += ["*.py"] if code else []
    try:
        return Path(snapshot_download(repo, revision=at, allow_patterns=patterns))
    except (OSError, HTTPError) as error:
        raise _unreachable(repo, error) from None
