"""
Proves that images of every kind are read rightly or not at all, that a mistake in one is one clear line, and that they
are fitted and normalized as the model expects. A small file that is dear to read is refused before its pixels are.

    pytest tests/data/test_image_files.py
"""
import contextlib
import os
import signal
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from commands.processes import Stopped
from pictures.image_files import CLIP_MEAN, CLIP_STD, fit_image, load_image, open_image, open_picture, to_tensor


def test_one_marker_pixel_goes_where_the_geometry_says():
    """Letterbox: a 40x20 image in a 64 frame is scaled by 1.6 and stands 16 rows down; resize stretches it."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[10, 30] = 255
    for fit, (y, x) in (("letterbox", (16 + 10.5 * 1.6, 30.5 * 1.6)), ("resize", (10.5 * 3.2, 30.5 * 1.6))):
        out = np.asarray(fit_image(Image.fromarray(pixels), 64, fit)).astype(float).sum(-1)
        out = out * (out < 700) if fit == "letterbox" else out
        frame = out[16:48] if fit == "letterbox" else out
        row, column = np.unravel_index(frame.argmax(), frame.shape)
        assert abs(row + (16 if fit == "letterbox" else 0) + 0.5 - y) < 2 and abs(column + 0.5 - x) < 1.5


def test_normalisation_is_clips():
    x = to_tensor(Image.new("RGB", (4, 4), (255, 0, 51)))
    expected = [(v - m) / s for v, m, s in zip((1, 0, 0.2), CLIP_MEAN, CLIP_STD)]
    assert torch.allclose(x[:, 0, 0], torch.tensor(expected), atol=1e-6) and x.shape == (3, 4, 4)


@pytest.mark.parametrize("mode, kind, color", [
    ("L", "png", (90, 90, 90)), ("RGBA", "png", (200, 90, 10)), ("P", "gif", (204, 102, 0)),
    ("CMYK", "jpg", (200, 90, 10)), ("1", "png", (255, 255, 255)), ("LA", "png", (90, 90, 90)),
    ("RGB", "tif", (200, 90, 10)), ("RGB", "jp2", (200, 90, 10)), ("RGB", "webp", (200, 90, 10)),
    ("RGB", "bmp", (200, 90, 10)), ("CMYK", "tif", (200, 90, 10))])
def test_every_8_bit_kind_becomes_rgb(tmp_path, mode, kind, color):
    """Alpha is dropped: a pixel that is fully transparent keeps its color."""
    image = Image.new("RGB", (6, 5), color)                                       # of the palette's own colors for P
    image = image.convert(mode, dither=Image.Dither.NONE)
    if mode in ("RGBA", "LA"):
        image.putalpha(0)
    image.save(tmp_path / f"a.{kind}")
    image = load_image(f"a.{kind}", tmp_path)
    assert image.mode == "RGB" and image.size == (6, 5)
    assert np.abs(np.asarray(image).astype(int) - color).max() <= 6


def tiff(path, bands, bits, colors=1, kind=1, order="<", pixels=None, side=4):
    """A TIFF file by hand: one strip behind the tags; colors is PhotometricInterpretation, kind SampleFormat."""
    if pixels is None:
        pixels = bytes(side * side * bands * bits // 8)
    lists, at = {258: [bits] * bands, 339: [kind] * bands}, 8 + 2 + 11 * 12 + 4
    tags = {256: side, 257: side, 258: None, 259: 1, 262: colors, 273: at + 4 * bands, 277: bands, 278: side,
            279: len(pixels), 284: 1, 339: None}
    out, behind = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags)), b""
    for tag, value in tags.items():
        if value is not None:
            out += struct.pack(order + "HHII", tag, 4, 1, value)
        elif bands < 3:
            out += struct.pack(order + "HHI2H", tag, 3, bands, *(lists[tag] * 2)[:2])
        else:
            out += struct.pack(order + "HHII", tag, 3, bands, at + len(behind))
        if value is None:
            behind += struct.pack(f"{order}{bands}H", *lists[tag])
    path.write_bytes(out + bytes(4) + behind + pixels)


def png(path, color_type, bits, side=4, height=None):
    """A PNG file by hand: its header and black rows, none if it is large."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    rows = bytes(side * (1 + side * {0: 1, 2: 3, 4: 2, 6: 4}[color_type] * bits // 8)) if side < 100 else b""
    header = struct.pack(">2I5B", side, height or side, bits, color_type, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("bits, kind, order", [(16, 1, "<"), (16, 1, ">"), (16, 2, "<"), (32, 2, "<"), (32, 3, "<"),
                                               (32, 3, ">")])
def test_one_deep_band_is_stretched(tmp_path, bits, kind, order):
    """A ramp with two outliers: percentile 2 is black, 98 white; bits and byte order are read right."""
    ramp = np.arange(10000) / 2 + 300
    ramp[:2] = -30000 if kind > 1 else 0, 32000
    form = order + {(16, 1): "u2", (16, 2): "i2", (32, 2): "i4", (32, 3): "f4"}[bits, kind]
    tiff(tmp_path / "a.tif", 1, bits, kind=kind, order=order, pixels=ramp.astype(form).tobytes(), side=100)
    image = np.asarray(open_image(tmp_path / "a.tif")).astype(int)
    assert image.shape == (100, 100, 3) and (image[..., 0] == image[..., 2]).all()
    low, high = np.percentile(ramp, (2, 98))
    assert np.abs(image[..., 0] - 255 * np.clip((ramp.reshape(100, 100) - low) / (high - low), 0, 1)).max() <= 1


def test_a_16_bit_png_is_stretched_too(tmp_path):
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "a.png")
    image = np.asarray(open_image(tmp_path / "a.png"))
    assert image.min() == 0 and image.max() == 255 and 120 < image.mean() < 135


@pytest.mark.parametrize("pixels, dark, bright", [
    (np.full((4, 4), 7.5), 0, 0), (np.full((4, 4), 1e-45), 0, 0),
    (np.float32([[np.nan, np.inf], [1, 2]]), 0, 255), (np.float32([[-3e38, 3e38], [0, 0]]), 0, 0),
    (np.pad(np.ones((1, 1)), (0, 99)), 0, 255)])
def test_stretching_odd_pixels(tmp_path, pixels, dark, bright):
    """Constant, partly no number, beyond float32's range, and almost constant: one pixel differs and must be seen."""
    Image.fromarray(pixels.astype(np.float32)).save(tmp_path / "a.tif")
    image = np.asarray(open_image(tmp_path / "a.tif"))
    assert (image.min(), image.max()) == (dark, bright)


@pytest.mark.parametrize("value, more", [(np.nan, {}), (np.inf, {}), (-9999, {"tiffinfo": {42113: "-9999"}})])
def test_a_band_without_data_is_refused(tmp_path, value, more):
    """It would be a black picture, to be trained on."""
    Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "a.tif", **more)
    with pytest.raises(ValueError, match="no pixel has data"):
        open_image(tmp_path / "a.tif")


def test_pixels_without_data_do_not_stretch(tmp_path):
    pixels = np.full((20, 20), -9999, np.float32)
    pixels[:, 10:] = np.linspace(0, 1, 200).reshape(20, 10)
    Image.fromarray(pixels).save(tmp_path / "a.tif", tiffinfo={42113: "-9999"})
    image = np.asarray(open_image(tmp_path / "a.tif")).astype(int)[..., 0]
    assert (image[:, :10] == 0).all() and 110 < image[:, 10:].mean() < 145


REFUSED = {
    "RGB of 16 bits": (lambda p: tiff(p, 3, 16, 2), "3 bands of 16 bits"),
    "the same, big endian": (lambda p: tiff(p, 3, 16, 2, order=">"), "3 bands of 16 bits"),
    "RGBA of 16 bits": (lambda p: tiff(p, 4, 16, 2), "4 bands of 16 bits"),
    "gray and alpha": (lambda p: tiff(p, 2, 16), "2 bands of 16 bits"),
    "five bands": (lambda p: tiff(p, 5, 8, 2), "5 bands;"), "thirteen": (lambda p: tiff(p, 13, 16), "13 bands;"),
    "floats": (lambda p: tiff(p, 3, 32, 2, kind=3), "3 bands of 32 bits"),
    "gray in three": (lambda p: tiff(p, 3, 8, 1), "3 bands that are marked as gray"),
    "signed": (lambda p: tiff(p, 1, 8, kind=2), "signed pixels of 8 bits"),
    "unsigned of 32 bits": (lambda p: tiff(p, 1, 32), "unsigned pixels of 32 bits"),
    "zero is white": (lambda p: tiff(p, 1, 16, colors=0), "pixels of 16 bits of which zero is white"),
    "PNG RGB": (lambda p: png(p, 2, 16), "3 bands of 16 bits"),
    "PNG RGBA": (lambda p: png(p, 6, 16), "4 bands of 16 bits"),
    "PNG gray and alpha": (lambda p: png(p, 4, 16), "2 bands of 16 bits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_pillow_reads_wrongly_is_refused_by_its_tags(tmp_path, case):
    make, words = REFUSED[case]
    make(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=words) as e:
        open_image(tmp_path / "a.bin")
    assert "gdal_translate" in str(e.value) and str(e.value).isprintable()


def test_a_jpeg_2000_of_16_bits_is_refused(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jp2")
    content = (tmp_path / "a.jp2").read_bytes()
    at = content.index(b"ihdr") + 14
    assert content[at] == 7
    (tmp_path / "a.jp2").write_bytes(content[:at] + b"\x0f" + content[at + 1:])
    with pytest.raises(ValueError, match="3 bands of 16 bits"):
        open_image(tmp_path / "a.jp2")


def test_a_jpeg_2000_without_boxes_is_judged_too(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.j2k")
    assert open_image(tmp_path / "a.j2k").size == (32, 32)
    content = (tmp_path / "a.j2k").read_bytes()
    assert content[42] == 7                 # bits - 1
    (tmp_path / "a.j2k").write_bytes(content[:42] + b"\x0f" + content[43:])
    with pytest.raises(ValueError, match="3 bands of 16 bits"):
        open_image(tmp_path / "a.j2k")


def test_a_signal_is_not_taken_for_a_damaged_picture(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(Stopped), open_picture(tmp_path / "a.png", "image"):
        raise Stopped(2, "ended by SIGINT")


def test_the_tiff_and_png_writers_above_are_right(tmp_path):
    """8-bit files of theirs are read, so that the refusals are not of broken files."""
    tiff(tmp_path / "a.tif", 3, 8, 2, pixels=bytes(range(48)))
    assert (np.asarray(open_image(tmp_path / "a.tif")).ravel() == range(48)).all()
    png(tmp_path / "a.png", 2, 8)
    assert open_image(tmp_path / "a.png").size == (4, 4)


def test_a_huge_image_is_refused_by_its_header(tmp_path, monkeypatch):
    png(tmp_path / "a.png", 2, 8, side=20000)
    with pytest.raises(ValueError, match=r"400000000 pixels\) exceeds limit of 134217728"):
        open_image(tmp_path / "a.png")
    png(tmp_path / "a.png", 2, 8, side=90)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    assert open_image(tmp_path / "a.png").size == (90, 90)                         # up to twice Pillow's number


def many_scans(path, scans=400):
    """A progressive JPEG whose last scan is repeated."""
    Image.effect_noise((64, 64), 50).save(path, "JPEG", progressive=True)
    content = path.read_bytes()[:-2]
    last = content.rindex(b"\xff\xda")
    path.write_bytes(content + content[last:] * scans + b"\xff\xd9")


def large_webp(path):
    Image.new("RGB", (16, 16)).save(path, "WEBP", lossless=True)
    content = bytearray(path.read_bytes())
    content[21:25] = struct.pack("<I", 9999 | 9999 << 14)                          # width and height, less one
    path.write_bytes(content)


def large_jpeg_2000(path, side, **options):
    """Pillow's file of 64 x 64 pixels, whose header says more."""
    Image.new("RGB", (64, 64)).save(path, "JPEG2000", no_jp2=True, **options)
    content = bytearray(path.read_bytes())
    content[8:16] = content[24:32] = struct.pack(">II", side, side)                # the image, its one tile
    path.write_bytes(content)


def tiled(path, side, tile, offsets):
    """A gray TIFF whose tiles all lie at the same place."""
    tags = {256: side, 257: side, 258: 8, 259: 1, 262: 1, 277: 1, 284: 1, 322: tile, 323: tile, 324: 146, 325: 146}
    parts = [struct.pack("<HHII", tag, 4, offsets if tag > 323 else 1, value) for tag, value in tags.items()]
    start = b"II*\0" + struct.pack("<IH", 8, len(tags))
    path.write_bytes(start + b"".join(parts) + bytes(4) + struct.pack("<I", 8) * offsets)


DEAR = {
    "scans": (many_scans, "a JPEG of 4.. scans, expected at most 100"),
    "many scans of a large one": (lambda p: many_scans(p, 80), "64 x 64 pixels, expected at most"),
    "deep": (lambda p: png(p, 0, 16, 9000), "9000 x 9000 pixels, expected at most 67,108,864"),
    "long": (lambda p: png(p, 0, 8, 2 ** 26, 1), "67108864 x 1 pixels, expected .* 65,536 a side"),
    "longer": (lambda p: png(p, 0, 8, 2 ** 28, 1), "268435456 pixels. exceeds"),
    "a WEBP": (large_webp, "10000 x 10000 pixels, expected at most 67,108,864"),
    "JPEG 2000": (lambda p: large_jpeg_2000(p, 5000), "5000 x 5000 pixels, expected at most 16,777,216"),
    "precincts": (lambda p: large_jpeg_2000(p, 1000, precinct_size=(64, 64), codeblock_size=(16, 16)),
                  "1000 x 1000 pixels, expected at most 262,144"),
    "tiles": (lambda p: tiled(p, 1024, 2, 2 ** 18), "262144 tiles of 4 pixels"),
    "one tile": (lambda p: tiled(p, 16, 2 ** 15, 1), "1 tiles of 1073741824 pixels"),
}


@pytest.mark.parametrize("case", DEAR)
def test_what_is_dear_to_read_is_refused_before_its_pixels(tmp_path, monkeypatch, case):
    def load(self):
        raise AssertionError("pixels are read")
    make, words = DEAR[case]
    make(tmp_path / "a.bin")
    if case == "many scans of a large one":
        monkeypatch.setattr("pictures.image_files.MAX_PIXELS", 20_000)
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ValueError, match=words) as e:
        open_image(tmp_path / "a.bin")
    assert str(e.value).isprintable() and (tmp_path / "a.bin").stat().st_size < 3_000_000


def test_scans_of_thumbnails_do_not_count(tmp_path):
    scan = b"\xff\xda\0\x0c\3"
    exif = Image.Exif().tobytes() + scan * 200
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.jpg", progressive=True, exif=exif)
    assert (tmp_path / "a.jpg").read_bytes().count(scan) > 200
    assert open_image(tmp_path / "a.jpg").getpixel((5, 5)) == (254, 0, 0)


@contextlib.contextmanager
def within(seconds):
    def late(*_):
        raise TimeoutError
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("what", ["EPS", "pipe", "folder"])
def test_only_regular_image_files_are_opened(tmp_path, what):
    """Pillow hands EPS files, which are programs, to Ghostscript; a pipe would be waited for."""
    if what == "EPS":
        Image.new("RGB", (6, 5)).save(tmp_path / "a.png", "EPS")
    else:
        os.mkfifo(tmp_path / "a.png") if what == "pipe" else (tmp_path / "a.png").mkdir()
    words = "not an image" if what == "EPS" else "no such file"
    with within(5), pytest.raises((ValueError, FileNotFoundError), match=words):
        open_image(tmp_path / "a.png")


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image("a.jpg", tmp_path).size == (4, 8)


def broken_images(folder):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / "good.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:3000])
    (folder / "text.png").write_text("<html>not found</html>")
    png(folder / "deep.png", 2, 16)


@pytest.mark.parametrize("name, message", [
    ("none.png", "no such file"), ("cut.png", "cannot be read"), ("text.png", "not an image"),
    ("../x.png", "leaves the image folder"), ("/etc/hosts", "leaves the image folder"),
    ("deep.png", "3 bands of 16 bits"),
    ("x" * 5000, "no such file|not a path"), ("a\0.png", "not a path"), (".", "no such file")])
def test_a_bad_image_is_one_line(tmp_path, name, message):
    broken_images(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as e:
        load_image(name, tmp_path)
    assert name.removeprefix("../")[:1] in str(e.value) and str(e.value).isprintable()
