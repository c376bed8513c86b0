"""Commands from their arguments to what they print, with a fake model behind them."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from fakes import FakeLM

from cabochon.base.errors import BadInput

Command = Callable[..., Any]


def three_lines(text: str) -> list[str]:
    """The lines of an error, which are always these three."""
    lines = text.splitlines()
    assert len(lines) == 3, text
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("  cause: ")
    assert lines[2].startswith("  hint: ")
    return lines


# Usage


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["chta"], "did you mean chat?"),
        (["frobnicate"], "`cabochon --help`"),
        (["--versoin"], "`cabochon --help`"),
        (["chat", "--temperatur", "1"], "did you mean --temperature?"),
        (["chat", "--sed=1"], "did you mean --seed?"),
        (["chat", "--dtype", "float8"], "`cabochon chat --help`"),
        (["chat", "--temperature", "warm"], "`cabochon chat --help`"),
        (["chat", "--top-k"], "`cabochon chat --help`"),
        (["chat", "a", "b"], "`cabochon chat --help`"),
        (["chat", "--top-p", "3"], "change top_p"),
        (["run"], "cabochon run"),
        (["run", "a", "b", "c"], "cabochon run"),
        (["run", "--temperatur", "1", "hi"], "did you mean --temperature?"),
        (["run", "--system-prompt", "x", "--raw", "hi"], "put the text into the prompt"),
        (["pull"], "`cabochon pull --help`"),
        (["init", "--out", "x"], "`cabochon init --help`"),
        (["init", "--preset", "3b", "--out", "x"], "`cabochon init --help`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(command: Command, lm: FakeLM, arguments: list[str], hint: str) -> None:
    result = command(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert hint in three_lines(result.err)[2]
    assert lm.asked == []


@pytest.mark.parametrize("name", ["chat", "run", "pull", "list", "show", "quantize", "init", "doctor"])
def test_help_has_an_example_and_json(command: Command, name: str) -> None:
    result = command(name, "--help")
    assert result.code == 0
    assert "Example: " in result.out
    assert f"cabochon {name}" in result.out
    assert "--json" in result.out


def test_no_command_prints_help(command: Command) -> None:
    assert "Usage: cabochon COMMAND" in command().out


# run


def test_run_prints_only_the_answer(command: Command, lm: FakeLM) -> None:
    result = command("run", "2+2")
    assert (result.code, result.out, result.err) == (0, "echo 2+2\n", "")
    assert lm.asked == [[{"role": "user", "content": "2+2"}]]


def test_run_raw_continues_the_text_as_it_is(command: Command, lm: FakeLM) -> None:
    command("run", "some/model", "Once ", "--raw")
    assert lm.asked == ["Once "]


def test_run_without_turn_tokens_continues_the_text(command: Command, lm: FakeLM) -> None:
    lm.turn_tokens = False
    command("run", "Once")
    assert lm.asked == ["Once"]


def test_run_folds_the_system_prompt(command: Command, lm: FakeLM) -> None:
    command("run", "hi", "--system-prompt", "Be brief.")
    (message,) = lm.asked[0]
    assert message["role"] == "user"
    assert "Be brief." in message["content"]
    assert "hi" in message["content"]


def test_run_passes_sampling_on(command: Command, lm: FakeLM) -> None:
    command(
        "run",
        "hi",
        "--max-new-tokens",
        "7",
        "--temperature",
        "0.5",
        "--stop",
        "a",
        "--stop",
        "b",
        "--seed",
        "3",
    )
    sampling = lm.sampling[0]
    assert (sampling["max_new_tokens"], sampling["temperature"], sampling["seed"]) == (7, 0.5, 3)
    assert sampling["stop"] == ("a", "b")


def test_run_json(command: Command, lm: FakeLM) -> None:
    answer = json.loads(command("run", "hi", "--json").out)
    assert answer["text"] == "echo hi"
    assert answer["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 2


def test_run_reads_standard_input(command: Command, lm: FakeLM) -> None:
    command("run", "-", stdin="größer\n".encode())
    assert lm.asked == [[{"role": "user", "content": "größer\n"}]]


def test_run_takes_a_prompt_that_begins_with_a_dash(command: Command, lm: FakeLM) -> None:
    command("run", "- one item")
    command("run", "-3+5")
    assert [m[0]["content"] for m in lm.asked] == ["- one item", "-3+5"]


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_run_refuses_an_empty_prompt(command: Command, lm: FakeLM, prompt: str) -> None:
    for result in (command("run", prompt), command("run", "-", stdin=prompt.encode())):
        assert result.code == 3
        assert "empty" in three_lines(result.err)[0]
    assert lm.asked == []


def test_run_names_the_first_byte_that_is_not_utf8(command: Command, lm: FakeLM) -> None:
    result = command("run", "-", stdin=b"caf\xe9 au lait")
    assert result.code == 3
    assert "byte 3 (0xe9)" in three_lines(result.err)[1]


def test_run_refuses_an_argument_that_is_not_utf8(command: Command, lm: FakeLM) -> None:
    result = command("run", "caf\udce9")
    assert result.code == 2
    three_lines(result.err)


# chat behind a pipe


def test_chat_answers_line_by_line(command: Command, lm: FakeLM) -> None:
    result = command("chat", stdin=b"one\r\n\n  \ntwo")
    assert (result.code, result.out, result.err) == (0, "echo one\necho two\n", "")
    assert [m["content"] for m in lm.asked[1]] == ["one", "echo one", "two"]


def test_chat_commands_work_in_a_pipe_and_keep_standard_output_clean(command: Command, lm: FakeLM) -> None:
    result = command("chat", stdin=b"one\n/reset\ntwo\n/quit\nthree\n")
    assert result.out == "echo one\necho two\n"
    assert "starts anew" in result.err
    assert len(lm.asked[1]) == 1


def test_chat_json_is_one_line_per_answer(command: Command, lm: FakeLM) -> None:
    lines = command("chat", "--json", stdin="eins\nzwei ä\n".encode()).out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["eins", "zwei ä"]
    assert json.loads(lines[1])["text"] == "echo zwei ä"


def test_chat_stops_at_a_line_that_is_not_utf8(command: Command, lm: FakeLM) -> None:
    result = command("chat", stdin=b"one\ntw\xff\nthree\n")
    assert result.code == 3
    assert result.out == "echo one\n"
    assert "byte 6 (0xff)" in three_lines(result.err)[1]


def test_chat_reports_dropped_turns_on_standard_error(command: Command, lm: FakeLM) -> None:
    lm.context_length = 12
    result = command("chat", stdin=b"one two\nthree four\nfive six\n")
    assert "oldest 1 turn" in result.err
    assert len(result.out.splitlines()) == 3


def test_chat_with_a_message_longer_than_the_context(command: Command, lm: FakeLM) -> None:
    lm.context_length = 4
    result = command("chat", stdin=b"one two three four five\n")
    assert result.code == 3
    three_lines(result.err)


def test_chat_system_prompt(command: Command, lm: FakeLM) -> None:
    command("chat", "--system-prompt", "Be brief.", stdin=b"one\n")
    assert "Be brief." in lm.asked[0][0]["content"]


def test_ctrl_c_in_a_pipe_ends_quietly(command: Command, lm: FakeLM) -> None:
    lm.script = [["half", KeyboardInterrupt()]]
    result = command("chat", stdin=b"one\n")
    assert (result.code, result.err) == (130, "")


def test_an_error_of_the_model_is_three_lines(command: Command, lm: FakeLM) -> None:
    lm.script = [[BadInput("it broke", "a test\nwanted it", "go on")]]
    result = command("chat", stdin=b"one\n")
    assert result.code == 3
    three_lines(result.err)


# Exit codes and pipes


@pytest.mark.parametrize("code", [0, 1])
def test_a_command_can_give_an_exit_code(command: Command, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def judge() -> int:
        return code

    monkeypatch.setattr("cabochon.cli.doctor.doctor", judge)
    assert command("doctor").code == code


def test_a_reader_that_leaves_is_no_error() -> None:
    script = (
        "import sys; from cabochon.cli import main, models;"
        "models.list_models = lambda: print('x' * 100_000);"
        "sys.exit(main.main(['list']))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


@pytest.mark.parametrize(
    ("free_gib", "bandwidth", "best"),
    [
        (4, 30e9, "2b int8"),
        (24, 30e9, "9b int4"),
        (24, 100e9, "27b int4"),
        (12, 100e9, "9b int8"),
        (200, 900e9, "27b bf16"),
        (24, 4e9, "2b int4"),
        (1, 30e9, "ships inside"),
    ],
)
def test_doctor_recommends_what_fits_and_can_be_read_along_with(free_gib: int, bandwidth: float, best: str) -> None:
    from cabochon.base.machine import Machine
    from cabochon.cli.doctor import FORMS, recommend, run_estimate
    from cabochon.model.config import PRESETS, Gemma2Config

    machine = Machine("", 2, (), free_gib * 2**30, free_gib * 2**30, (), 0, bandwidth)
    sizes = {
        f"{name} {form}": run_estimate(machine, Gemma2Config.preset(name), bits)
        for name in PRESETS
        for form, bits in FORMS.items()
    }
    assert best in recommend(sizes)
