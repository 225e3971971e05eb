"""Escape sequences in texts of models, data and files are shown on a terminal, never obeyed."""

import ast
import io
import json
import logging
import shutil
import sys
import warnings
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

import rlhf_accel
from rlhf_accel import __main__ as command_line
from rlhf_accel.runs.progress_line import ProgressLine
from rlhf_accel.system import terminal
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.system.terminal import Terminal, guard_messages, say, visible
from rlhf_accel.training.ppo_trainer import PPOTrainer

EVIL = "a\x1b]0;owned\x07\x1b[2J\x1b[1A\rb\x9b31mc\u202ed\u2028"
SHOWN = r"a\x1b]0;owned\x07\x1b[2J\x1b[1A\rb\x9b31mc\u202ed\u2028"


def obeyed(text: str) -> set[str]:
    return set(text) & set("\x1b\x07\r\x9b\u202e\u2028")


def test_control_characters_are_shown_and_letters_stay() -> None:
    assert visible(EVIL) == SHOWN == visible(SHOWN)
    for text in ("two\nlines\tand a tab", "naïve café", "中\u3000文", "می\u200cخواهم", "👩\u200d🔬", "\xa0", ""):
        assert visible(text) == text
    assert visible("\udc80") == "\\udc80"


def test_all_printing_goes_through_terminal_py() -> None:
    found = set()
    for path in Path(rlhf_accel.__file__).parent.rglob("*.py"):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name) and node.id in ("print", "Console"):
                found.add(f"{path.name}:{node.lineno} {node.id}")
            if isinstance(node, ast.Attribute) and node.attr == "write" and "sys.std" in ast.unparse(node):
                found.add(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    assert not found


@pytest.mark.parametrize("tty", [False, True])
def test_text_in_rich_is_escaped_and_its_own_colours_work(tty) -> None:
    out = io.StringIO()
    console = Terminal(file=out, force_terminal=tty, width=200)
    table = Table(title=EVIL)
    table.add_column(EVIL, header_style="red")
    table.add_row(Text(EVIL))
    for renderable in (EVIL, table):
        console.print(renderable, markup=False, style="red")
    text = out.getvalue()
    assert r"\x1b]0;owned" in text and r"\x1b[2J" in text
    assert "\x1b]0" not in text and "\x1b[2J" not in text and not obeyed(text) - {"\x1b"}
    assert ("\x1b[31m" in text) == tty


def test_the_progress_line_is_escaped(capsys) -> None:
    with ProgressLine(2, enabled=True) as line:
        line.say(f"warning: {EVIL}")
        line.advance(1, EVIL)
        line.table(EVIL, [{"prompt": EVIL, "score": 1.0}])
    assert not obeyed(capsys.readouterr().out)


def test_errors_warnings_logs_and_tracebacks_are_escaped(capsys, monkeypatch) -> None:
    for kind in (ConfigError, RunFailed):
        assert not obeyed(str(kind(f"prompt {EVIL} is too long")))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    factory = logging.getLogRecordFactory()
    try:
        guard_messages()
        guard_messages()
        sys.stderr.write(warnings.formatwarning(EVIL, UserWarning, "f.py", 1))
        handler = logging.StreamHandler(sys.stderr)
        log = logging.getLogger("tests.terminal")
        log.addHandler(handler)
        log.warning("%s is odd", EVIL)
        log.removeHandler(handler)
        try:
            raise OSError(EVIL)
        except OSError as error:
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        logging.setLogRecordFactory(factory)
    say(EVIL)
    output = capsys.readouterr()
    assert output.out == f"{SHOWN}\n"
    assert output.err.count(SHOWN) == 3 and "Traceback" in output.err
    assert not obeyed(output.err)


def test_replaying_a_downloaded_dump_is_escaped(tiny, tmp_path, capsys) -> None:
    """Its message, its traceback, its prompts and the error of its reward."""
    PPOTrainer(tiny(run={"total_steps": 1, "output_dir": str(tmp_path / "run"), "eval_samples": 0})).fit()
    dump = tmp_path / "run" / "dumps" / "step-000001"
    dump.mkdir(parents=True)
    shutil.copy(tmp_path / "run" / "config.yaml", dump)
    facts = {"phase": "score", "message": EVIL, "traceback": EVIL, "rows": [0], "prompts": [EVIL], "responses": [EVIL]}
    (dump / "dump.json").write_text(json.dumps(facts))
    capsys.readouterr()
    command_line.main(["replay", str(dump), "--trust_code"])
    output = capsys.readouterr()
    assert r"\x1b]0;owned" in output.out
    assert not obeyed(output.out + output.err)
    # And a config that cannot be parsed.
    (dump / "config.yaml").write_text(f"run: {{'{EVIL[:2]}': 1}}")
    with pytest.raises(SystemExit):
        command_line.main(["replay", str(dump)])
    assert not obeyed(capsys.readouterr().err)


@pytest.fixture(autouse=True)
def unguarded(monkeypatch):
    """Commands in this process would guard its messages permanently."""
    monkeypatch.setattr(command_line, "guard_messages", lambda: None)
    assert terminal.visible is visible


def test_only_one_remark_of_deepspeed_is_dropped(caplog):
    terminal.drop_remarks()
    log = logging.getLogger("DeepSpeed")
    with caplog.at_level(logging.WARNING, "DeepSpeed"):
        log.addHandler(caplog.handler)
        log.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
        log.warning("Unable to find hostfile")
        log.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"Unable to find hostfile"}
