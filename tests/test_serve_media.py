"""What a request may have the server read: the picture that `generate` would see, or one line, and nothing touched."""

import base64
import os
import re
import socket
import ssl
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_fetch import FAILS, PNG, WORKS, redirection, serving
from test_image import claiming, saved

from llava_jax.inputs.image import load_image
from llava_jax.serve.media import MediaError, MediaPolicy, Network, is_public, load_picture

DEFAULT, MACHINE = MediaPolicy(), Network()
PUBLIC = "93.184.216.34"
CERTIFICATE = Path(__file__).parent / "pictures.example.pem"
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def refusal(url, policy=DEFAULT, network=MACHINE) -> str:
    """What a client is told; it says nothing of where the server looked."""
    began = time.monotonic()
    with pytest.raises(MediaError) as caught:
        load_picture(url, policy, network)
    said = str(caught.value)
    assert said.isprintable() and len(said) < 300
    assert not re.search(r"/(tmp|etc|proc|root|home)|passwd|example|localhost|\d+\.\d+\.\d+|::|\b0x|Error", said), said
    assert time.monotonic() - began < 5  # far less on an idle machine
    return said


class World:
    """Names and their addresses, in turns where there are several tuples; every connection goes to the one server."""

    def __init__(self, port: int, **addresses):
        self.port, self.addresses, self.connected, self.asked = port, addresses, [], []
        self.network = Network(self.resolve, self.connect)

    def resolve(self, host, port):
        self.asked.append(host)
        turns = self.addresses.get(host.replace(".", "_"), [(PUBLIC,)])
        return turns[min(self.asked.count(host), len(turns)) - 1]

    def connect(self, address, timeout):
        self.connected.append(address)
        return socket.create_connection(("127.0.0.1", self.port), timeout)


REDIRECTED = {
    "/to metadata": redirection("http://169.254.169.254/latest/meta-data"),
    "/to loopback": redirection("http://127.0.0.1/"),
    "/to a number": redirection("http://2130706433/"),
    "/to a name with a private address": redirection("http://inside.example/"),
    "/to another port": redirection("http://pictures.example:22/"),
    "/to a user": redirection("http://somebody@pictures.example/"),
    "/to a user with a password": redirection("http://pictures.example:80@169.254.169.254/"),
    "/back to a rebound name": redirection("http://rebound.example/plain"),
    "/another host": redirection("http://other.example/plain"),
}
POLICY = MediaPolicy(allowed_domains=("pictures.example", "Other.example", "inside.example", "rebound.example"))
STRICT = MediaPolicy(POLICY.allowed_domains, max_bytes=100_000, max_seconds=0.3)


@pytest.fixture(scope="module")
def port():
    with serving(FAILS | WORKS | REDIRECTED) as (port, _):
        yield port


@pytest.fixture
def world(port):
    return World(port, inside_example=[("10.0.0.7",)], rebound_example=[(PUBLIC,), ("127.0.0.1",)])


# ---- pictures


EXIF = Image.Exif()
EXIF[0x0112] = 6  # turn right by a quarter
PICTURES = {
    "png": saved(NOISE),
    "palette": saved(NOISE.quantize(16)),
    "rgba": saved(NOISE.convert("RGBA").rotate(30)),
    "16-bit": saved(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)),
    "jpeg": saved(NOISE, "JPEG", exif=EXIF),
    "cmyk": saved(NOISE.convert("CMYK"), "JPEG", progressive=True),
    "two in one jpeg": saved(NOISE, "MPO", save_all=True, append_images=[NOISE.rotate(90)]),
    "large jpeg": saved(NOISE.resize((900, 700)), "JPEG", progressive=True, quality=98),
    "gif": saved(NOISE.quantize(16), "GIF", save_all=True, append_images=[NOISE.rotate(90).quantize(16)]),
    "webp": saved(NOISE, "WEBP", exif=EXIF),
    "animated webp": saved(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(90)]),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_it_is_the_picture_that_generate_sees(kind):
    picture = load_picture(data_uri(PICTURES[kind]), MediaPolicy())
    assert picture.mode == "RGB" and np.array_equal(picture, load_image(PICTURES[kind]))


def test_data_uris_in_every_writing():
    encoded = base64.b64encode(PNG).decode()
    for uri in (
        f"data:;base64,{encoded}",
        f"DATA:image/jpeg;charset=x;BASE64,{encoded.rstrip('=')}",
        f"data:image/png;base64,{encoded[:20]}\r\n {encoded[20:]}\n",
        f"data:image/png;base64,{encoded.replace('+', '%2B').replace('=', '%3d')}",
        "data:," + "".join(f"%{byte:02x}" for byte in PNG),
    ):
        assert load_picture(uri, MediaPolicy(max_bytes=len(PNG))).size == (6, 4)


@pytest.mark.parametrize(
    "uri, said",
    [
        ("data:image/png;base64", "data URI is not valid"),
        ("data:image/png;base64,A", "data URI is not valid"),
        ("data:image/png;base64,AAA*", "data URI is not valid"),
        ("data:image/png;base64,\ud83d", "data URI is not valid"),
        ("data:image/png;base64,é", "data URI is not valid"),
        ("data:image/png;base64,", "not a picture"),
        ("data:,\0\1", "not a picture"),
        ("data:image/png;base64," + "QUJD" * 40_000, "more than 100000 bytes"),
        ("data:image/png;base64," + "Q" * 500_000, "more than 100000 bytes"),
        ("data:" + "a" * 500_000, "more than 100000 bytes"),
        ("", "not one that this server takes: a data URI"),
        ("image.png", "not one that this server takes: a data URI"),
        ("/etc/passwd", "not one that this server takes"),
        (" data:image/png;base64,QUJD", "not one that this server takes"),
        ("file:///etc/passwd", "not one that this server takes"),
        ("http://pictures.example/a.png", "not one that this server takes"),
        ("gs://bucket/a.png", "not one that this server takes"),
        ("ftp://pictures.example/a.png", "not one that this server takes"),
        ("javascript:alert(1)", "not one that this server takes"),
        ("\0\ud83d\n", "not one that this server takes"),
    ],
)
def test_what_is_no_data_uri_of_a_picture(uri, said):
    assert said in refusal(uri, MediaPolicy(max_bytes=100_000))


# ---- decoders

TIFF = saved(NOISE, "TIFF")
FITS = b"".join(line.ljust(80) for line in (b"SIMPLE  = T", b"BITPIX  = 8", b"NAXIS   = 0", b"END")).ljust(2880)
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"


OTHERS = (TIFF, FITS, SVG, EPS, b"%PDF-1.4", saved(NOISE, "BMP"), saved(NOISE, "ICO"), b"GIF")


@pytest.mark.parametrize("content", OTHERS)
def test_four_formats_and_no_other(content):
    assert "not a picture that Pillow can read as PNG, JPEG, WEBP, GIF" in refusal(data_uri(content))


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp"])
def test_a_picture_that_is_cut_off(kind):
    content = saved(NOISE.quantize(16), "GIF") if kind == "gif" else PICTURES[kind]
    for length in (len(content) // 2, len(content) * 9 // 10):
        assert re.search("damaged|not a picture", refusal(data_uri(content[:length])))


def growing_gif() -> bytes:
    """One that says that it is small, and whose frame is large."""
    gif = bytearray(saved(Image.new("P", (8, 8)), "GIF"))
    frame = gif.index(b"\x2c", 13)
    gif[frame + 5 : frame + 9] = struct.pack("<HH", 9000, 9000)
    return bytes(gif)


def scans(count: int) -> bytes:
    """A JPEG of 4 megapixels that is gone over again and again."""
    jpeg = saved(Image.new("L", (2000, 2000)), "JPEG", progressive=True)
    return jpeg[:-2] + jpeg[jpeg.rindex(b"\xff\xda") : -2] * count + b"\xff\xd9"


def comments(count: int) -> bytes:
    """A GIF with a long comment, which Pillow puts together again for each of its pieces."""
    gif = saved(Image.new("P", (8, 8)), "GIF")
    return gif[:13] + b"\x21\xfe" + (b"\xff" + b"x" * 255) * count + b"\0" + gif[13:]


@pytest.mark.parametrize(
    "content, said",
    [
        (claiming(10_000, 10_000), "too large: Image size (10000x10000 pixels) exceeds limit of 67108864"),
        (claiming(1, 2**31 - 1), "too large: Image size (2147483647 pixels)"),
        (growing_gif(), "too large: Image size (9000x9000 pixels)"),
        (scans(5000), "takes more than 0.3 seconds"),
        (comments(40_000), "takes more than 0.3 seconds"),
    ],
    ids=["png", "long png", "gif", "scans", "comments"],
)
def test_bombs(content, said):
    assert said in refusal(data_uri(content), MediaPolicy(max_seconds=0.3))


# ---- hosts and addresses


NOT_PUBLIC = (
    "0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.9.9.9", "169.254.169.254", "172.16.0.1", "192.0.0.8",
    "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.2.3",
    "240.0.0.1", "255.255.255.255", "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1",
    "64:ff9b::808:808", "64:ff9b:1::a00:1", "100::1", "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:db8::1", "2002:7f00:1::", "2002:808:808::", "3fff::1", "4000::1", "5f00::1", "fc00::1", "fd00:ec2::254",
    "fe80::1", "fe80::1%eth0", "2606:4700::1111%eth0", "fec0::1", "ff02::1", "ff0e::1", "localhost", "8.8",
    "010.8.8.8",
)  # fmt: skip


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public(address, port):
    world = World(port, pictures_example=[(PUBLIC, address)])
    assert not is_public(address)
    assert "no public address, or one that is not" in refusal("http://pictures.example/plain", POLICY, world.network)
    assert world.connected == []


@pytest.mark.parametrize("address", ["8.8.8.8", PUBLIC, "192.1.0.1", "2606:4700::1111", "2a00:1450:4001::200e"])
def test_addresses_that_are(address, port):
    world = World(port, pictures_example=[(address, address)])
    assert load_picture("http://pictures.example/plain", POLICY, world.network).size == (6, 4)
    assert world.connected == [(address, 80)]


LOCAL = (
    "127.0.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "127.1", "0", "localhost",
    "169.254.169.254",
)  # fmt: skip


@pytest.mark.parametrize("host", LOCAL)
def test_numbers_and_local_names_whatever_is_allowed(host, world):
    """Looked up by the machine itself, as an operator might allow them."""
    network = Network(connect=world.connect)
    said = refusal(f"http://{host}/", MediaPolicy(allowed_domains=(host,)), network)
    assert re.search("no public address|cannot be found", said) and world.connected == []


@pytest.mark.parametrize(
    "url, said",
    [
        ("http://elsewhere.example/", "not among those"),
        ("http://www.pictures.example/", "not among those"),
        ("http://pictures.example./", "not among those"),
        ("http://127.0.0.1/", "not among those"),
        ("http://[::1]/", "not among those"),
        ("http://[::ffff:7f00:1]/", "not among those"),
        ("http://[fe80::1%25eth0]/", "not among those"),
        ("http://pictures.example@127.0.0.1/", "not among those"),
        ("http://somebody@pictures.example/", "not among those"),
        ("http://pictures.example%2f@127.0.0.1/", "not among those"),
        ("http://127.0.0.1\\@pictures.example/", "not among those"),
        ("http://127.0.0.1#@pictures.example/", "not among those"),
        ("http://elsewhere.example?http://pictures.example/", "not among those"),
        ("http://somebody:secret@pictures.example/", "could not be fetched"),
        ("http://pictures.example:80@127.0.0.1/", "could not be fetched"),
        ("http://pictures.example:22/", "none of 80, 443"),
        ("http://pictures.example:8080/", "none of 80, 443"),
        ("https://pictures.example:0/", "none of 80, 443"),
        ("http://pictures.example:99999/", "could not be fetched"),
        ("http://pictures.example:x/", "could not be fetched"),
        ("http://pictures.example%0d%0aHost:%20a/", "could not be fetched"),
        ("http://pictures.example%00.elsewhere.example/", "could not be fetched"),
        ("http://pictures.example/a\r\nb", "could not be fetched"),
        ("http://pictures.example/\ud83d", "could not be fetched"),
        ("http://[::1/", "could not be fetched"),
        ("http://" + "a" * 70 + "é/", "could not be fetched"),
        ("http:///a.png", "could not be fetched"),
        ("http://", "could not be fetched"),
    ],
)
def test_hosts_that_are_not_allowed(url, said, world):
    assert said in refusal(url, POLICY, world.network)
    assert world.connected == world.asked == []


def test_hosts_that_are_allowed(world):
    policy = MediaPolicy(allowed_domains=("PICTURES.example", "bücher.example"))
    for url in ("http://pictures.example/plain", "HTTP://Pictures.Example:80/plain", "http://bücher.example/plain"):
        assert load_picture(url, policy, world.network).size == (6, 4)
    assert world.asked == ["pictures.example", "Pictures.Example", "xn--bcher-kva.example"]


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(port, monkeypatch):
    """The name is looked up once; no proxy is asked, which would look it up again."""
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    world = World(port, pictures_example=[(PUBLIC,), ("127.0.0.1",)])
    assert load_picture("http://pictures.example/plain", POLICY, world.network).size == (6, 4)
    assert world.asked == ["pictures.example"] and world.connected == [(PUBLIC, 80)]


def test_the_next_address_where_one_does_not_answer(world):
    def connect(address, timeout):
        if address[0] != "8.8.8.8":
            raise ConnectionRefusedError
        return world.connect(address, timeout)

    network = Network(lambda host, port: ("1.1.1.1", "8.8.8.8"), connect)
    assert load_picture("http://pictures.example/plain", POLICY, network).size == (6, 4)
    network = Network(lambda host, port: ("8.8.8.8", "1.1.1.1"), connect)
    assert load_picture("http://pictures.example/plain", POLICY, network).size == (6, 4)
    network = Network(lambda host, port: ("1.1.1.1", "1.0.0.1"), connect)
    assert "could not be fetched" in refusal("http://pictures.example/", POLICY, network)


def test_a_redirection_is_looked_up_and_checked_as_the_first(world):
    assert load_picture("http://pictures.example/another%20host", POLICY, world.network).size == (6, 4)
    assert world.asked == ["pictures.example", "other.example"] and len(world.connected) == 2


@pytest.mark.parametrize(
    "path, said",
    [
        ("/to metadata", "not among those"),
        ("/to loopback", "not among those"),
        ("/to a number", "not among those"),
        ("/to a name with a private address", "no public address, or one that is not"),
        ("/to another port", "none of 80, 443"),
        ("/to a user", "not among those"),
        ("/to a user with a password", "could not be fetched"),
        ("/to a file", "to no http(s) URL"),
        ("/to ftp", "could not be fetched"),
        ("/around", "redirected too often"),
    ],
)
def test_redirections_into_what_is_forbidden(path, said, world):
    assert said in refusal("http://pictures.example" + path, POLICY, world.network)
    assert set(world.connected) == {(PUBLIC, 80)} and (path == "/around" or len(world.connected) == 1)


def test_a_name_that_is_private_when_it_is_looked_up_again(world):
    said = refusal("http://rebound.example/back to a rebound name", POLICY, world.network)
    assert "no public address, or one that is not" in said and world.connected == [(PUBLIC, 80)]


@pytest.mark.parametrize("path", FAILS)
def test_hosts_that_misbehave(path, world):
    said = refusal("http://pictures.example" + path, STRICT, world.network)
    assert re.search("the picture could not be fetched|takes more than 0.3|redirected|content is|not a picture", said)
    assert {address for address, _ in world.connected} == {PUBLIC}


def test_a_name_that_is_looked_up_for_long_or_in_vain(world):
    over = threading.Event()

    def slow(host, port):
        over.wait(8)
        return [PUBLIC]

    def unknown(host, port):
        raise socket.gaierror(-2, "Name or service not known: pictures.example")

    url = "http://pictures.example/plain"
    assert "takes more than 0.3 seconds" in refusal(url, STRICT, Network(slow, world.connect))
    over.set()
    assert "cannot be found" in refusal(url, STRICT, Network(unknown, world.connect))
    assert "no public address" in refusal(url, STRICT, Network(lambda host, port: [], world.connect))
    assert world.connected == []


def test_tls_verifies_the_name(monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    with serving(WORKS, context) as (port, seen):
        world = World(port)
        assert "could not be fetched" in refusal("https://pictures.example/plain", POLICY, world.network)  # by nobody
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        assert load_picture("https://pictures.example/plain", POLICY, world.network).size == (6, 4)
        assert "could not be fetched" in refusal("https://other.example/plain", POLICY, world.network)
        assert world.connected == [(PUBLIC, 443)] * 3 and seen == ["/plain"]


def test_a_handshake_has_no_seconds_of_its_own():
    """A host that accepts, and then is silent."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        world = World(silent.getsockname()[1])
        assert "takes more than 0.3 seconds" in refusal("https://pictures.example/", STRICT, world.network)


# ---- files


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "allowed"
    (folder / "inner").mkdir(parents=True)
    (folder / "a b%.png").write_bytes(PNG)
    (folder / "inner" / "c.png").write_bytes(PNG)
    (folder / "notes.txt").write_text("hello")
    (folder / "large.png").write_bytes(PNG + bytes(100_000))
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "allowed-too").mkdir()
    (tmp_path / "allowed-too" / "secret.png").write_bytes(PNG)
    (folder / "link.png").symlink_to("inner/c.png")
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "outer").symlink_to(tmp_path)
    (folder / "around").symlink_to("around")
    os.mkfifo(folder / "pipe.png")
    return folder


def test_files_in_the_folder(folder):
    names = ("a%20b%25.png", "a b%25.png", "inner/c.png", "inner/../inner/c.png", "link.png", "%69nner%2fc.png")
    for allowed in (folder, str(folder) + "/", folder / "outer" / "allowed"):
        policy = MediaPolicy(allowed_path=allowed)
        for name in names:
            assert load_picture(f"file://{folder}/{name}", policy).size == (6, 4)
        assert load_picture(f"FILE://localhost{folder}/link.png?size=1#here", policy).size == (6, 4)


UNREADABLE = (
    "/../secret.png", "/%2e%2e/secret.png", "/..%2fsecret.png", "/inner/../../secret.png", "-too/secret.png",
    "/out.png", "/outer/secret.png", "/outer", "/around", "/pipe.png", "/missing.png", "/inner",
    "/a%00b", "/link.png%00.jpg", "/", "",
)  # fmt: skip


@pytest.mark.parametrize("path", UNREADABLE)
def test_files_that_are_not_read(folder, path):
    before = len(os.listdir("/proc/self/fd"))
    said = refusal(f"file://{folder}{path}", MediaPolicy(allowed_path=folder))
    assert said == "the picture's file:// URL names no file that this server may read"
    assert len(os.listdir("/proc/self/fd")) == before


ELSEWHERE = (
    "file:///etc/passwd", "file:///etc/hostname", "file:///proc/self/environ", "file:///dev/zero",
    "file://elsewhere/etc/passwd", "file:///%2fetc/passwd", "file:////etc/passwd", "file:///a\n", "file:///\ufffd",
    "file://[", "file://",
)  # fmt: skip


@pytest.mark.parametrize("url", ELSEWHERE)
def test_files_elsewhere(folder, url):
    assert "names no file that this server may read" in refusal(url, MediaPolicy(allowed_path=folder))


def test_files_that_are_large_or_no_pictures(folder):
    policy = MediaPolicy(allowed_path=folder, max_bytes=100_000)
    assert "more than 100000 bytes" in refusal(f"file://{folder}/large.png", policy)
    assert "not a picture" in refusal(f"file://{folder}/notes.txt", policy)
    assert "a data URI or a file:// URL in the allowed folder" in refusal("http://pictures.example/", policy)


@pytest.mark.parametrize("path", ["out.png", "outer/secret.png", "pipe.png"])
def test_a_link_that_comes_after_the_path_was_resolved(folder, path, monkeypatch):
    monkeypatch.setattr(os.path, "realpath", lambda name, **_: os.fspath(name))
    assert "names no file" in refusal(f"file://{folder}/{path}", MediaPolicy(allowed_path=folder))


# ---- the policy


@pytest.mark.parametrize(
    "domain", ["", ".", "https://a.example", "a.example:80", "*.example", ".example", "a/b", "a@b", "a b", "é" * 70]
)
def test_domains_that_are_no_hosts(domain):
    with pytest.raises(ValueError, match=re.escape(f"allowed media domain {domain!r}: expected a host's name")):
        MediaPolicy(allowed_domains=(domain,))


def test_a_folder_that_is_not_there(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(ValueError, match="no such folder"):
            MediaPolicy(allowed_path=path)
