"""http(s) URLs in, bytes out, within bounds of size and time; whatever goes wrong is one line."""

from __future__ import annotations

import http.client
import io
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable
from functools import partial

from llava_jax.errors import reason_of
from llava_jax.inputs.text import check_text

MAX_BYTES = 128 << 20  # that one fetch may receive, headers and redirections included, and its content unpacked
MAX_SECONDS = 60.0  # for all of one fetch
USER_AGENT = "Mozilla/5.0 (compatible; llava_jax)"  # some hosts turn urllib's own away

_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # of zlib, for each Content-Encoding that is undone


def fetch(url: str) -> bytes:
    """What an http(s) URL gives, by way of the proxies that the environment names.

    Non-ASCII characters and spaces are encoded, ten redirections to http(s) followed, gzip and deflate undone.

    Raises:
        ValueError: why it could not be fetched, on one line.
    """
    try:
        return download(url, Budget(MAX_BYTES, MAX_SECONDS))
    except urllib.error.HTTPError as error:
        error.close()
        raise ValueError(reason_of(error)) from None
    except Exception as error:  # of many kinds: HTTPException, UnicodeError, OverflowError, zlib.error, SSLError …
        inner = error.reason if isinstance(error, urllib.error.URLError) else error
        late = isinstance(inner, TimeoutError)
        raise ValueError(f"it took more than {MAX_SECONDS:g} seconds" if late else reason_of(inner)) from error


class Unacceptable(OSError):  # http.client would take a ValueError for its own
    """A reply that is refused for what it is; it says why."""


class Budget:
    """What is left of the bytes and seconds that something may take."""

    def __init__(self, max_bytes: int, max_seconds: float):
        self.max_bytes, self._bytes = max_bytes, max_bytes
        self._deadline = time.monotonic() + max_seconds

    def seconds(self) -> float:
        """Those that are left; TimeoutError if none are."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def spend(self, count: int) -> None:
        self._bytes -= count
        if self._bytes < 0:
            raise Unacceptable(f"it sends more than {self.max_bytes} bytes")


Connect = Callable[[str, int], socket.socket]


def download(url: str, budget: Budget, connect: Connect | None = None) -> bytes:
    """What an http(s) URL gives, as `fetch`, within a budget.

    Args:
        connect: (host, port) → a connected socket. It makes every connection, those of redirections too, and sees the
            very name that a certificate must be for; no proxy is asked then. None connects as urllib does.

    Raises:
        TimeoutError, Unacceptable, ValueError, and what urllib, http.client and `connect` raise.
    """
    opener = urllib.request.OpenerDirector()  # build_opener's would open file:// and ftp:// too
    if connect is None:
        opener.add_handler(urllib.request.ProxyHandler())
    for handler in (
        urllib.request.UnknownHandler(),
        _Handler(budget, connect),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirections(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(_encoded(url), headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"})
    with opener.open(request) as reply:
        if (reply.length or 0) > budget.max_bytes:
            raise Unacceptable(f"it has {reply.length} bytes, more than {budget.max_bytes}")
        return _unpacked(reply.read(), reply.headers.get("Content-Encoding", ""), budget.max_bytes)


def _encoded(url: str) -> str:
    """A URL as it is sent: a host outside ASCII by IDNA, the rest percent-encoded where it is not yet."""
    check_text(url, "its URL")
    if re.search(r"[\x00-\x1f\x7f]", url):
        raise ValueError("its URL has a control character")
    parts = urllib.parse.urlsplit(url.strip())
    netloc, port = parts.netloc, parts.port  # which raises for one out of range; a resolver would not
    if not netloc.isascii():
        netloc = (parts.hostname or "").encode("idna").decode() + ("" if port is None else f":{port}")

    def quoted(part: str) -> str:
        return urllib.parse.quote(re.sub("%(?![0-9A-Fa-f]{2})", "%25", part), safe="!#$%&'()*+,/:;=?@[]~")

    return urllib.parse.urlunsplit((parts.scheme, netloc, quoted(parts.path), quoted(parts.query), ""))


def _unpacked(body: bytes, coding: str, max_bytes: int) -> bytes:
    """A reply's content without its Content-Encoding."""
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return body
    if coding not in _WINDOW_BITS:
        raise Unacceptable(f"its Content-Encoding {coding!r} is none of {', '.join(_WINDOW_BITS)}")
    zlib_header = len(body) > 1 and body[0] & 15 == 8 and int.from_bytes(body[:2], "big") % 31 == 0  # RFC 1950, 2.2
    raw = coding == "deflate" and not zlib_header  # as some hosts send it
    decoder = zlib.decompressobj(-15 if raw else _WINDOW_BITS[coding])
    content = decoder.decompress(body, max_bytes + 1)
    if len(content) > max_bytes:
        raise Unacceptable(f"it has more than {max_bytes} bytes once its {coding} is undone")
    if not decoder.eof:
        raise Unacceptable(f"its {coding} is cut off")
    return content


# ---- every byte that arrives is counted, and waited for no longer than until the deadline


class _Received(io.RawIOBase):
    """What a socket receives, charged to a budget."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, budget: Budget):
        self._raw, self._sock, self._budget = raw, sock, budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self._sock.settimeout(self._budget.seconds())
        count = self._raw.readinto(buffer) or 0
        self._budget.spend(count)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Reply(http.client.HTTPResponse):
    def __init__(self, budget: Budget, sock: socket.socket, *args, **keywords):
        super().__init__(sock, *args, **keywords)
        self.fp = io.BufferedReader(_Received(self.fp.detach(), sock, budget))


class _Connection(http.client.HTTPConnection):
    """One that somebody else may connect."""

    made_by: Connect | None = None

    def connect(self) -> None:
        if self.made_by is None:
            super().connect()
        else:
            self.sock = self.made_by(self.host, self.port)


class _SecureConnection(http.client.HTTPSConnection, _Connection):
    """Connected as the class above says, then by HTTPSConnection wrapped in TLS, its host's name verified."""


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """urllib's, with replies that are charged to a budget."""

    def __init__(self, budget: Budget, connect: Connect | None):
        super().__init__()
        self._budget, self._connect = budget, connect

    def http_open(self, request):
        kind = _SecureConnection if request.type == "https" else _Connection
        return self.do_open(partial(self._connection, kind), request)

    https_open = http_open

    def _connection(self, kind, host: str, timeout):
        connection = kind(host, timeout=self._budget.seconds())
        connection.made_by = self._connect
        connection.response_class = partial(_Reply, self._budget)
        return connection


class _Redirections(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, reply, *args):
        new = super().redirect_request(request, reply, *args)
        reply.close()  # or urllib would read it to its end
        return new
