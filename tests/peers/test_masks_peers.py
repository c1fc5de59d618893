"""Masks against pycocotools: polygons of many kinds, run lengths compressed and not, every pixel equal."""
import numpy as np
import pycocotools.mask as coco
import pytest

from pictures.mask_files import decode_mask, fill_polygons


def published(polygons, w, h):
    return coco.decode(coco.merge(coco.frPyObjects(polygons, h, w))).astype(bool)


@pytest.mark.parametrize("seed", range(4))
def test_polygons_fill_the_same_pixels(seed):
    rng = np.random.default_rng(seed)
    for trial in range(150):
        w, h = rng.integers(1, 80, 2).tolist()
        corners = rng.integers(3, 12)
        # around the image and beyond it, self-crossing, whole and broken coordinates, tiny ones
        xy = rng.uniform(-0.3, 1.3, (corners, 2)) * (w, h) * (0.1 if trial % 5 == 0 else 1)
        xy = (np.rint(xy) if trial % 3 == 0 else xy).ravel().tolist()
        assert (fill_polygons([xy], w, h) == published([xy], w, h)).all(), (xy, w, h)


def test_several_polygons_are_their_union():
    rng = np.random.default_rng(9)
    for _ in range(50):
        polygons = [(rng.uniform(0, 1, (5, 2)) * (60, 40)).ravel().tolist() for _ in range(3)]
        assert (decode_mask(polygons, (60, 40)) == published(polygons, 60, 40)).all()


def test_run_lengths_both_ways():
    rng = np.random.default_rng(5)
    for _ in range(100):
        h, w = rng.integers(1, 70, 2).tolist()
        mask = rng.random((h, w)) < rng.choice([0.02, 0.5, 0.98])
        mask[0, 0] |= not mask.any()
        run = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        text = {"size": [h, w], "counts": run["counts"].decode()}
        flat = mask.T.ravel()
        edges = np.flatnonzero(np.diff(np.concatenate(([False], flat)).astype(int))).tolist()
        counts = np.diff([0, *edges, h * w]).tolist()
        assert (decode_mask(text, (w, h)) == mask).all()
        assert (decode_mask({"size": [h, w], "counts": counts}, (w, h)) == mask).all()
