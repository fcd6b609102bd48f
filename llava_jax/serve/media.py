"""The pictures that requests name, read from nowhere but where the operator allows; a fault is one line for the client.

Such a line has no path, no address and no URL in it.
"""

from __future__ import annotations

import io
import ipaddress
import os
import queue
import re
import socket
import stat
import threading
import urllib.error
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from llava_jax.errors import reason_of
from llava_jax.inputs.fetch import Budget, Unacceptable, download
from llava_jax.inputs.image import open_picture, upright
from llava_jax.inputs.sources import data_uri_content, file_url_path, scheme_of

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # each decoder more is one more to be attacked
MAX_BYTES = 32 << 20  # of a picture's file; of a fetch, with its headers and redirections
MAX_PIXELS = 1 << 26  # 8192 x 8192, 256 MiB while it is decoded
MAX_SECONDS = 10.0  # to fetch and to decode one picture
PORTS = (80, 443)

_JPEG_BLOCK = 512  # bytes between looks at the clock: they hold 30 scans, each a pass over all pixels
_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")  # without IPv4 in other clothes (mapped, NAT64) and all local kinds
_NOT_PUBLIC = [  # beside what `is_global` knows, in every version of Python
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",  # IETF protocols
        "192.88.99.0/24",  # 6to4 relays
        "2001::/23",  # IETF protocols, Teredo among them
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
]


class MediaError(ValueError):
    """Why a picture is not taken, in one line that a client may see; the cause, if any, is for the log."""


@dataclass(frozen=True)
class MediaPolicy:
    """Where pictures may come from beside data URIs, and how much one may take.

    Attributes:
        allowed_domains: hosts of http(s) URLs, each meant exactly, as vLLM's: example.com is not www.example.com.
        allowed_path: the folder of file:// URLs; links that lead out of it are not followed.
        max_bytes: of a picture's file, packed and unpacked.
        max_pixels: of a picture, before it is decoded.
        max_seconds: to fetch and to decode a picture.

    Raises:
        ValueError: a domain that is no host's name, or a path that is no folder.
    """

    allowed_domains: tuple[str, ...] = ()
    allowed_path: Path | None = None
    max_bytes: int = MAX_BYTES
    max_pixels: int = MAX_PIXELS
    max_seconds: float = MAX_SECONDS

    def __post_init__(self):
        object.__setattr__(self, "allowed_domains", tuple(map(_host_name, self.allowed_domains)))
        if self.allowed_path is not None and not os.path.isdir(self.allowed_path):
            raise ValueError(f"allowed media path {str(self.allowed_path)!r}: no such folder")
        if self.allowed_path is not None and os.open not in os.supports_dir_fd:
            raise ValueError("allowed media path: this operating system cannot open a file beneath a folder safely")


def _host_name(domain: str) -> str:
    """A host's name as it stands in a request."""
    try:
        host = domain.lower().encode("idna").decode()
    except UnicodeError:
        host = ""
    if not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", host):
        raise ValueError(f"allowed media domain {domain!r}: expected a host's name, such as pictures.example.com")
    return host


def _resolve(host: str, port: int) -> list[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclass(frozen=True)
class Network:
    """How hosts are found and connected to; a test has its own."""

    resolve: Callable[[str, int], Sequence[str]] = _resolve
    connect: Callable[[tuple[str, int], float], socket.socket] = socket.create_connection


def load_picture(url: str, policy: MediaPolicy, network: Network = Network()) -> Image.Image:
    """The picture that a URL gives, upright and in RGB as `inputs.image.load_image` gives it; of an animation, the
    first frame.

    Args:
        url: a data URI (base64 or percent-encoded, its media type is not looked at); http or https of an allowed
            host, on port 80 or 443 and without a user's name; file:// within the allowed folder.

    Raises:
        MediaError: a URL that is not allowed or gives no whole PNG, JPEG, WEBP or GIF within the policy's bounds.
    """
    budget = Budget(policy.max_bytes, policy.max_seconds)
    content = _content(url, policy, budget, network)
    if len(content) > policy.max_bytes:
        raise MediaError(_too_large(policy))
    file = _Within(content, budget)
    try:
        with open_picture(file, "the URL's content", policy.max_pixels, FORMATS) as image:
            if isinstance(image, JpegImageFile):
                image.decodermaxblock = _JPEG_BLOCK
            return upright(image).convert("RGB")
    except ValueError as error:
        raise MediaError(_too_late(policy) if file.late else str(error)) from error


class _Within(io.BytesIO):
    """A file that is not read from once its time is over."""

    late = False

    def __init__(self, content: bytes, budget: Budget):
        super().__init__(content)
        self._budget = budget

    def read(self, *size: int | None) -> bytes:
        try:
            self._budget.seconds()
        except TimeoutError:
            self.late = True
            raise
        return super().read(*size)


def _too_large(policy: MediaPolicy) -> str:
    return f"the picture has more than {policy.max_bytes} bytes"


def _too_late(policy: MediaPolicy) -> str:
    return f"the picture takes more than {policy.max_seconds:g} seconds"


def _content(url: str, policy: MediaPolicy, budget: Budget, network: Network) -> bytes:
    """A picture's file."""
    scheme = scheme_of(url)
    if scheme == "data":
        return _data(url, policy)
    if scheme == "file" and policy.allowed_path is not None:
        return _file(url, policy.allowed_path, policy.max_bytes)
    if scheme in ("http", "https") and policy.allowed_domains:
        return _fetched(url, policy, budget, network)
    allowed = ["a data URI"]
    if policy.allowed_domains:
        allowed.append("an http(s) URL of an allowed host")
    if policy.allowed_path is not None:
        allowed.append("a file:// URL in the allowed folder")
    raise MediaError(f"the picture's URL is not one that this server takes: {' or '.join(allowed)}")


def _data(uri: str, policy: MediaPolicy) -> bytes:
    if len(uri) > 4 * policy.max_bytes + 1000:  # no encoding takes more
        raise MediaError(_too_large(policy))
    try:
        return data_uri_content(uri)
    except ValueError as error:
        raise MediaError("the picture's data URI is not valid: expected data:image/png;base64,…") from error


# ---- files


def _file(url: str, folder: Path, max_bytes: int) -> bytes:
    """A regular file's content; it is the same error whether it is outside, is not there, or is of another kind."""
    try:
        root, path = Path(folder).resolve(), Path(os.path.realpath(file_url_path(url)))
        descriptor = _open_beneath(root, path.relative_to(root).parts)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("not a regular file")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(max_bytes + 1)
        finally:
            os.close(descriptor)
    except (ValueError, OSError) as error:
        raise MediaError("the picture's file:// URL names no file that this server may read") from error


def _open_beneath(root: Path, parts: Sequence[str]) -> int:
    """A descriptor of root/parts…, of which no part is a link: one that came after the path was resolved is refused."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(parts[-1] if parts else ".", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)


# ---- http(s)


def _fetched(url: str, policy: MediaPolicy, budget: Budget, network: Network) -> bytes:
    try:
        return download(url, budget, partial(_connected, policy.allowed_domains, budget, network))
    except MediaError:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        if 300 <= error.code < 400:
            raise MediaError("the picture's URL is redirected too often, or to no http(s) URL") from error
        raise MediaError(f"the picture could not be fetched: its host answers with status {error.code}") from error
    except Exception as error:  # of many kinds: see `fetch`
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            raise MediaError(_too_late(policy)) from error
        said = f": {reason_of(cause)}" if isinstance(cause, Unacceptable) else ""
        raise MediaError(f"the picture could not be fetched{said}") from error


def _connected(hosts: Sequence[str], budget: Budget, network: Network, host: str, port: int) -> socket.socket:
    """A connection to the very address that was found public: a second look-up might find another one.

    Every connection of a fetch is made here, so a redirection is checked as the URL itself is.
    """
    if host.lower() not in hosts:  # a user's name before it, a zone behind it, a number for it: no host is called so
        raise MediaError("the picture's host is not among those that this server may fetch from")
    if port not in PORTS:
        raise MediaError(f"the picture's URL has a port that is none of {', '.join(map(str, PORTS))}")
    addresses = _looked_up(network.resolve, host, port, budget.seconds())
    if not addresses or not all(map(is_public, addresses)):
        raise MediaError("the picture's host has no public address, or one that is not")
    for address in addresses[:-1]:
        try:
            return _connection(network, address, port, budget)
        except OSError:
            continue
    return _connection(network, addresses[-1], port, budget)


def _connection(network: Network, address: str, port: int, budget: Budget) -> socket.socket:
    connection = network.connect((address, port), budget.seconds())
    connection.settimeout(budget.seconds())  # what follows may take no more than what is left now
    return connection


def _looked_up(resolve, host: str, port: int, seconds: float) -> list[str]:
    """A host's addresses, each once; TimeoutError when resolving takes longer, which then goes on to its own end."""
    found: queue.SimpleQueue = queue.SimpleQueue()

    def look_up():
        try:
            found.put(list(dict.fromkeys(resolve(host, port))))
        except Exception as error:  # gaierror, UnicodeError
            found.put(error)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        addresses = found.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(addresses, Exception):
        raise MediaError("the picture's host cannot be found") from addresses
    return addresses


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet's, of one machine, and no other address in disguise."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and (parsed.scope_id or parsed not in _GLOBAL_IPV6):
        return False
    special = parsed.is_multicast or parsed.is_reserved or any(parsed in network for network in _NOT_PUBLIC)
    return parsed.is_global and not special
