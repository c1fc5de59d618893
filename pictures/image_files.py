"""
Image files, as they come in remote sensing -> RGB pictures -> tensors of the model's size.

Whatever Pillow would read wrongly is refused by its header, and so is what is too large: a band is never dropped or cut
to 8 bits without a word. A single deep band, as of radar or elevation, is stretched to gray.
"""
import contextlib
import os
import re
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin

from files.text import naming, one_line, path_inside
from toy import scenes

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FRAME = tuple(round(255 * c) for c in CLIP_MEAN)                                   # around a letterboxed picture
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000")                # others may run programs (EPS)

# A file of a few bytes may be dear to read. Within these bounds each takes less than 10 s and 2 GB.
MAX_PIXELS, MAX_SIDE = 2 ** 27, 2 ** 16     # fewer pixels where one costs more: cost_of_pixel
MAX_SCANS = 100                             # of a JPEG; a progressive one has about 10
MAX_TILES, MAX_TILE = 2 ** 16, 2 ** 26      # tiles or strips of a TIFF, pixels of a tile
MAX_IMAGES, MAX_MASKS = 32, 100             # of a record
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2    # Pillow refuses twice this
SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e][\x01-\x04]")                   # begins a scan of a JPEG
# Begins a coding style of JPEG 2000 with precincts of its own: 400 bytes may ask for millions of them.
PRECINCTS = re.compile(rb"\xff(\x52\x00[\x0d-\x2d][\x01\x03\x05\x07][\x00-\x04]|\x53\x00[\x0a-\x2b][\x00-\x03]\x01)")
warnings.filterwarnings("ignore", module=r"PIL\.")                                 # on metadata, as a rule


@naming()
def load_image(name, root="."):
    """A path under root, or the name of a built-in scene -> an RGB PIL image, upright."""
    if name.startswith("scene:"):
        return Image.fromarray(scenes.open_scene(name).image)
    return open_image(path_inside(name, root, "image"))


@contextlib.contextmanager
def open_picture(path, what):
    """
    An image or mask file -> a PIL image whose pixels the with block is to read, and GDAL's value for pixels without
    data. By its header: a regular file of a known format, not too dear. what begins a message: "image", "mask".
    """
    if not os.path.isfile(path):            # a pipe would be waited for
        raise FileNotFoundError(f"{what} {path}: no such file")
    try:
        with open(path, "rb") as file:
            nodata = read_header(file)
            with Image.open(file, formats=FORMATS) as image:
                check_cost(image, file)
                yield image, nodata
    except Image.UnidentifiedImageError:
        raise ValueError(f"{what} {path}: not an image that Pillow can read ({', '.join(FORMATS)})") from None
    except Exception as e:                  # a damaged image fails in every way there is
        raise ValueError(f"{what} {path}: cannot be read, {one_line(e) or type(e).__name__}") from None


def open_image(path):
    """
    An image file -> an RGB PIL image, upright (EXIF). Gray, palette and CMYK become RGB; alpha is dropped, not blended;
    only the first page is read. One band of 16 or 32 bits is stretched.
    """
    with open_picture(path, "image") as (image, nodata):
        ImageOps.exif_transpose(image, in_place=True)                              # a copy may be large
        if image.mode.startswith(("I", "F")):
            return stretch(image, nodata)
        return image if image.mode == "RGB" else image.convert("RGB")


def check_cost(image, file):
    """ValueError if an image of which only the header is read has more pixels than are cheap in its format."""
    (w, h), most = image.size, MAX_PIXELS // cost_of_pixel(image, file)
    if max(w, h) > MAX_SIDE or w * h > most:
        raise ValueError(f"{w} x {h} pixels, expected at most {most:,} for its kind and {MAX_SIDE:,} a side; cut it up")


def cost_of_pixel(image, file):
    """How many times as long as in a plain file a pixel takes."""
    file.seek(0)
    if image.format == "JPEG2000":
        return 512 if PRECINCTS.search(file.read()) else 8
    if image.format in ("JPEG", "MPO"):
        thumbnails = b"".join(segment for _, segment in image.applist)
        scans = len(SCAN.findall(file.read())) - len(SCAN.findall(thumbnails))
        if scans > MAX_SCANS:
            raise ValueError(f"a JPEG of {scans} scans, expected at most {MAX_SCANS}; save it without progression")
        return max(1, scans // 8)
    return 2 if image.format == "WEBP" or image.mode.startswith(("I", "F")) else 1


def read_header(file):
    """
    in:  an image file, open at its start; it is left there.
    out: GDAL's value for pixels without data, or None. ValueError if Pillow would read the file wrongly or slowly: it
         cuts colors of 16 bits to 8 without a word, and takes any five bands for red, green, blue and two more.
    """
    start, bands, bits, nodata = file.read(512), 1, 8, None
    gray = inverted = signed = unsigned = False
    tiles = tile = 0
    if start.startswith(b"\x89PNG") and len(start) > 25:                           # at 24 the bits, then the color type
        bands, bits = {2: 3, 4: 2, 6: 4}.get(start[25], 1), start[24]
    elif b"ihdr" in start[:80]:             # JPEG 2000: in its first box, behind the name, height and width
        at = start.index(b"ihdr") + 12
        bands, bits = int.from_bytes(start[at:at + 2], "big"), (start[at + 2] & 127) + 1
    elif start.startswith(b"\xff\x4f\xff\x51"):                                   # JPEG 2000 without boxes
        bands, bits = int.from_bytes(start[40:42], "big"), (start[42] & 127) + 1
    elif start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):                    # TIFF and BigTIFF ("+")
        tags = TiffImagePlugin.ImageFileDirectory_v2(start[:16] if b"+" in start[:4] else start[:8])
        file.seek(tags.next)
        tags.load(file)
        bands, bits = tags.get(277, 1), max(tags.get(258, (1,)))                   # SamplesPerPixel, BitsPerSample
        gray, inverted = tags.get(262) in (0, 1), tags.get(262) == 0               # PhotometricInterpretation
        unsigned, signed = 1 in tags.get(339, (1,)), 2 in tags.get(339, ())        # SampleFormat
        nodata = re.fullmatch(r"\s*([-+\d.eE]+|nan)[\s\0]*", str(tags.get(42113, "")))  # GDAL_NODATA
        nodata = float(nodata[1]) if nodata else None
        tiles, tile = max(len(tags.get(273, ())), len(tags.get(324, ()))), tags.get(322, 0) * tags.get(323, 0)
    file.seek(0)
    for refused, reason in ((tiles > MAX_TILES or tile > MAX_TILE, f"{tiles} tiles of {tile} pixels"),
                            (bands > 4, f"{bands} bands"),
                            (bands > 1 and bits > 8, f"{bands} bands of {bits} bits"),
                            (signed and bits == 8, "signed pixels of 8 bits"),
                            (unsigned and bits == 32, "unsigned pixels of 32 bits"),
                            (inverted and bits > 8, f"pixels of {bits} bits of which zero is white"),
                            (gray and bands > 2, f"{bands} bands that are marked as gray")):
        if refused:
            raise ValueError(f"{reason}; make an 8-bit RGB image of it: gdal_translate -b 1 -b 2 -b 3 -ot Byte -scale "
                             "-co PHOTOMETRIC=RGB IN OUT.tif, with the numbers of its red, green and blue bands")
    return nodata


def stretch(image, nodata=None):
    """One band of any depth -> RGB: percentile 2 to black, 98 to white; a pixel without data (or NaN) is black."""
    pixels = np.asarray(image, np.float32)
    with np.errstate(all="ignore"):         # a range beyond float32 ends as black
        known = np.isfinite(pixels) if nodata is None else np.isfinite(pixels) & (pixels != np.float32(nodata))
        if not known.any():
            raise ValueError("no pixel has data")
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
