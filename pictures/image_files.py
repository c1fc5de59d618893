"""
Image files, as they come in remote sensing -> RGB pictures -> tensors of the model's size.

Whatever Pillow would read wrongly is refused by its header, and so is what is too large: a band is never dropped or cut
to 8 bits without a word. A single deep band, as of radar or elevation, is stretched to gray.
"""
import re
import struct
import warnings
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin

from files.text import one_line, path_inside
from toy import scenes

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FRAME = tuple(round(255 * c) for c in CLIP_MEAN)                                   # around a letterboxed picture
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000")                # others may run programs (EPS)
Image.MAX_IMAGE_PIXELS = 2 ** 27            # Pillow refuses twice this, 16,384 x 16,384 or 1 GB, by the header alone
MAX_SCENE = 2048                            # side of a built-in scene that a record may name
# What Pillow's decoders raise on damaged files.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError,
                 MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError)
warnings.filterwarnings("ignore", module=r"PIL\.")                                 # on metadata, as a rule


def load_image(name, root="."):
    """A path under root, or the name of a built-in scene -> an RGB PIL image, upright."""
    if name.startswith("scene:"):
        return Image.fromarray(open_scene(name).image)
    return open_image(path_inside(name, root, "image"))


def open_scene(name):
    """A built-in scene that a data file names; a huge one would fill the memory."""
    side = name.rpartition("/")[2]
    if len(name) > 100 or side.isdecimal() and int(side) > MAX_SCENE:
        raise ValueError(f"scene {name[:60]!r}: its side is more than {MAX_SCENE} pixels or its numbers are too long")
    return scenes.open_scene(name)


def open_image(path):
    """
    An image file -> an RGB PIL image, upright (EXIF). Gray, palette and CMYK become RGB; alpha is dropped, not blended;
    only the first page is read. One band of 16 or 32 bits is stretched. ValueError or FileNotFoundError in one line.
    """
    try:
        with open(path, "rb") as file:
            refused, nodata = read_header(file)
            if not refused:
                with Image.open(file, formats=FORMATS) as image:
                    image = ImageOps.exif_transpose(image)
                    return stretch(image, nodata) if image.mode.startswith(("I", "F")) else image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"image {path}: no such file") from None
    except Image.UnidentifiedImageError:
        refused = f"not an image that Pillow can read ({', '.join(FORMATS)})"
    except Image.DecompressionBombError as e:
        refused = f"{str(e).split(',')[0]}; cut it into tiles first"
    except PILLOW_ERRORS as e:
        refused = f"cannot be read, {one_line(e)}"
    raise ValueError(f"image {path}: {refused}")


def read_header(file):
    """
    in:  an image file, open at its start; it is left there.
    out: why Pillow would read its bands or bits wrongly, or None, and GDAL's value for pixels without data, or None.
         Pillow cuts colors of 16 bits to 8 without a word, and takes any five bands for red, green, blue and two more.
    """
    start, bands, bits, gray, signed, nodata = file.read(512), 1, 8, False, False, None
    if start.startswith(b"\x89PNG") and len(start) > 25:                           # at 24 the bits, then the color type
        bands, bits = {2: 3, 4: 2, 6: 4}.get(start[25], 1), start[24]
    elif b"ihdr" in start[:80]:             # JPEG 2000: in its first box, behind the name, height and width
        at = start.index(b"ihdr") + 12
        bands, bits = int.from_bytes(start[at:at + 2], "big"), (start[at + 2] & 127) + 1
    elif start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):                    # TIFF and BigTIFF ("+")
        tags = TiffImagePlugin.ImageFileDirectory_v2(start[:16] if b"+" in start[:4] else start[:8])
        file.seek(tags.next)
        tags.load(file)
        bands, bits = tags.get(277, 1), max(tags.get(258, (1,)))                   # SamplesPerPixel, BitsPerSample
        gray, signed = tags.get(262) in (0, 1), 2 in tags.get(339, ())             # Photometric..., SampleFormat
        nodata = re.fullmatch(r"\s*([-+\d.eE]+|nan)[\s\0]*", str(tags.get(42113, "")))  # GDAL_NODATA
        nodata = float(nodata[1]) if nodata else None
    file.seek(0)
    for misread, reason in ((bands > 4, f"{bands} bands"),
                            (bands > 1 and bits > 8, f"{bands} bands of {bits} bits"),
                            (signed and bits == 8, "signed pixels of 8 bits"),
                            (gray and bands > 2, f"{bands} bands that are marked as gray")):
        if misread:
            return (f"{reason}; make an 8-bit RGB image of it: gdal_translate -b 1 -b 2 -b 3 -ot Byte -scale -co "
                    "PHOTOMETRIC=RGB IN OUT.tif, with the numbers of its red, green and blue bands"), nodata
    return None, nodata


def stretch(image, nodata=None):
    """One band of any depth -> RGB: percentile 2 to black, 98 to white; pixels without data (and NaN) are black."""
    pixels = np.asarray(image, np.float32)
    with np.errstate(all="ignore"):         # a range beyond float32 ends as black
        known = np.isfinite(pixels) if nodata is None else np.isfinite(pixels) & (pixels != np.float32(nodata))
        if not known.any():
            return Image.new("RGB", image.size)
        low, high = map(float, np.percentile(pixels[known], (2, 98)))
        if low == high:                     # few pixels differ, or none
            low, high = float(pixels[known].min()), float(pixels[known].max())
        gray = (np.where(known, pixels, low).clip(low, high) - low) / (high - low)
    return Image.fromarray((255 * np.nan_to_num(gray) + 0.5).astype(np.uint8)).convert("RGB")


def fit_image(image, size, fit, resample=Image.Resampling.BICUBIC, frame=FRAME):
    """
    A PIL image as size x size: "resize" stretches it (the paper's way), "letterbox" keeps its shape and puts it in the
    middle of a frame, for a picture of CLIP's mean color.
    """
    if image.size == (size, size):
        return image
    if fit == "resize":
        return image.resize((size, size), resample)
    if fit != "letterbox":
        raise ValueError(f"fit {fit!r}: expected resize or letterbox")
    return ImageOps.pad(image, (size, size), resample, color=frame)


def fit_mask(mask, size, fit):
    """(h, w) bool -> (size, size) float32 in [0, 1], the covered share of each pixel, by the image's own geometry."""
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    return torch.from_numpy(np.array(fit_image(picture, size, fit, Image.Resampling.BOX, 0))).float() / 255


def to_tensor(image):
    """RGB PIL image or (H, W, 3) uint8 array -> (3, H, W) float32, normalized with CLIP's mean and deviation."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
