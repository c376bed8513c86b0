"""Every command that a page shows runs through the real shell, and prints what the page says."""

import re
from pathlib import Path

import pytest
from blocks import PAGES, ROOT, Command, commands, prose, table
from shell import run

from cabochon.cli.main import COMMANDS

NETWORK, LARGE, TESTS = "needs the network", "writes or reads gigabytes", "runs these very tests"
SERVES = "serves until it is told to end, or asks a server; tests/http does both"
FILES = "needs a model and texts of the reader's own"
NOT_RUN = {
    "make test": TESTS,
    ".venv/bin/cabochon pull google/gemma-2-2b-it": NETWORK,
    ".venv/bin/cabochon chat google/gemma-2-2b-it": NETWORK,
    'cabochon chat google/gemma-2-2b-it --system-prompt "Answer briefly."': NETWORK,
    'cabochon run google/gemma-2-2b --raw "The capital of France is"': NETWORK,
    "cabochon pull google/gemma-2-2b-it": NETWORK,
    "cabochon quantize google/gemma-2-2b-it gemma-2b-int8 --bits 8": NETWORK,
    "cabochon merge slerp.yml my-merge": FILES,
    "cabochon merge slerp.yml --dry-run": FILES,
    "cabochon merge ties.yml --inspect --plot angles.svg": FILES,
    "cabochon merge slerp.yml --sweep t=0:1:5 --on my-texts.txt --plot curve.svg": FILES,
    "cabochon quantize my-model my-model-int4 --bits 4 --text my-texts.txt": FILES,
    "cabochon teacher-logits google/gemma-2-9b --data texts.jsonl --out teacher-9b --sampled": NETWORK,
    "cabochon teacher-logits my-model --data chats.jsonl --out teacher --k 32 --weights int8": FILES,
    "cabochon show google/gemma-2-9b-it": NETWORK,
    "cabochon synthesize google/gemma-2-9b-it --data prompts.jsonl --out answers.jsonl --temperature 0.7": NETWORK,
    "cabochon synthesize --data sums.jsonl --best-of 8 --pairs --reward exact --temperature 1 --out pairs.jsonl": FILES,
    "cabochon generate-dataset prompts.jsonl answers --model google/gemma-2-9b-it --ray 8 --ray-gpus 1": NETWORK,
    "cabochon eval google/gemma-2-9b --tasks gemma2-report --out runs/9b": NETWORK,
    "cabochon eval --compare runs/9b runs/mine": FILES,
    "cabochon train pretrain start --data texts.jsonl --steps 2000 --out runs/first": FILES,
    "cabochon train sft google/gemma-2-2b --data chats.jsonl --lora-rank 16 --out runs/mine": NETWORK,
    "cabochon train sft --config runs/mine/settings.toml --out runs/again": FILES,
    "cabochon train distill student --teacher google/gemma-2-9b --data texts.jsonl --steps 500 --out runs/taught": (
        NETWORK
    ),
    "cabochon train distill student --teacher-logits stored --epochs 2 --out runs/taught": FILES,
    "cabochon train distill student --teacher google/gemma-2-9b-it --prompts prompts.jsonl --out runs/own": NETWORK,
    "cabochon train dpo --prompts sums.jsonl --reward exact --steps 200 --out runs/online": FILES,
    "cabochon warp warp.toml runs/warp --baseline": FILES,
    "cabochon train dpo google/gemma-2-2b-it --data pairs.jsonl --lora-rank 16 --out runs/dpo": NETWORK,
    "cabochon train reward google/gemma-2-2b-it --data pairs.jsonl --held-out 0.05 --out runs/reward": NETWORK,
    "cabochon train policy --prompts sums.jsonl --reward exact --steps 200 --out runs/policy": FILES,
    "cabochon train policy mine --prompts p.jsonl --reward rewards.py:polite --reward length:400 --out runs/own": FILES,
    "cabochon init --preset 2b --out my-model": LARGE,
    "cabochon serve": SERVES,
    "cabochon serve google/gemma-2-9b-it --host 0.0.0.0 --api-keys keys.txt": NETWORK,
    "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' "
    """-d '{"messages": [{"role": "user", "content": "What is 2+3?"}]}'""": SERVES,
    "cabochon init --preset 2b --out random-2b && cabochon bench random-2b": LARGE,
}
SLOW = ("cabochon bench", "cabochon doctor")  # they measure the machine, whatever that gives

ALL = {command.text: command for page in PAGES for command in commands(page)}
RUN = [
    pytest.param(command, id=text, marks=[pytest.mark.slow] if text in SLOW else [])
    for text, command in ALL.items()
    if text not in NOT_RUN
]


def complaints(command: Command, folder: Path) -> list[str]:
    """A command fails if and only if the page shows its error."""
    code, printed = run(command.text, folder)
    found = []
    if (code != 0) != (command.shown or "").startswith("error: "):
        found.append(f"{command.where}: exit code {code}\n{printed}")
    if command.shown is not None and printed != command.shown:
        found.append(f"{command.where}: the page shows\n{command.shown}but the command prints\n{printed}")
    return found


@pytest.mark.parametrize("command", RUN)
def test_command(command: Command, tmp_path: Path) -> None:
    assert complaints(command, tmp_path) == []


def test_what_is_not_run_is_still_in_the_docs() -> None:
    assert set(NOT_RUN) - set(ALL) == set()


def test_a_command_has_one_output() -> None:
    shown: dict[str, str] = {}
    for command in (command for page in PAGES for command in commands(page) if command.shown is not None):
        assert shown.setdefault(command.text, command.shown) == command.shown


def test_the_readme_lists_every_command() -> None:
    rows = table(ROOT / "README.md", "## The command line", "command", "what it does")
    words = [row.split()[1:3] for row in rows]
    assert [" ".join(two) if " ".join(two) in COMMANDS else two[0] for two in words] == list(COMMANDS)


def test_make_targets_exist() -> None:
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    named = {found for page in PAGES for _, line in prose(page) for found in re.findall(r"`make ([\w-]+)", line)}
    assert named - targets == set()
    assert "test" in named


# The check itself


@pytest.mark.parametrize(
    ("command", "count"),
    [
        (Command("x", "echo yes", "yes\n"), 0),
        (Command("x", "echo yes", "no\n"), 1),
        (Command("x", "echo yes"), 0),
        (Command("x", "exit 3"), 1),
        (Command("x", "echo 'error: no' >&2; exit 2", "error: no\n"), 0),
        (Command("x", "echo 'error: no'", "error: no\n"), 1),
        (Command("x", "exit 3", "yes\n"), 2),
    ],
    ids=lambda value: value.text if isinstance(value, Command) else "",
)
def test_a_wrong_output_or_exit_code_is_seen(command: Command, count: int, tmp_path: Path) -> None:
    assert len(complaints(command, tmp_path)) == count


def test_commands_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\n# first\na\n\nb | c\n```\n\n```sh\nd\n```\n\n```text\nout\n```\n\n"
        "```console\n$ e\n1\n2\n$ f\n```\n\n```text\nUsage: x\n\nExample: g h\ni\n\nExample: j\n\n─\n```\n"
    )
    found = [(command.text, command.shown) for command in commands(page)]
    expected = [("a", None), ("b | c", None), ("d", "out\n"), ("e", "1\n2\n"), ("f", ""), ("g h i", None), ("j", None)]
    assert found == expected
