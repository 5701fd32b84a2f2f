"""Download of one published file, resumable and checked against its hash.

Not `hf_hub_download`: since huggingface_hub 1.x it begins every interrupted file anew (its temporary files
are unique to a call), which for a shard of five gigabytes behind a home router is no option. Session,
headers, proxies, offline switch and error classes are huggingface_hub's.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import filelock
import huggingface_hub.utils
from huggingface_hub import constants, errors

from p2pinfer.errors import CheckpointError

from .parallel import Count

_hub_utils: Any = huggingface_hub.utils  # neither exported to type checkers nor typed in full

logger = logging.getLogger(__name__)

# The HTTP library under huggingface_hub changed its name once; its base error is found where it is used.
TransportError: type[Exception] = cast("Any", errors).HTTPError
Pause = Callable[[float], None]

_PIECE_BYTES = 1 << 20
_FRUITLESS_ATTEMPTS = 10
_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class Published:
    """A file as the hub lists it."""

    name: str
    size: int
    sha256: str | None = None  # of files in large file storage
    git_sha1: str | None = None  # of the others, with git's header

    def digest(self) -> Any:
        """A hash to be fed the content."""
        if self.sha256 is not None:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)

    def is_matched_by(self, digest: Any) -> bool:
        """True if that hash is the published one; a file without any passes."""
        expected = self.sha256 or self.git_sha1
        return expected is None or digest.hexdigest() == expected


def download(published: Published, url: str, folder: Path, *, count: Count, pause: Pause) -> None:
    """Bring the file into `folder`, where it appears once it is whole and right.

    What was received stays in `<name>.part` when this fails, and the next call goes on from there. Processes
    that want the same file wait for each other.

    Args:
        count: Told every number of bytes; may raise to stop.
        pause: Waits so many seconds before another attempt.

    Raises:
        CheckpointError: The content is not what was published; it is gone.
        OSError: The disk or the hub refused. (huggingface_hub's HTTP errors are OSErrors.)
        TransportError: The connection failed again and again.
    """
    path, part = folder / published.name, folder / f"{published.name}.part"
    with _alone(folder / f"{published.name}.lock", count):
        if path.exists():  # somebody else brought it meanwhile
            count(published.size)
            return
        with part.open("ab+") as file:
            receiving = _Receiving(published, url, file, count)
            resumed = receiving.resume()
            _persist(receiving, pause)
            if resumed and not published.is_matched_by(receiving.digest):
                # What an earlier run left was damaged, by a crash, say; nothing is the hub's fault yet.
                logger.info("the partial download of %s is damaged; downloading it again", published.name)
                receiving.restart()
                _persist(receiving, pause)
        if not published.is_matched_by(receiving.digest):
            part.unlink()
            raise CheckpointError(
                f"{published.name} does not have the hash that is published for {url}; "
                f"it was removed, try again"
            )
        part.replace(path)


def _persist(receiving: _Receiving, pause: Pause) -> None:
    """Receive until the file is whole, giving up after many attempts in a row that brought nothing."""
    fruitless = 0
    while not receiving.is_whole:
        before = receiving.size
        try:
            receiving.receive()
        except TransportError as exc:
            fruitless = 0 if receiving.size > before else fruitless + 1
            if fruitless >= _FRUITLESS_ATTEMPTS or not _is_passing(exc):
                raise
            logger.debug("retry.download file=%s error=%s", receiving.published.name, exc)
            pause(_PAUSE_S)


def _is_passing(exc: Exception) -> bool:
    """True if the same request may well succeed a second later."""
    if isinstance(exc, errors.HfHubHTTPError):
        status = exc.response.status_code
        return status >= 500 or status in (408, 429)
    return True


class _Receiving:
    """A file as far as it came."""

    def __init__(self, published: Published, url: str, file: BinaryIO, count: Count) -> None:
        self.published = published
        self.digest = published.digest()
        self.size = 0
        self._url, self._file, self._count = url, file, count

    @property
    def is_whole(self) -> bool:
        return self.size == self.published.size

    def resume(self) -> bool:
        """Take in what an earlier attempt left in the file; whether that was anything."""
        self._file.seek(0)
        while piece := self._file.read(_PIECE_BYTES):
            self._take(piece)
        if self.size > self.published.size:
            self.restart()
        return self.size > 0

    def receive(self) -> None:
        """Ask for the rest and take in what comes."""
        self._count(0)
        headers = {
            **_hub_utils.build_hf_headers(),
            "Accept-Encoding": "identity",
            "Range": f"bytes={self.size}-",
        }
        session: Any = huggingface_hub.get_session()
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with session.stream("GET", self._url, headers=headers, timeout=timeout) as response:
            if response.status_code == 416:
                raise CheckpointError(f"{self._url} ends before the {self.published.size} bytes published")
            _hub_utils.hf_raise_for_status(response)
            if response.status_code != 206:  # the server knows no ranges
                self.restart()
            for (
                piece
            ) in response.iter_raw():  # as it comes: what waits in a buffer is lost with the connection
                self._file.write(piece)
                self._take(piece)
                if self.size > self.published.size:
                    raise CheckpointError(
                        f"{self._url} sends more than the {self.published.size} bytes published"
                    )

    def _take(self, piece: bytes) -> None:
        self.digest.update(piece)
        self.size += len(piece)
        self._count(len(piece))

    def restart(self) -> None:
        """Forget what has come."""
        self._count(-self.size)
        self._file.truncate(0)
        self.digest, self.size = self.published.digest(), 0


@contextlib.contextmanager
def _alone(path: Path, count: Count) -> Generator[None]:
    lock = filelock.FileLock(path)
    while True:
        count(0)
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(timeout=0.2)
            break
    try:
        yield
    finally:
        lock.release()
