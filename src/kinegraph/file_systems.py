"""File systems behind URIs: opening them with fsspec, more attempts after a broken connection, and errors in our words.

Credentials come from the environment or the configuration files of the storage's own tools, never from a URI: one that
holds some is refused. What an error says is built from codes and names, never from the text of a foreign error, which
may quote a request with its signature.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from kinegraph.errors import KinegraphError, Problem, StorageError, UserError, suggest

URI_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
BUCKET_SCHEMES = ("s3", "s3a")
"""Those of the extra [s3]. The first part of such a URI is a bucket."""
READ_ONLY_SCHEMES = ("http", "https")
RETRY_DELAYS_S: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
CONNECTION = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 0}}
PART_ATTEMPTS = 3
"""For one request, such as a part of a large upload. `retry` makes more of whole calls."""
CREDENTIAL_CODES = (
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidToken",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "TokenRefreshRequired",
    "TokenRetrievalError",
)
"""Codes of S3, and errors of botocore by name: importing it takes longer than all of Kinegraph."""
NAME_ERRORS = ("ParamValidationError", "InvalidRegionError", "InvalidBucketName")
TAG_KEYS = ("ETag", "etag", "Content-MD5", "content_md5")
"""Under which fsspec tells what stands for the content of a file: each storage has its own."""
TIME_KEYS = ("LastModified", "Last-Modified", "last_modified", "mtime", "modified", "updated", "created")
"""Under which it tells when a file was changed."""
PERMANENT_ERRORS = (
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    NotImplementedError,
    TypeError,
    ValueError,
)

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Opened:
    """A file system, and where a URI leads on it."""

    file_system: Any
    path: str

    def find_info(self, location: str) -> dict[str, Any] | None:
        """What fsspec knows of a file or folder ("size", "type", ...); None where there is nothing."""
        try:
            info: dict[str, Any] = retry(lambda: self.file_system.info(self.path), location)
            return info
        except FileNotFoundError:
            return None

    def read_start(self, location: str, num_bytes: int) -> bytes:
        """The first bytes of a file, or all where there are fewer. FileNotFoundError where there is none."""
        info = self.find_info(location)
        if info is None or info["type"] == "directory":
            raise FileNotFoundError
        if info["size"] == 0:
            return b""
        if find_scheme(location) in READ_ONLY_SCHEMES:
            return retry(lambda: self._stream(num_bytes), location)
        # Not only as many bytes as there were: a file that is replaced meanwhile would come cut off
        content: bytes = retry(lambda: self.file_system.cat_file(self.path, start=0, end=num_bytes), location)
        return content[:num_bytes]

    def _stream(self, num_bytes: int) -> bytes:
        """Asks for no range, which a web server may not know: it would send the whole file, into memory."""
        content = b""
        with self.file_system.open(self.path, block_size=0, size=1) as file:  # as a stream, of whatever size
            while len(content) < num_bytes and (piece := file.read(num_bytes - len(content))):
                content += piece
        return content

    def read_piece(self, start: int, end: int, size_bytes: int) -> bytes:
        """Bytes of a file of a known size. ConnectionError where others came."""
        piece: bytes = self.file_system.cat_file(self.path, start=start, end=end)
        # A web server may know no ranges: then the whole file comes at once
        if len(piece) != end - start and (start, len(piece)) != (0, size_bytes):
            raise ConnectionError(f"{len(piece)} bytes came instead of {end - start}")
        return piece

    def copy_whole(self, target: str, size_bytes: int | None) -> None:
        """Copy a file to a path of this machine in one go. ConnectionError where its size, if known, is another."""
        self.file_system.get_file(self.path, target)
        if size_bytes not in (None, os.path.getsize(target)):
            raise ConnectionError(f"{os.path.getsize(target)} bytes came instead of {size_bytes}")


def find_scheme(location: str) -> str:
    """s3 for s3://bucket/file."""
    return location.partition("://")[0].lower()


def check_location(location: str) -> None:
    """Refuse a URI of an unknown scheme, or one that holds a password or a token. Raises UserError."""
    if not URI_PATTERN.match(location):
        return
    scheme, parts = find_scheme(location), urlsplit(location)
    hint = "Take it out: credentials are read from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)."
    if "@" in parts.netloc:
        shown = f"{scheme}://...@{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise UserError(Problem(shown, "a name or a password in a URI", "a URI without credentials", hint))
    if scheme in READ_ONLY_SCHEMES and parts.query:
        shown = f"{scheme}://{parts.netloc}{parts.path}?..."
        hint = "A signed URI does not last and would stand in records: load the file first, and give its path."
        raise UserError(Problem(shown, "a URI with a query", "a URI without one", hint))
    from fsspec import available_protocols

    known = sorted(available_protocols())
    if scheme not in known:
        hint = suggest(scheme, known) or "Most often it is s3://bucket/folder/file."
        raise UserError(Problem(location, f"the unknown scheme {scheme}://", "s3:// or a path", hint))


def open_location(location: str) -> Opened:
    """The file system of a URI. Raises UserError for one that is refused, or where a package is missing."""
    check_location(location)
    # Another process has other connections, and other variables mean other credentials
    variables = tuple(sorted(item for item in os.environ.items() if item[0].startswith(("AWS_", "FSSPEC_"))))
    file_system = _open_file_system(find_scheme(location), os.getpid(), variables)
    return Opened(file_system, file_system._strip_protocol(location))


@functools.lru_cache(maxsize=8)
def _open_file_system(scheme: str, process_id: int, variables: tuple[tuple[str, str], ...]) -> Any:
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme in BUCKET_SCHEMES:
        options |= {"config_kwargs": CONNECTION, "max_concurrency": 4}  # each holds 50 MB of a large file
    try:
        file_system = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        hint = f"Install what fsspec needs for {scheme}://."
        if scheme in BUCKET_SCHEMES:
            hint = "Run: pip install 'kinegraph[s3]'"
        got = f"no package for {scheme}:// ({error.name or 'an import failed'})"
        raise UserError(Problem(f"{scheme}://", got, "a file system for it", hint)) from None
    if scheme in BUCKET_SCHEMES:
        file_system.retries = PART_ATTEMPTS
    return file_system


def find_modified_s(info: dict[str, Any]) -> float:
    """When a file was changed, from what fsspec knows of it: seconds since 1970; 0 where it does not know."""
    value = _find_first(info, TIME_KEYS)
    if isinstance(value, str):
        value = _parse_time(value)
    return value.timestamp() if hasattr(value, "timestamp") else float(value) if isinstance(value, int | float) else 0.0


def _parse_time(text: str) -> datetime | None:
    """As in the header of a web server, or ISO 8601; None for any other text."""
    for parse in (parsedate_to_datetime, datetime.fromisoformat):
        try:
            return parse(text)
        except ValueError:
            continue
    return None


def _find_first(info: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((info[key] for key in keys if info.get(key)), None)


def find_info_version(info: dict[str, Any]) -> str:
    """The version of a file, from what fsspec knows of it. See `tells_changes`."""
    tag = _find_first(info, TAG_KEYS)
    if tag:
        return str(tag).strip('"')
    changed = _find_first(info, TIME_KEYS)
    return f"{info['size']}-{changed if isinstance(changed, str) else repr(find_modified_s(info))}"


def tells_changes(info: dict[str, Any]) -> bool:
    """Whether the version changes with the content. Some web servers tell the size alone, or not even that."""
    return _find_first(info, (*TAG_KEYS, *TIME_KEYS)) is not None


def retry(call: Callable[[], Answer], location: str, delays_s: tuple[float, ...] | None = None) -> Answer:
    """The answer of a call to a file system, with more attempts after a broken connection.

    FileNotFoundError passes; everything else becomes UserError or StorageError, without the text of the first error.
    """
    delays = list(RETRY_DELAYS_S if delays_s is None else delays_s)
    while True:
        try:
            return call()
        except (KinegraphError, FileNotFoundError):
            raise
        except Exception as error:  # each file system has its own, for which there is no common class
            code = _find_code(error)
            if isinstance(error, PERMANENT_ERRORS) or code in (*CREDENTIAL_CODES, *NAME_ERRORS) or not delays:
                raise _explain(error, code, location) from None
        time.sleep(delays.pop(0))


def _explain(error: Exception, code: str, location: str) -> KinegraphError:
    """Our error for a foreign one: its code or its type, never its text."""
    if isinstance(error, PermissionError) or code in CREDENTIAL_CODES:
        expected, hint = "a location that may be used", ""
        if find_scheme(location) in BUCKET_SCHEMES:
            expected = "credentials that the storage accepts"
            hint = (
                "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN if they are temporary) to a "
                "key that may use this location, or AWS_PROFILE; AWS_ENDPOINT_URL if the server is not AWS."
            )
        return UserError(Problem(location, f"access denied ({code})", expected, hint))
    if isinstance(error, PERMANENT_ERRORS) or code in NAME_ERRORS:
        return UserError(Problem(location, f"a refusal of the file system ({code})", "s3://bucket/folder/file"))
    hint = "Check the network, and AWS_ENDPOINT_URL if the server is not AWS. The same command goes on from here."
    return StorageError(Problem(location, f"a failed connection or request ({code})", "an answer", hint))


def _find_code(error: BaseException) -> str:
    """The code that a storage gave, such as SignatureDoesNotMatch, else the name of the error."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict) and "Error" in response:
            code = str(response["Error"].get("Code", ""))
            if re.fullmatch(r"[A-Za-z0-9_.]{1,60}", code):
                return code
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__
