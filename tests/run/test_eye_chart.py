"""
Proves of the eye chart: objects are as long as it says, and neither its questions nor its classes lean to one answer.

    pytest tests/run/test_eye_chart.py
"""
import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from aquila import PRESETS, LoRAConfig, build, part_of
from checks import eye_chart
from tokenizer import load_tokenizer
from toy import drawing
from toy.layout import CLASSES


@pytest.mark.parametrize("side", eye_chart.SIDES)
def test_objects_are_as_long_as_told(side):
    for index in range(10):
        scene, item = eye_chart.chart_scene(index, side, 128), eye_chart.chart_layout(index, side, 128).items[0]
        rows, columns = np.nonzero(scene.objects[0].mask) if side > 4 else ([0], [0])
        along = np.cos(item.angle) * np.asarray(columns) + np.sin(item.angle) * np.asarray(rows)
        assert side <= 4 or abs(np.ptp(along) + 1 - side) < 0.15 * side + 1.2


@pytest.mark.parametrize("side", [2, 4])
def test_a_small_object_is_there_and_nothing_beyond_it_is(side, monkeypatch):
    """Foam and shadows shrink with it. Before the camera, whose light and noise differ without an object."""
    monkeypatch.setattr(drawing, "finish", lambda rng, picture, size: picture)
    for index in range(50):
        item, = eye_chart.chart_layout(index, side, 128).items
        full, bare = (eye_chart.chart_image(index, side, 128, empty) for empty in (False, True))
        rows, columns = np.nonzero(np.abs(full - bare).max(0) > 15)
        far = np.hypot(columns + 0.5 - 128 * item.x, rows + 0.5 - 128 * item.y)
        assert len(far) and far.max() < side / 2 + 2.5, index


def test_no_answer_is_likelier_than_another():
    asked = [eye_chart.asked_about(index, 8, 128) for index in range(200)]
    present = Counter((question, right("yes")) for _, _, (_, question, _, right) in asked)
    assert len(present) == 2 * len(CLASSES) and set(present.values()) == {20}
    colors = Counter(eye_chart.chart_layout(index, 8, 128).items[0].color for index in range(200))
    assert max(colors.values()) < 0.35 * 200


def test_a_caption_must_name_its_class_and_no_other():
    assert eye_chart.names("two red ships on river") == {"ship"}
    assert eye_chart.names("One storage tank with a plane.") == {"storage tank", "plane"}
    right = eye_chart.asked_about(0, 8, 128)[0][3]
    assert right("one red storage tank over sand") and not right("one storage tank and one ship")


def test_lessons_change_what_stage_2_trains_and_nothing_else():
    config = dataclasses.replace(PRESETS["tiny"], lora=LoRAConfig(rank=2, alpha=2, dropout=0.0))
    model = build(config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    eye_chart.teach(model, 2, load_tokenizer(config.llm_dir), "a model", batch=2)
    changed = {part_of(name) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"pyramid", "tokens", "mda", "lora"}
