"""
Proves on a few hundred damaged records that `data.py check` reports each in one line, or training can read it.
`python -m checks.fuzz 2000` is the same at length.

    pytest tests/data/test_fuzz.py
"""
import pytest

from checks.fuzz import fuzz


@pytest.mark.parametrize("chat, fit", [("vicuna", "letterbox"), ("llama-3", "resize")])
def test_damaged_records_are_reported_or_trained_on(tmp_path, chat, fit):
    reported, passed = fuzz(150, 1, tmp_path, chat, fit)
    assert reported > 60 and passed > 10, "the damage is all of one kind"
