"""
Proves of the eye chart: objects are as long as it says, and neither its questions nor its classes lean to one answer.

    pytest tests/run/test_eye_chart.py
"""
from collections import Counter

import numpy as np
import pytest

from checks import eye_chart
from toy.drawing import draw_scene
from toy.layout import CLASSES, Key


@pytest.mark.parametrize("side", eye_chart.SIDES)
def test_objects_are_as_long_as_told(side):
    for index in range(10):
        layout = eye_chart.chart_layout(index, side, 128)
        scene = draw_scene(layout, Key("test", side, index, 128), true_size=True)
        rows, columns = np.nonzero(scene.objects[0].mask) if side > 4 else ([0], [0])
        angle = layout.items[0].angle
        along = np.cos(angle) * np.asarray(columns) + np.sin(angle) * np.asarray(rows)
        assert side <= 4 or abs(np.ptp(along) + 1 - side) < 0.15 * side + 1.2
        changed = np.abs(scene.image.astype(int) - eye_chart.chart_image(index, side, 128, empty=True)).max(-1) > 30
        assert np.array_equal(scene.image, eye_chart.chart_image(index, side, 128))
        assert changed.any() or side == 2


def test_no_answer_is_likelier_than_another():
    asked = [eye_chart.asked_about(index, 8, 128) for index in range(200)]
    present = Counter((question, right("yes")) for _, _, (_, question, right) in asked)
    assert len(present) == 2 * len(CLASSES) and set(present.values()) == {20}
    colors = Counter(eye_chart.chart_layout(index, 8, 128).items[0].color for index in range(200))
    assert max(colors.values()) < 0.35 * 200


def test_a_caption_must_name_its_class_and_no_other():
    assert eye_chart.names("two red ships on river") == {"ship"}
    assert eye_chart.names("One storage tank with a plane.") == {"storage tank", "plane"}
    right = eye_chart.asked_about(0, 8, 128)[0][2]
    assert right("one red storage tank over sand") and not right("one storage tank and one ship")
