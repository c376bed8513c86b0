import math
from html.parser import HTMLParser

import pytest
from rich.console import Console

from cabochon.evaluate.page import page
from cabochon.evaluate.results import Failure, Report, Result, Spread, read_items, read_report, write_items
from cabochon.evaluate.show import markdown, table
from cabochon.evaluate.suites import SUITES, published_beside
from cabochon.evaluate.summary import bits_stderr
from cabochon.model.config import Gemma2Config

RESULTS = [
    Result("mmlu", "MMLU", "acc,none", 0.7134, 0.0036, 14042, 5, True, published={"Gemma 2 9b, report": 0.713}),
    Result("mmlu_anatomy", "anatomy", "acc,none", 0.6, 0.04, 135, 5, True, part_of="mmlu"),
    Result("gsm8k", "GSM8K", "exact_match,strict-match", 0.6801, None, 1319, 5, True, truncated=3),
    Result("mini_code", "code", "bits_per_byte,none", 1.6429, 0.02, 321, 0, False, random=8.0, majority=4.47),
]
FAILURE = Failure("x", "the data of x is not here", "no network", "fetch it | first", 4)
REPORT = Report("a <model>", {"tasks": "a"}, RESULTS, [FAILURE], [Spread("MMLU", "acc", 12, 0.7, 0.01, 0.68, 0.72)],
                ["interrupted"], 3.5)  # fmt: skip
ITEM = {"id": 7, "key": "k", "filter": "none", "prompt": "<b>What?</b>\nAnswer:", "choices": [" a", " b"], "target": 1,
        "answers": [[-1.0, True], [-2.0, False]], "raw": [], "scores": {"acc": 0.0}}  # fmt: skip


def test_a_report_comes_back_as_it_was(tmp_path):
    REPORT.write(tmp_path)
    assert read_report(tmp_path) == REPORT
    write_items(tmp_path, "mmlu", [ITEM, {**ITEM, "prompt": "half \ud800 of a pair"}])
    assert read_items(tmp_path, "mmlu")[0] == ITEM
    assert len(read_items(tmp_path, "mmlu")) == 2
    assert read_items(tmp_path, "other") == []


def test_markdown_has_every_number_on_its_scale():
    text = markdown(REPORT)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert ["MMLU", "71.3", "0.4", "14042", "5", "", "", "71.3"] in rows
    assert ["GSM8K", "68.0", "", "1319", "5", "", "", ""] in rows
    assert ["code, bits per byte", "1.643", "0.020", "321", "0", "8.000", "4.470", ""] in rows
    assert ["anatomy", "60.0", "4.0", "135"] in rows
    assert ["MMLU", "12", "70.0", "1.0", "68.0", "72.0"] in rows
    assert "fetch it" in text
    assert "lost their beginning: GSM8K 3" in text
    assert "interrupted" in text


def test_the_terminal_shows_what_was_asked_for():
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table(REPORT))
    text = console.export_text()
    assert "71.3" in text
    assert "anatomy" not in text  # a part


class Checker(HTMLParser):
    """Collects open elements, so that a page whose elements do not close is seen."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_sound_stands_alone_and_escapes():
    text = page(REPORT, {"mmlu": [ITEM] * 600})
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.links == []
    assert "svg" in checker.seen
    assert checker.seen.count("details") == 500
    assert "The first 500 of 600" in text
    assert "&lt;b&gt;What?" in text
    assert "<b>What?" not in text
    assert "a &lt;model&gt;" in text
    assert 'class="item wrong"' in text


@pytest.mark.parametrize(
    ("size", "columns"),
    [
        ("2b", ["Gemma 2 2b, report"]),
        ("9b", ["Gemma 2 9b, report", "Gemma 2 9b, announcement", "Mistral 7b", "Llama 3 8b", "Gemma 1 7b"]),
        ("27b", ["Gemma 2 27b, report", "Gemma 2 27b, announcement", "Llama 3 70b", "Qwen 1.5 32b"]),
        ("tiny", ["Gemma 2 2b, report", "Gemma 2 9b, report", "Gemma 2 27b, report"]),
    ],
)
def test_published_numbers_are_those_of_the_size(size, columns):
    import dataclasses

    config = Gemma2Config.preset(size)
    suite = SUITES["gemma2-report"]
    assert list(published_beside(suite, config)) == columns
    if size != "tiny":  # a chat model, with another window
        changed = dataclasses.replace(config, eos_ids=(1, 107), sliding_window=1024)
        assert list(published_beside(suite, changed)) == columns


def test_every_published_number_has_a_task():
    for suite in SUITES.values():
        labels = {entry.label for entry in suite.entries}
        assert all(set(scores) == labels for scores in suite.published.values())


def test_the_error_of_bits_per_byte_is_that_of_items():
    pairs = [(-math.log(2) * bits * size, size) for bits, size in [(1, 10), (2, 10), (3, 10), (2, 10)]]
    mean = 2.0
    plain = math.sqrt(sum((bits - mean) ** 2 for bits in (1, 2, 3, 2)) / 3 / 4)
    assert bits_stderr(pairs) == pytest.approx(plain)
    assert bits_stderr(pairs[:1]) is None
