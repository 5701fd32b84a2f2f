"""Errors of the hub, in one line for a person, whatever huggingface_hub raised."""

from __future__ import annotations

import errno
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Final, cast

import huggingface_hub.constants
from huggingface_hub import errors

from p2pinfer.errors import ModelNotFound

from .download import TransportError

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_OURS: Final = (errno.EROFS, errno.EACCES, errno.EPERM)


class NoSuchModel(ModelNotFound):
    """The hub answered, and has no such model or revision: what is remembered of one does not count."""


def is_offline() -> bool:
    """True if the user forbids to ask the hub, by HF_HUB_OFFLINE."""
    return bool(cast("Any", huggingface_hub.constants).HF_HUB_OFFLINE)


def explain(
    exc: Exception, model: str, revision: str | None, endpoint: str, cache_dir: Path
) -> ModelNotFound:
    """The error to raise: what happened, to which model, and what to do.

    Args:
        exc: What huggingface_hub, its HTTP library or the disk raised.
    """
    match exc:
        case errors.GatedRepoError():
            text = f"{model} is gated: accept its terms at {endpoint}/{model}, then set HF_TOKEN"
        case errors.RevisionNotFoundError():
            return NoSuchModel(
                f"{model} has no revision {revision} at the hub; name a branch, a tag or a commit"
            )
        case errors.RepositoryNotFoundError():
            text = f"the hub has no model {model}, or keeps it private; check the name, or set HF_TOKEN"
            return (NoSuchModel if exc.response.status_code == 404 else ModelNotFound)(text)
        case errors.OfflineModeIsEnabled():
            text = f"{model} is not here, and HF_HUB_OFFLINE forbids to fetch it; unset that"
        case errors.HfHubHTTPError():
            text = _explain_status(exc, model, endpoint)
        case ImportError():
            text = (
                f"the hub at {endpoint} cannot be reached for {model}: the proxy that ALL_PROXY or "
                f"HTTPS_PROXY names needs a package that is not installed ({exc}); `pip install socksio`, or "
                f"unset the variable"
            )
        case _ if type(exc).__name__ == "ProxyError":
            text = (
                f"the hub at {endpoint} cannot be reached for {model}: the proxy refuses ({exc}); "
                f"correct or unset HTTPS_PROXY and ALL_PROXY"
            )
        case _ if isinstance(exc, (TransportError, ConnectionError)):
            text = f"the hub at {endpoint} cannot be reached for {model}; connect, or set HF_ENDPOINT"
        case _ if isinstance(exc, OSError) and not isinstance(exc, ValueError):
            text = _explain_disk(exc, model, cache_dir)
        case errors.HFValidationError():
            text = f"there is no folder {model}, and it is no id of the Hugging Face hub (owner/name) either"
        case JSONDecodeError():
            text = (
                f"what answers at {endpoint} is no hub but a page to read: if this network wants a login, "
                f"log in with a browser and start again; otherwise check HF_ENDPOINT"
            )
        case _:
            text = f"what answers at {endpoint} is no hub ({exc}); check the connection and HF_ENDPOINT"
    return ModelNotFound(text)


def _explain_status(exc: errors.HfHubHTTPError, model: str, endpoint: str) -> str:
    status: int = exc.response.status_code
    match status:
        case 401:
            return (
                f"the hub at {endpoint} answers 401 when asked for {model}: there is no such model, or it is "
                f"private, or the token is not valid; check the name, and set, renew or unset HF_TOKEN"
            )
        case 403:
            return (
                f"the hub at {endpoint} answers 403 when asked for {model}: it is forbidden to this token or "
                f"address; accept the model's terms at {endpoint}/{model}, or use a token that may read it"
            )
        case 429:
            after = exc.response.headers.get("retry-after", "")
            when = f"in {after} s" if after.isdigit() else "in a few minutes"
            return (
                f"the hub at {endpoint} answers 429 when asked for {model}: too many requests from here; "
                f"try again {when}, or set HF_TOKEN, which allows more"
            )
        case _:
            return f"the hub at {endpoint} answers {status} when asked for {model}; try again later"


def _explain_disk(exc: OSError, model: str, cache_dir: Path) -> str:
    if exc.errno in _FULL:
        return (
            f"there is no room left for {model} in {cache_dir}; "
            f"make some and start again: what has come is kept"
        )
    if exc.errno in _NOT_OURS:
        return (
            f"{cache_dir} cannot be written ({exc.strerror}), and not all of {model} is there; "
            f"choose another cache directory, with --set cache_dir=DIR"
        )
    return f"{model} cannot be stored in {cache_dir}: {exc}"
