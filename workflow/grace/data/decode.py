"""Encoded bytes to an RGB image, as an image viewer would show it; whatever cannot be shown is refused with a reason.

Files come from outside: the format is read from the contents, out of a fixed list, and the pixel limit is held
against the header before anything is decoded.
"""

import warnings
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is opened; never formats that run a program (EPS) or that stand for other files."""

MOST_PIXELS = 178_000_000
"""Pillow's own bound against decompression bombs."""

_ORIENTATION = 0x0112  # the EXIF and TIFF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PLUGINS = (TiffImagePlugin, WebPImagePlugin)  # Pillow registers these two only when they are imported

warnings.filterwarnings("ignore", module=r"PIL\.")  # on damaged tags and large images: what matters is refused below


class Unreadable(Exception):
    """An image that is refused.

    Attributes:
        reason: the kind, one of a few, to count by.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Header:
    """What an image's header says; height and width in pixels, as it is shown (EXIF orientation applied)."""

    format: str
    height: int
    width: int
    animated: bool


def _open(data: bytes) -> Image.Image:
    if not data:
        raise Unreadable("empty image file")
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise Unreadable("image has more pixels than max_pixels", f"more than {MOST_PIXELS:,}") from None
    except UnidentifiedImageError:
        raise Unreadable("not an image", f"none of {', '.join(FORMATS)}, or a damaged header") from None
    except Exception as error:  # decoders of damaged files raise anything: struct.error, KeyError, zlib.error ...
        raise Unreadable("not an image", f"damaged header: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    if image.format == "PNG":
        _load(image)  # as getexif would, whose failure here would be taken for damaged EXIF, and not be repeated
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data: a viewer shows the image unturned
        return 1
    return value if value in _TURNS else 1


def _load(image: Image.Image) -> None:
    """Decode the pixels; raises `Unreadable`. Pillow says of a damaged image that it is one only the first time."""
    try:
        image.load()
    except Exception as error:  # as in `_open`
        raise Unreadable("image cannot be decoded", _brief(error)) from error


def _header(image: Image.Image, min_pixels: int, max_pixels: int) -> Header:
    width, height = image.size
    if width * height > max_pixels:
        raise Unreadable("image has more pixels than max_pixels", f"{width} x {height}, limit {max_pixels:,}")
    if width * height < min_pixels:
        raise Unreadable("image has fewer pixels than min_pixels", f"{width} x {height}, limit {min_pixels:,}")
    if _orientation(image) >= 5:
        width, height = height, width
    try:
        animated = image.format in ("GIF", "WEBP", "PNG") and bool(getattr(image, "is_animated", False))
    except Exception as error:  # the next frame is looked for, and may be damaged
        raise Unreadable("image cannot be decoded", _brief(error)) from error
    return Header(str(image.format), height, width, animated)


def read_header(data: bytes, min_pixels: int = 1, max_pixels: int = MOST_PIXELS) -> Header:
    """Format and size of an encoded image, without decoding its pixels (a PNG's EXIF takes that);
    raises `Unreadable`.
    """
    with _open(data) as image:
        return _header(image, min_pixels, max_pixels)


def decode(data: bytes, min_pixels: int = 1, max_pixels: int = MOST_PIXELS) -> tuple[Image.Image, Header]:
    """Decode an image as a viewer would show it.

    EXIF orientation is applied; transparent parts show white; 16-bit grey is scaled to 8 bits over its whole range;
    of an animation this is the first frame. Colour profiles are not applied.

    Returns:
        The image, mode RGB, and its header.

    Raises:
        Unreadable: no image of a known format, damaged, cut off, outside the pixel limits, or floating-point pixels.
    """
    image = _open(data)
    with image:
        header = _header(image, min_pixels, max_pixels)
        orientation = _orientation(image)
        _load(image)
        try:
            shown = _to_rgb(image)
            return shown.transpose(_TURNS[orientation]) if orientation in _TURNS else shown, header
        except Unreadable:
            raise
        except Exception as error:  # as in `_open`
            raise Unreadable("image cannot be decoded", _brief(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode as RGB, transparent parts white."""
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "F":
        raise Unreadable("image has floating-point pixels", "no scale is defined; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        seen = image.convert("RGBA")
        white = Image.new("RGB", seen.size, "white")
        white.paste(seen, mask=seen.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Integer grey of more than 8 bits, scaled so that the largest value is white."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]  # BitsPerSample
    if bits > 16 or (values.size and (values.min() < 0 or values.max() > 65535)):
        raise Unreadable("image has 32-bit pixels", "no scale is defined; save it with 8 or 16 bits")
    grey = np.rint(values.astype(np.float32) * (255 / (2**bits - 1)))
    if tags.get(262) == 0:  # PhotometricInterpretation: white is zero
        grey = 255 - grey
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey = np.where(values == clear, 255, grey)
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
