"""Where a picture is: a path, a URL, a data URI or bytes in; an open file out, or one error that names the source."""

from __future__ import annotations

import base64
import os
import re
import urllib.parse
import urllib.request
from io import BytesIO
from typing import IO

from llava_jax.errors import reason_of, shortened
from llava_jax.inputs.fetch import fetch


def scheme_of(name: str) -> str:
    """The scheme of a URL or data URI, in small letters; "" for a path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://|(data):", name, re.IGNORECASE)
    return (found[1] or found[2]).lower() if found else ""


def stands_alone(name: str) -> bool:
    """Whether a name means the same in every folder: a URL, a data URI or an absolute path."""
    return bool(scheme_of(name)) or os.path.isabs(name)


def source_name(source) -> str:
    """What an error calls a source: on one line, and not longer than can be read."""
    if isinstance(source, bytes | bytearray):
        return f"image: {len(source)} bytes"
    if not isinstance(source, str | os.PathLike):
        return "image: a PIL image"
    return f"image {shortened(os.fsdecode(source))!r}"


def open_source(source) -> IO[bytes]:
    """What a path, a URL, a data URI or bytes hold, open to be read and sought in.

    URLs are of http, https, file, or an object store that etils knows, such as gs.

    Raises:
        FileNotFoundError: no such file, or one that cannot be read.
        ValueError: a URL that could not be fetched, or a data URI that is none.
    """
    if isinstance(source, bytes | bytearray):
        return BytesIO(source)
    text, name = os.fsdecode(source), source_name(source)
    scheme = scheme_of(text)
    try:
        if scheme in ("http", "https"):
            return BytesIO(fetch(text))
        if scheme == "data":
            return BytesIO(data_uri_content(text))
        if scheme not in ("", "file"):
            return _open_stored(text, scheme)
        path = file_url_path(text) if scheme else os.path.expanduser(text)
        if os.path.isfile(path):
            return open(path, "rb")
    except ValueError as error:
        raise ValueError(f"{name} could not be fetched: {reason_of(error)}") from error
    except OSError as error:
        raise FileNotFoundError(f"{name}: cannot be read ({reason_of(error)})") from error
    raise FileNotFoundError(f"{name}: no such file")


def data_uri_content(uri: str) -> bytes:
    """What a data URI holds (RFC 2397); its media type is left to Pillow, which looks at the bytes."""
    kind, comma, data = uri.partition(",")
    if not comma:
        raise ValueError("a data URI has a comma before its data")
    content = urllib.parse.unquote_to_bytes(data)
    if not kind.rstrip().lower().endswith(";base64"):
        return content
    content = b"".join(content.split()).rstrip(b"=")
    return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)


def file_url_path(url: str) -> str:
    """The path that a file:// URL names."""
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"a file:// URL has three slashes; {shortened(parts.netloc)!r} would be another machine")
    return urllib.request.url2pathname(parts.path)


def _open_stored(url: str, scheme: str) -> IO[bytes]:
    """An object in an object store."""
    from etils import epath

    try:
        return epath.Path(url).open("rb")
    except OSError:
        raise
    except KeyError:
        raise ValueError(f"the scheme {scheme!r} is not known; use http, https, gs, data or a path") from None
    except ImportError as error:
        raise ValueError(f'{reason_of(error)}; for gs://, pip install "llava-jax[gcs]"') from error
    except Exception as error:  # of whichever package the store has
        raise ValueError(reason_of(error)) from error
