"""What fsspec is asked about a URL: its file system, and what the storage says of each file."""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scgpt.errors import ConfigError, SourceError

REMOTE_BLOCK_BYTES = 1 << 20   # a request of a remote file; BlockCache holds 32 of them
CENSUS = "s3://cellxgene-census-public-us-west-2/"   # open to all, without credentials, in its own region
# What a storage says of an object, the surest first: which content or upload it is, or else only when it was written.
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "Content-MD5", "content_md5", "generation", "VersionId")
_TIME_KEYS = ("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "modified", "created")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a source."""

    name: str     # below the folder, with `/`; of a file: its own name
    bytes: int
    state: str    # changes when the file is written: time of modification, ETag or what else the storage says
    etag: str = ""   # its ETag or version, where a storage keeps one


def entry_of(name: str, about: Mapping[str, Any]) -> Entry:
    """From what fsspec's `info` says; SourceError where that lacks the size."""
    if about.get("size") is None:
        raise SourceError("the server does not tell the size of the file", where=name, fix="download it first")
    etag, time = (next((str(about[key]) for key in keys if about.get(key)), "") for keys in (_VERSION_KEYS, _TIME_KEYS))
    return Entry(name, int(about["size"]), etag or time, etag)


def file_system(url: str, *, shown: str) -> tuple[Any, str]:
    """The file system of a URL with nothing remembered of earlier looks, and the path in it.

    Args:
        url: whole, secrets included.
        shown: the same for people, of a ConfigError where fsspec knows no such storage.
    """
    from fsspec import available_protocols
    from fsspec.core import url_to_fs

    scheme = url.partition("://")[0]
    if scheme not in available_protocols():
        raise ConfigError(f"no storage is known as {scheme}://", where=shown,
                          fix="give a path, or a URL that fsspec opens, such as s3://BUCKET/NAME")
    options = {"anon": True, "client_kwargs": {"region_name": "us-west-2"}} if url.startswith(CENSUS) else {}
    system, path = url_to_fs(url, **options)
    system.invalidate_cache()
    return system, path
