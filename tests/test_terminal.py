"""The terminal: what ends a process in any state, and characters that steer."""

import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT, assert_one_error_line, finish, run_tool, start_program

import terminal
from errors import USAGE, first_line

STATES = {  # what the main thread does when the signal comes; it prints "here" first
    "wait": "print('here', flush=True)\nimport time\nwhile True: time.sleep(60)",
    "imports": "print('here', flush=True)\nwhile True:\n import tensorflow\n for n in list(sys.modules):\n  "
    "if n.startswith('tensorflow'): del sys.modules[n]",
    "native": "import numpy\na = numpy.ones((4000, 4000))\nprint('here', flush=True)\nwhile True: a @ a",
    "destructor": "class A:\n def __del__(self):\n  print('here', flush=True)\n  while True: pass\na = A()\ndel a",
}


def start(code, *before, **options):
    program = f"import sys\nimport terminal\nterminal.prepare()\n{code}"
    environment = {"PYTHONPATH": ROOT, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONIOENCODING": "ascii"}
    process = start_program(*before, sys.executable, "-c", program, cwd=ROOT, environment=environment, **options)
    assert process.stdout.readline() == "here\n"
    return process


@pytest.mark.parametrize("state", STATES)
def test_a_signal_ends_the_process_in_any_state(state):
    number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[list(STATES).index(state) % 3]
    in_background = state == "destructor"  # where a shell ignores SIGINT
    process = start(STATES[state], signals="--ignore-signal=INT" if in_background else "--default-signal=HUP")
    for _ in range(3):  # impatient users press Ctrl-C several times
        process.send_signal(number)
    lines = finish(process).stderr.splitlines()
    assert [line for line in lines if "error: " in line] == [
        "error: interrupted; what was fetched is kept in tmp: run the same command again to continue"
    ]
    assert process.returncode == 128 + number


def test_nohup_protects_from_sighup():
    code = "print('here', flush=True)\nsys.stdin.read()\nprint('d\u00f6ne')"
    process = start(code, stdin=subprocess.PIPE, signals="--ignore-signal=HUP")
    process.send_signal(signal.SIGHUP)
    assert process.communicate("", timeout=60) == ("d\\xf6ne\n", "")  # in a terminal that lacks it


@pytest.mark.parametrize("before", [(), ("sh", "-c", 'exec "$@" 2>&-', "sh")])
def test_a_signal_ends_a_process_whose_stderr_is_gone(before):
    reader, writer = os.pipe()
    process = start(STATES["wait"], *before, stderr=writer)
    os.close(reader)
    os.close(writer)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143


def test_characters_that_steer_a_terminal_are_escaped(capsys):
    terminal.show("a\x1b[2Jb\u202ec")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\u202ec\n"


def test_the_first_line_of_an_error_is_not_blank():
    assert first_line(ValueError("\n \nsecond\nthird")) == "second" and first_line(TimeoutError()) == "TimeoutError"


def test_a_missing_package_is_one_error_line(tmp_path):
    (tmp_path / "yaml.py").write_text("raise ModuleNotFoundError(\"No module named 'yaml'\")")
    assert_one_error_line(run_tool("--help", cwd=tmp_path, PYTHONPATH=tmp_path), USAGE, "'yaml'", "requirements.txt")
