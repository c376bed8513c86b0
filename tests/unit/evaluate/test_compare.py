import math
import random

import pytest

from cabochon.base.errors import BadInput, MissingResource
from cabochon.evaluate.compare import compare
from cabochon.evaluate.results import Report, Result, write_items


def item(number, score, metric="acc"):
    return {"id": number, "key": f"k{number}", "filter": "none", "scores": {metric: score}}


def write(folder, scores, metric="acc", better=True, task="t"):
    result = Result(task, task, f"{metric},none", 0.0, None, len(scores), 0, better)
    Report("m", {}, [result], [], [], [], 1.0).write(folder)
    write_items(folder, task, [item(n, s, metric) for n, s in scores])
    return folder


def test_a_difference_of_all_items_is_certain_and_a_draw_is_not(tmp_path):
    draw = random.Random(0)
    a = [(n, float(draw.random() < 0.5)) for n in range(300)]
    b = [(n, 1.0 if n % 5 == 0 else s) for n, s in a]
    first, second = write(tmp_path / "a", a), write(tmp_path / "b", b)
    (found,) = compare(first, second)
    assert found.first == pytest.approx(sum(s for _, s in a) / 300)
    assert found.second == pytest.approx(sum(s for _, s in b) / 300)
    assert found.low < found.difference < found.high
    assert found.certain
    assert found.share < 0.001
    (turned,) = compare(second, first)
    assert turned.share > 0.999
    (same,) = compare(first, first)
    assert (same.difference, same.low, same.high, same.certain) == (0, 0, 0, False)


def test_the_interval_is_that_of_the_differences(tmp_path):
    """For a mean, a bootstrap agrees with what the central limit says of the paired differences."""
    draw = random.Random(1)
    a = [(n, draw.gauss(0, 5)) for n in range(400)]
    b = [(n, s + draw.gauss(0.1, 1)) for n, s in a]  # what both share takes no part
    (found,) = compare(write(tmp_path / "a", a), write(tmp_path / "b", b))
    differences = [y - x for (_, x), (_, y) in zip(a, b, strict=True)]
    mean = sum(differences) / 400
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 399 / 400)
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_items_are_matched_by_content(tmp_path):
    a, b = [(n, 1.0) for n in range(10)], [(n, 0.0) for n in (9, 3, 12)]
    (found,) = compare(write(tmp_path / "a", a), write(tmp_path / "b", b))
    assert (found.items, found.first, found.second) == (2, 1, 0)


def test_bits_per_byte_are_a_ratio_of_sums_and_less_is_better(tmp_path):
    a = [(n, [-math.log(2) * 3 * (n + 1), n + 1]) for n in range(30)]
    b = [(n, [-math.log(2) * 2 * (n + 1), n + 1]) for n in range(30)]
    first = write(tmp_path / "a", a, "bits_per_byte", better=False)
    (found,) = compare(first, write(tmp_path / "b", b, "bits_per_byte", better=False))
    assert (found.first, found.second) == (pytest.approx(3), pytest.approx(2))
    assert found.share == 0
    assert found.certain


def test_runs_without_common_items_and_folders_without_runs(tmp_path):
    first = write(tmp_path / "a", [(n, 1.0) for n in range(5)])
    with pytest.raises(BadInput, match="cannot be compared"):
        compare(first, write(tmp_path / "b", [(n, 1.0) for n in range(5)], task="other"))
    with pytest.raises(BadInput, match="cannot be compared"):
        compare(first, write(tmp_path / "c", [(n, 1.0) for n in range(7, 12)]))
    with pytest.raises(MissingResource, match="cannot be read"):
        compare(first, tmp_path / "none")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "report.json").write_text('{"model": 3}')
    with pytest.raises(BadInput, match="not a report"):
        compare(first, tmp_path / "d")
