import pytest

from cabochon.base.errors import UsageError
from cabochon.evaluate.formats import FORMATS, check_formats, rewritten, spread_of
from cabochon.evaluate.results import Result


def test_twelve_formats_write_twelve_prompts():
    text = "Question: What is 2 + 2?\nA. 3\nB. 4\nAnswer:"
    prompts = {gap.join(2 * [rewritten(text, head, joint)]) for head, joint, gap in FORMATS}
    assert len(prompts) == len(FORMATS) == 12
    assert f"{text}\n\n{text}" in prompts  # the task's own
    assert all("What is 2 + 2?" in prompt for prompt in prompts)
    assert rewritten(text, str.upper, "  ") == "QUESTION: What is 2 + 2?  A. 3  B. 4  ANSWER:"


@pytest.mark.parametrize("count", [-1, 1, 13])
def test_other_numbers_of_formats_are_refused(count):
    with pytest.raises(UsageError, match="--formats"):
        check_formats(count)
    check_formats(12)
    check_formats(0)


def test_a_spread_is_over_formats():
    scores = [Result("t", "T", "acc,none", value, None, 10, 5, True) for value in (0.5, 0.6, 0.7)]
    found = spread_of(scores)
    assert (found.task, found.formats, found.lowest, found.highest) == ("T", 3, 0.5, 0.7)
    assert found.mean == pytest.approx(0.6)
    assert found.deviation == pytest.approx(0.1)
