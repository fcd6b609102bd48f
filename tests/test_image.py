"""Pictures of every kind, from every kind of place."""

import http.server
import io
import struct
import threading
import zlib

import numpy as np
import pytest
from fuzz.odd import refusal_of
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile

from llava_jax.inputs.image import as_image_list, image_size, image_source, load_image


def noise(width=40, height=30, channels=3):
    shape = (height, width, channels)[: 3 if channels > 1 else 2]
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def saved(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


KINDS = {
    "gray": Image.fromarray(noise(channels=1)),
    "palette": Image.fromarray(noise()).quantize(16),
    "rgba": Image.fromarray(noise(channels=4), "RGBA"),
    "la": Image.fromarray(noise(channels=2), "LA"),
    "bilevel": Image.fromarray(noise(channels=1)).convert("1"),
    "16-bit": Image.fromarray(noise(channels=1).astype(np.uint16) * 257),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_comes_in_as_convert_rgb_gives_it(kind, tmp_path):
    path = tmp_path / "picture.png"
    KINDS[kind].save(path)
    got = load_image(path)
    assert got.mode == "RGB"
    assert np.array_equal(np.asarray(got), np.asarray(Image.open(path).convert("RGB")))


def test_cmyk_and_animations():
    cmyk = saved(Image.fromarray(noise()).convert("CMYK"), "JPEG")
    assert np.array_equal(np.asarray(load_image(cmyk)), np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB")))
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    animated = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(animated).getpixel((0, 0)) == (255, 0, 0)


def test_orientation_is_honoured_unless_told_otherwise():
    image, exif = Image.fromarray(noise(40, 30)), Image.Exif()
    exif[0x0112] = 6  # turn right by a quarter
    file = saved(image, "PNG", exif=exif)
    assert load_image(file).size == (30, 40)
    assert np.array_equal(np.asarray(load_image(file)), np.rot90(noise(40, 30), -1))
    assert np.array_equal(np.asarray(load_image(file, exif=False)), noise(40, 30))


def test_urls(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(Image.fromarray(noise())))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert np.array_equal(np.asarray(load_image(f"{url}/a.png")), noise())
        with pytest.raises(ValueError, match=r"b\.png' could not be fetched: .*404"):
            load_image(f"{url}/b.png")
        server.shutdown()


def test_what_is_not_a_picture_is_named(tmp_path):
    text, cut = tmp_path / "notes.txt", tmp_path / "cut.jpg"
    text.write_text("hello")
    cut.write_bytes(saved(Image.fromarray(noise(400, 300)), "JPEG")[:2000])
    for source, error, message in (
        (text, ValueError, r"notes\.txt' is not a picture"),
        (cut, ValueError, r"cut\.jpg' is damaged"),
        (tmp_path, FileNotFoundError, "no such file"),
        (np.zeros((4, 4, 7), np.uint8), ValueError, r"shape \(4, 4, 7\)"),
        (np.zeros((0, 4), np.uint8), ValueError, r"shape \(0, 4\)"),
        (3.5, ValueError, "got float"),
    ):
        with pytest.raises(error, match=message):
            load_image(source)


def claiming(width, height):
    """A PNG whose header says so, of which nothing else is there."""
    header = struct.pack(">4sIIBBBBB", b"IHDR", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">II4s", zlib.crc32(header), 99, b"IDAT")


def test_pixels_are_counted_before_they_are_decoded(monkeypatch):
    assert image_size(claiming(13377, 13377)) == (13377, 13377)  # just below
    for source, said in (
        (claiming(20000, 10000), r"too large: Image size \(200000000 pixels\) exceeds limit of 178956970 pixels$"),
        (claiming(1, 2**31 - 1), r"too large: Image size \(2147483647 pixels\) exceeds limit"),
        (claiming(0, 5), "is damaged|is not a picture"),
        (Image.new("RGB", (0, 0)), "it is 0x0 pixels"),
        (Image.new("RGB", (5, 0)), "it is 5x0 pixels"),
    ):
        with pytest.raises(ValueError, match=said):
            load_image(source)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some set it
    with pytest.raises(ValueError, match=r"Image size \(20000x10000 pixels\) exceeds limit of 178956970 pixels"):
        image_size(claiming(20000, 10000))


@pytest.mark.parametrize("error", [NotImplementedError, struct.error, KeyError, RecursionError, MemoryError])
@pytest.mark.parametrize("owner, step", [(Image, "open"), (PngImageFile, "load"), (Image.Image, "convert")])
def test_whatever_a_decoder_raises_is_the_pictures_fault(monkeypatch, owner, step, error):
    def fail(*_, **__):
        raise error("no\nsuch thing")

    data = saved(Image.fromarray(noise()))
    monkeypatch.setattr(owner, step, fail)
    said = refusal_of(load_image, data)
    assert isinstance(said, ValueError)
    assert f"image: {len(data)} bytes is damaged: {error.__name__}: " in str(said) and "such thing" in str(said)


def test_a_picture_whose_exif_cannot_be_read_stands_as_it_is(monkeypatch):
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image: struct.unpack(">I", b""))
    assert np.array_equal(np.asarray(load_image(saved(Image.fromarray(noise())))), noise())


def test_a_picture_of_ones_own_that_cannot_be_decoded():
    with Image.open(io.BytesIO(saved(Image.fromarray(noise(400, 300)))[:3000])) as image:
        with pytest.raises(ValueError, match="image: a PIL image is damaged: "):
            load_image(image)


def test_one_many_or_none():
    assert as_image_list(None) == []
    assert as_image_list("a.png") == ["a.png"]
    assert as_image_list(("a.png", b"x")) == ["a.png", b"x"]


def test_a_file_may_keep_its_mode(tmp_path):
    file = tmp_path / "rgba.png"
    Image.fromarray(noise(610, 220, 4)).save(file)
    assert load_image(file, exif=False, rgb=False).mode == "RGBA" and image_size(file) == (610, 220)
    assert image_size(file.read_bytes()) == (610, 220)


def test_the_size_of_a_file_that_is_no_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png' is not a picture that Pillow can read"):
        image_size(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"b\.png': no such file"):
        image_size(tmp_path / "b.png")


def test_a_named_picture_is_in_its_folder_or_says_where_it_is():
    for name in ("a.jpg", "b/../a.jpg", "..a.jpg", "./a.jpg"):
        assert image_source(name, "folder") == f"folder/{name}"
    for name in ("/elsewhere/a.jpg", "https://host/a.jpg", "gs://bucket/a.jpg", "data:image/png;base64,AA=="):
        assert image_source(name, "folder") == name
    for name in ("../a.jpg", "b/../../a.jpg", ".."):
        with pytest.raises(ValueError, match="leads out of the image folder 'folder'; name it by its absolute path"):
            image_source(name, "folder")
