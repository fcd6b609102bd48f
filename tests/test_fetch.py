"""URLs and data URIs as pictures, from servers that misbehave in every way: the picture, or one line soon."""

import base64
import contextlib
import gzip
import io
import socketserver
import subprocess
import sys
import threading
import time
import urllib.parse
import zlib

import pytest
from fuzz.odd import refusal_of
from PIL import Image

from llava_jax.inputs import fetch
from llava_jax.inputs.image import image_size, load_image


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(file, "PNG")
    return file.getvalue()


PNG = png()
DATA_URI = "data:image/png;base64," + base64.b64encode(PNG).decode()


def head(*lines: str, status="200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


def reply(body: bytes, *lines: str, status="200 OK"):
    """A server's function that sends this and is done."""
    return lambda send: send(head(*lines, f"Content-Length: {len(body)}", status=status) + body)


def over_and_over(start: bytes, more: bytes, pause: float = 0):
    """One that goes on until the other side has gone."""

    def answer(send):
        send(start)
        while True:
            send(more)
            time.sleep(pause)

    return answer


def redirection(location: str):
    return lambda send: send(head(f"Location: {location}", "Content-Length: 0", status="302 Found"))


CONTINUE = head(status="100 Continue")
GZIPPED = gzip.compress(PNG)
CHUNKED = head("Transfer-Encoding: chunked")
WORKS = {
    "/plain": reply(PNG),
    "/until it closes": lambda send: send(head() + PNG),
    "/chunked": lambda send: send(CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(PNG), PNG)),
    "/continue": lambda send: send(CONTINUE * 3 + head() + PNG),
    "/gzip": reply(GZIPPED, "Content-Encoding: gzip"),
    "/x-gzip": reply(GZIPPED, "Content-Encoding: X-GZIP"),
    "/deflate": reply(zlib.compress(PNG), "Content-Encoding: deflate"),
    "/raw": reply(zlib.compress(PNG)[2:-4], "Content-Encoding: deflate"),
    "/identity": reply(PNG, "Content-Encoding: identity"),
    "/redirected": redirection("/plain"),
    "/redirected with an endless body": over_and_over(head("Location: /plain", status="301 Moved"), b"x" * 999),
    "/redirected to a name with a space": redirection("/until it closes"),
}
FAILS = {
    "/short": (lambda send: send(head("Content-Length: 100") + PNG[:9]), "IncompleteRead"),
    "/nothing": (lambda send: None, "closed connection without response"),
    "/no http": (lambda send: send(b"220 Welcome\r\n"), "BadStatusLine: 220 Welcome"),
    "/long status line": (lambda send: send(b"HTTP/1.1 200 " + b"x" * 70_000), "LineTooLong"),
    "/long header": (lambda send: send(head("A: " + "x" * 70_000)), "LineTooLong"),
    "/many headers": (lambda send: send(head(*["A: b"] * 150)), "got more than 100 headers"),
    "/endless headers": (over_and_over(head()[:-2], b"x" * 999, 0.001), "LineTooLong"),
    "/bad chunk": (lambda send: send(CHUNKED + b"zz\r\n" + PNG), "IncompleteRead"),
    "/short chunk": (lambda send: send(CHUNKED + b"fff\r\n" + PNG), "IncompleteRead"),
    "/bad gzip": (reply(b"\x1f\x8b" + PNG, "Content-Encoding: gzip"), "error: Error -3"),
    "/no gzip": (reply(PNG, "Content-Encoding: gzip"), "incorrect header check"),
    "/cut gzip": (reply(GZIPPED[:-9], "Content-Encoding: gzip"), "its gzip is cut off"),
    "/brotli": (reply(PNG, "Content-Encoding: br"), "Content-Encoding 'br' is none of gzip, x-gzip, deflate"),
    "/bomb": (reply(gzip.compress(bytes(10**6)), "Content-Encoding: gzip"), "more than 100000 bytes once its gzip"),
    "/huge": (lambda send: send(head(f"Content-Length: {10**18}") + PNG), f"it has {10**18} bytes, more than 100000"),
    "/endless": (over_and_over(head(), b"x" * 999), "it sends more than 100000 bytes"),
    "/endless chunks": (over_and_over(CHUNKED, b"3e7\r\n" + b"x" * 999 + b"\r\n"), "sends more than 100000 bytes"),
    "/endless trailer": (over_and_over(CHUNKED + b"0\r\n", b"A: b\r\n" * 99), "sends more than 100000 bytes"),
    "/endless continue": (over_and_over(CONTINUE, CONTINUE * 99), "sends more than 100000 bytes"),
    "/slow": (over_and_over(head("Content-Length: 500"), b"x", 0.05), "it took more than 0.3 seconds"),
    "/slow headers": (over_and_over(b"HTTP/1.1 200 OK\r\nA: ", b"x", 0.05), "it took more than 0.3 seconds"),
    "/silent": (lambda send: time.sleep(1), "it took more than 0.3 seconds"),
    "/slowly redirected": (lambda send: (time.sleep(0.2), redirection("/slow")(send)), "more than 0.3 seconds"),
    "/missing": (reply(b"no", status="404 Not Found"), "HTTP Error 404: Not Found"),
    "/escapes": (lambda send: send(b"HTTP/1.1 500 \x1b[2J\rx\r\n\r\n"), "HTTP Error 500: [2J x"),
    "/to a file": (redirection("file:///etc/hostname"), "Redirection to url 'file:///etc/hostname' is not allowed"),
    "/to ftp": (redirection("ftp://127.0.0.1/a"), "unknown url type: ftp"),
    "/around": (redirection("/around"), "infinite loop"),
    "/to nowhere": (redirection("http://"), "could not be fetched: "),
    "/to half a bracket": (redirection("http://[::1/"), "Invalid IPv6 URL"),
    "/empty": (reply(b"", status="204 No Content"), "is not a picture that Pillow can read"),
}


@contextlib.contextmanager
def serving(answers, context=None):
    """A server of these answers, under TLS with a context: (its port, the request lines that it got)."""
    seen = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            line = self.rfile.readline().decode().split()
            while self.rfile.readline().strip():
                pass
            seen.append(line[1])
            path = urllib.parse.unquote(urllib.parse.urlsplit(line[1]).path)
            answer = answers.get(path, WORKS["/plain"])
            with contextlib.suppress(OSError):  # the client has gone
                (answer if callable(answer) else answer[0])(self.request.sendall)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = allow_reuse_address = True
        block_on_close = False

        def handle_error(self, *_):  # a client that does not like its certificate
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], seen
        server.shutdown()


@pytest.fixture(scope="module")
def server():
    """(its URL, the request lines that it got)"""
    with serving(FAILS | WORKS) as (port, seen):
        yield f"http://127.0.0.1:{port}", seen


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", 100_000)
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.parametrize("path", WORKS)
def test_it_is_fetched(server, path):
    assert load_image(server[0] + path).size == (6, 4)


@pytest.mark.parametrize("path", FAILS)
def test_it_is_one_line_soon(server, path, monkeypatch):
    if "0.3 seconds" in FAILS[path][1]:
        monkeypatch.setattr(fetch, "MAX_SECONDS", 0.3)
    began = time.monotonic()
    error = refusal_of(load_image, server[0] + path)
    assert isinstance(error, ValueError) and f"image '{server[0]}{path}'" in str(error)
    assert FAILS[path][1] in str(error)
    assert time.monotonic() - began < 5  # far less on an idle machine


def test_what_a_url_may_not_have_is_encoded(server):
    address, seen = server
    for path, sent in (
        ("/a b.png", "/a%20b.png"),
        ("/a%20b.png", "/a%20b.png"),
        ("/100%.png?q=a b&r=%41", "/100%25.png?q=a%20b&r=%41"),
        ("/ä/日本.png#here", "/%C3%A4/%E6%97%A5%E6%9C%AC.png"),
        ("/~a,(b)'$!;=:@+&.png", "/~a,(b)'$!;=:@+&.png"),
    ):
        assert load_image(address + path).size == (6, 4) and seen[-1] == sent
    assert load_image(address.replace("http", "HTTP") + "/plain").size == (6, 4)


def test_hosts_of_other_alphabets_and_proxies(server, monkeypatch):
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", server[0])
    assert image_size("http://bücher.example:8080/ä.png") == (6, 4)
    assert server[1][-1] == "http://xn--bcher-kva.example:8080/%C3%A4.png"


@pytest.mark.parametrize(
    "url, message",
    [
        ("http://127.0.0.1:1/a.png", "Connection refused"),
        ("http://127.0.0.1:99999/a.png", "Port out of range 0-65535"),
        ("http://127.0.0.1:b/a.png", "Port could not be cast"),
        ("http://[::1/a.png", "Invalid IPv6 URL"),
        ("http:///a.png", "no host given"),
        ("http://", "no host given"),
        ("http://127.0.0.1:1/a\n.png", "control character"),
        ("http://127.0.0.1:1/\0.png", "control character"),
        ("http://127.0.0.1:1/\ud83d.png", "half of a surrogate pair"),
        ("http://" + "a" * 70 + "/a.png", "label"),
        ("http://ä..b/a.png", "label"),
        ("foo://a/b.png", "the scheme 'foo' is not known"),
        ("ftp://127.0.0.1/b.png", "the scheme 'ftp' is not known"),
        ("file://elsewhere/b.png", "'elsewhere' would be another machine"),
        ("data:image/png;base64", "a data URI has a comma"),
        ("data:image/png;base64,AAA*", "base64"),
        ("data:image/png;base64,A", "base64"),
        ("data:,", "is not a picture"),
        ("data:image/png,\ud83d", "surrogates not allowed"),
        ("data:image/png;base64," + "QUJD" * 300_000, "…"),
        ("http://127.0.0.1:1/" + "a" * 100_000, "…"),
    ],
)
def test_what_is_no_url_of_a_picture(url, message):
    error = refusal_of(load_image, url)
    assert message in str(error) and len(str(error)) < 500


def test_a_store_without_its_package():
    """In a process of its own (a second): other tests register a store of theirs under gs://."""
    code = """
import sys
sys.modules["gcsfs"] = None
from llava_jax.inputs.image import load_image
load_image("gs://bucket/a.png")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "llava-jax[gcs]"' in done.stderr.splitlines()[-1]


def test_data_uris_are_pictures():
    encoded = DATA_URI.partition(",")[2]
    for uri in (
        DATA_URI,
        f"DATA:;BASE64,{encoded.rstrip('=')}",
        f"data:image/png;charset=x;base64,{urllib.parse.quote(encoded, safe='')}",
        f"data:image/png;base64,{encoded[:20]}\n {encoded[20:]}",
        "data:image/png," + urllib.parse.quote(PNG),
    ):
        assert load_image(uri).size == image_size(uri) == (6, 4)


def test_file_urls(tmp_path):
    (tmp_path / "a b%.png").write_bytes(PNG)
    assert load_image(f"file://{tmp_path}/a%20b%25.png").size == (6, 4)
    assert load_image(f"file://localhost{tmp_path}/a b%25.png").size == (6, 4)
    assert "no such file" in str(refusal_of(load_image, f"file://{tmp_path}/c.png"))
