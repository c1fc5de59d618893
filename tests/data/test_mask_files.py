"""
Proves that every published form of a mask gives the same pixels, that a mask goes through the image's own geometry, and
that a wrong mask is one clear line, soon. tests/peers/test_masks_peers.py compares with pycocotools.

    pytest tests/data/test_mask_files.py
"""
import time

import numpy as np
import pytest
import torch
from PIL import Image

from pictures.image_files import fit_image, fit_mask
from pictures.mask_files import decode_mask
from toy import scenes

# A 6 x 5 image; the region is x 1-3, y 2-3. Run lengths go down the columns of 5.
MASK = np.zeros((5, 6), bool)
MASK[2:4, 1:4] = True
RUNS = [7, 2, 3, 2, 3, 2, 11]
SAME = {
    "polygon": [[1, 2, 4, 2, 4, 4, 1, 4]], "flat polygon": [1, 2, 4, 2, 4, 4, 1, 4],
    "two polygons": [[1, 2, 3, 2, 3, 4, 1, 4], [2, 2, 4, 2, 4, 4, 2, 4]], "box": {"bbox": [1, 2, 3, 2]},
    "runs": {"size": [5, 6], "counts": RUNS},
    # 7, 2, 3, then differences to the number two places before: 0, 0, 0, 8; each a character from code 48
    "compressed": {"size": [5, 6], "counts": "7230008"},
    "annotation": {"segmentation": [[1, 2, 4, 2, 4, 4, 1, 4]], "bbox": [0, 0, 1, 1], "category_id": 3},
    "annotation without segmentation": {"segmentation": [], "bbox": [1, 2, 3, 2]},
}


@pytest.mark.parametrize("form", SAME)
def test_every_form_gives_the_same_pixels(form):
    assert (decode_mask(SAME[form], (6, 5)) == MASK).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_mask_files(tmp_path, mode):
    picture = Image.fromarray(MASK.astype(np.uint16)) if mode == "I;16" else \
        Image.fromarray(MASK.astype(np.uint8) * 255).convert(mode)
    picture.save(tmp_path / "m.png")
    assert (decode_mask("m.png", (6, 5), tmp_path) == MASK).all()


def test_a_polygon_partly_outside_is_clipped():
    assert (decode_mask([[1, 2, 90, 2, 90, 4, 1, 4]], (6, 5)) == (np.arange(6) >= 1) * MASK.any(1)[:, None]).all()


def test_many_polygons_of_a_large_image_are_soon_filled():
    """The union is made of run lengths, not of pictures. Two squares, one twice; the rest are dots."""
    dots = [[x, 1500, x + 1, 1500, x + 1, 1501, x, 1501] for x in range(0, 3000, 2)]
    began = time.process_time()
    mask = decode_mask([[5, 5, 9, 5, 9, 9, 5, 9], [7, 7, 12, 7, 12, 12, 7, 12], [5, 5, 9, 5, 9, 9, 5, 9], *dots],
                       (3000, 2000))
    assert time.process_time() - began < 5
    assert mask.sum() == 16 + 25 - 4 + len(dots) and mask[5:9, 5:9].all() and mask[1500, ::2].all()


def test_an_object_of_a_scene():
    scene = scenes.make_scene("test", 3, 0, 96)
    last = len(scene.objects) - 1
    assert (decode_mask(f"scene:test/0/3/96#{last}", (96, 96)) == scene.objects[last].mask).all()


BAD = {
    "empty polygon": ([[0, 0, 0, 0, 0, 0]], "is empty on an image of 6 x 5"),
    "outside": ({"bbox": [50, 50, 3, 3]}, "empty"),
    "too few numbers": ([[1, 2, 3, 4]], "expected 6 or more numbers"), "odd": ([[1, 2, 3, 4, 5, 6, 7]], "numbers x, y"),
    "words": ([["a"] * 6], "numbers"), "not finite": ([[float("nan")] * 6], "numbers"),
    "huge": ([[1e300] * 6], "numbers"),
    "nothing": ({}, "expected a file, polygons"), "number": (7, "expected a file"), "none": (None, "expected a file"),
    "sum": ({"size": [5, 6], "counts": [7, 2]}, r"add up to 9, expected 5 x 6 = 30"),
    "true for a number": ({"bbox": [True, 1, 3, 2]}, "numbers x, y"),
    "a line break": ({"bbox": "\n"}, "expected 4 numbers"),
    "long outline": ([[0, 0, 999_999, 0, 999_999, 999_999, 0, 999_999]] * 20, "longer than 1,048,576 pixels"),
    "long outline in all": ([[0, 0, 1000, 0, 1000, 1000, 0, 1000]] * 300, "longer than 1,048,576 pixels"),
    "runs without end": ({"size": [5, 6], "counts": "0" * 2 ** 22}, "add up to 0, expected 5 x 6 = 30"),
    "no number": ("nan.tif", "from nan"), "some": ("some.tif", "2 values from 0.0 to nan"),
    "no end": ("inf.tif", "to inf"),
    "negative": ({"size": [5, 6], "counts": [40, -10]}, "add up to"), "size": ({"size": [6], "counts": [1]}, "size"),
    "other size": ({"size": [6, 5], "counts": [7, 2, 21]}, "is 5 x 6 pixels, its image 6 x 5"),
    "not compressed": ({"size": [5, 6], "counts": "\x01!"}, "not COCO's compressed form"),
    "cut": ({"size": [5, 6], "counts": "7P"}, "in the middle of a number"),
    "missing file": ("no.png", "no such file"), "above": ("../up.png", "leaves the image folder"),
    "no image": ("text.png", "not an image"), "photo": ("photo.png", "expected two"),
    "class map": ("classes.png", "expected two"), "colors": ("colors.png", "channels differ"),
    "scene object": ("scene:test/0/3/96#99", "one of its objects"), "black": ("black.png", "is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_mask_is_one_clear_line(tmp_path, case):
    value, words = BAD[case]
    (tmp_path / "text.png").write_text("not an image")
    Image.effect_noise((6, 5), 90).save(tmp_path / "photo.png")
    Image.fromarray(np.arange(30, dtype=np.uint8).reshape(5, 6) % 3 + 1).save(tmp_path / "classes.png")
    Image.new("RGB", (6, 5), (255, 0, 0)).save(tmp_path / "colors.png")
    Image.new("L", (6, 5)).save(tmp_path / "black.png")
    for name, inside, outside in (("nan", np.nan, np.nan), ("some", np.nan, 0), ("inf", np.inf, 0)):
        Image.fromarray(np.where(MASK, inside, outside).astype(np.float32)).save(tmp_path / f"{name}.tif")
    with pytest.raises((ValueError, FileNotFoundError), match=words) as e:
        decode_mask(value, (6, 5), tmp_path)
    assert "\n" not in str(e.value)


def test_a_mask_cannot_start_a_program(tmp_path):
    """Pillow hands EPS files, which are programs, to Ghostscript; whatever its name says, such a mask is not opened."""
    Image.fromarray(MASK.astype(np.uint8) * 255).save(tmp_path / "m.png", "EPS")
    assert Image.open(tmp_path / "m.png").format == "EPS"
    with pytest.raises(ValueError, match="not an image that Pillow can read"):
        decode_mask("m.png", (6, 5), tmp_path)


@pytest.mark.parametrize("fit", ["resize", "letterbox"])
@pytest.mark.parametrize("shape", [(20, 40), (300, 90), (64, 64)])
def test_a_mask_goes_where_its_image_goes(fit, shape):
    """A marked square in image and mask: after the fit they lie on one another, to half a pixel; the area is kept."""
    h, w = shape
    mask = np.zeros(shape, bool)
    mask[h // 5:h // 5 + 6, w // 2:w // 2 + 6] = True
    picture = Image.fromarray(np.repeat(mask[..., None], 3, 2).astype(np.uint8) * 255)
    image = np.asarray(fit_image(picture, 64, fit, frame=0)).astype(float)[..., 0]
    fitted = fit_mask(mask, 64, fit).numpy()
    center = lambda m: [(m.sum(1 - d) * np.arange(64)).sum() / m.sum() for d in (0, 1)]
    assert np.abs(np.subtract(center(image), center(fitted))).max() < 0.5
    scale = (64 / h) * (64 / w) if fit == "resize" else (64 / max(h, w)) ** 2
    assert abs(fitted.sum() / (36 * scale) - 1) < 0.2 and fitted.max() <= 1


def test_one_pixel_survives_the_fit():
    mask = np.zeros((1000, 1000), bool)
    mask[777, 333] = True
    assert 0 < fit_mask(mask, 512, "resize").sum() < 1 and isinstance(fit_mask(mask, 512, "resize"), torch.Tensor)
