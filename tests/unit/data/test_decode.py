"""Images are shown as a viewer shows them, or refused with a reason, whatever the bytes."""

import io
import struct
import zlib

import numpy as np
import pytest
from own_data import image_bytes
from PIL import Image, ImageFile

from grace.data.decode import Unreadable, decode, read_header
from grace.data.images import EncodedImage
from grace.errors import GraceError


def encode(image, format="PNG", **save):
    buffer = io.BytesIO()
    image.save(buffer, format, **save)
    return buffer.getvalue()


def pixel(data, at=(0, 0)):
    return decode(data)[0].getpixel(at)


QUADRANTS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [255, 255, 255], [255, 255, 0]]], np.uint8)
# Where each EXIF orientation puts the stored pixels, by the standard's words ("row 0 is the visual right side" ...).
UPRIGHT = {
    1: QUADRANTS,
    2: QUADRANTS[:, ::-1],
    3: QUADRANTS[::-1, ::-1],
    4: QUADRANTS[::-1],
    5: QUADRANTS.transpose(1, 0, 2),
    6: QUADRANTS.transpose(1, 0, 2)[:, ::-1],
    7: QUADRANTS.transpose(1, 0, 2)[::-1, ::-1],
    8: QUADRANTS.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_exif_orientation_is_shown_upright(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(QUADRANTS), format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    shown, header = decode(data)
    assert np.array_equal(np.asarray(shown), UPRIGHT[orientation])
    assert (header.height, header.width) == UPRIGHT[orientation].shape[:2]
    assert read_header(data) == header


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_image_as_it_is():
    data = image_bytes("red", (20, 10), exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense")
    assert decode(data)[0].size == (20, 10)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_cut_image_is_refused_in_every_format(format):
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    whole = encode(Image.fromarray(noise), format)
    assert decode(whole)[0].size == (50, 40)
    for share in (0.3, 0.6, 0.95):
        with pytest.raises(Unreadable):
            decode(whole[: int(share * len(whole))])


def test_a_changed_byte_of_a_png_is_found():
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    whole = encode(Image.fromarray(noise))
    start = whole.index(b"IDAT") + 8
    for at in range(start, len(whole) - 24, 97):
        damaged = bytearray(whole)
        damaged[at] ^= 255
        with pytest.raises(Unreadable, match="image cannot be decoded"):
            decode(bytes(damaged))
        with pytest.raises(Unreadable, match="image cannot be decoded"):
            read_header(bytes(damaged))


def test_16_bit_grey_is_scaled():
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    for format in ("PNG", "TIFF", "PPM"):
        grey = np.asarray(decode(encode(Image.fromarray(values), format))[0])
        assert grey[0, :, 0].tolist() == [0, 1, 128, 255], format
        assert (grey == grey[..., :1]).all()


def test_pixels_without_a_scale_are_refused():
    with pytest.raises(Unreadable, match="floating-point"):
        decode(encode(Image.new("F", (4, 4), 0.5), "TIFF"))
    with pytest.raises(Unreadable, match="32-bit"):
        decode(encode(Image.new("I", (4, 4), 1 << 20), "TIFF"))


@pytest.mark.parametrize(
    ("image", "shown"),
    [
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 128)), (127, 127, 127)),
        (Image.new("LA", (4, 4), (0, 0)), (255, 255, 255)),
        (Image.new("LA", (4, 4), (50, 255)), (50, 50, 50)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("RGB", (4, 4), "blue").quantize(4), (0, 0, 255)),
    ],
)
def test_transparency_is_white_and_every_mode_keeps_its_colours(image, shown):
    assert pixel(encode(image)) == shown


def test_a_transparent_colour_is_white():
    assert pixel(encode(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))) == (255, 255, 255)
    assert pixel(encode(Image.new("RGB", (4, 4), "red").quantize(2), transparency=0)) == (255, 255, 255)
    assert pixel(encode(Image.new("I;16", (4, 4), 700), transparency=700)) == (255, 255, 255)


def test_cmyk_is_converted():
    assert pixel(image_bytes((0, 255, 255, 0), mode="CMYK", quality=100))[0] > 240


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format, more in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], **more)
        shown, header = decode(data)
        assert header.animated and shown.getpixel((0, 0)) == (255, 0, 0), format


def bomb(width, height):
    """A PNG whose header promises more than its 50 bytes of pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 50)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty image file"),
        (b"<html>404</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
        (encode(Image.new("RGB", (4, 4)), "ICO"), "not an image"),
        (bomb(60_000, 60_000), "more pixels than max_pixels"),
        (bomb(9_000, 9_000), "more pixels than max_pixels"),
        (bomb(90, 90), "cannot be decoded"),
        (image_bytes(size=(400, 400))[:1500], "cannot be decoded"),
        (image_bytes(format="PNG")[:60], "cannot be decoded"),
        (image_bytes(size=(3, 3)), "fewer pixels than min_pixels"),
    ],
)
def test_what_cannot_be_shown_is_refused(data, reason):
    with pytest.raises(Unreadable, match=reason) as caught:
        decode(data, min_pixels=10, max_pixels=64_000_000)
    assert "0x" not in str(caught.value)  # the same words in every run


def test_the_pixel_limit_is_held_before_pixels_are_decoded(monkeypatch):
    data = image_bytes(size=(100, 100))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(Unreadable, match="more pixels"):
        decode(data, max_pixels=9_999)


def test_a_replaced_image_is_noticed_when_it_is_used(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(image_bytes("red", format="PNG"))
    image = EncodedImage("one", None, str(file), EncodedImage.from_bytes("one", file.read_bytes()).sha256)
    assert image.open().getpixel((0, 0)) == (255, 0, 0) and image.size() == (30, 40)
    file.write_bytes(image_bytes("blue", format="PNG"))
    with pytest.raises(GraceError, match=r"a.png: not the image that was prepared for one"):
        image.open()
