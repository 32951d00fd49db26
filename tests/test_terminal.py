"""The terminal: what ends a process, in any state and only once; the report of a bug; streams that are closed."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT, assert_one_error_line, run_tool

from errors import BUG, USAGE

STATES = {  # what the main thread does when the signal comes; it prints "here" first
    "wait": "print('here', flush=True)\nimport time\nwhile True: time.sleep(60)",
    "imports": "print('here', flush=True)\nwhile True:\n import tensorflow\n for n in list(sys.modules):\n  "
    "if n.startswith('tensorflow'): del sys.modules[n]",
    "native": "import numpy\na = numpy.ones((4000, 4000))\nprint('here', flush=True)\nwhile True: a @ a",
    "destructor": "import time\nclass A:\n def __del__(self):\n  print('here', flush=True)\n"
    "  while True: time.sleep(1)\n"
    "a = A()\ndel a",
    "thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"
    "print('here', flush=True)",
}


def start(code, stderr=subprocess.PIPE, **options):
    program = f"import sys\nimport terminal\nlast_words = terminal.end_on_signals()\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        **options,
    )


def error_line(process):
    lines = [line for line in process.communicate(timeout=60)[1].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("state", STATES)
def test_a_signal_ends_the_process_in_any_state(state):
    number = list(STATES).index(state) % 3
    number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[number]
    process = start(STATES[state])
    assert process.stdout.readline() == "here\n"
    for _ in range(3):  # impatient users press Ctrl-C several times
        process.send_signal(number)
    assert "interrupted" in error_line(process)
    assert process.returncode == 128 + number


def test_sigint_ends_a_process_that_was_started_in_the_background():
    process = start(STATES["wait"], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    error_line(process)
    assert process.returncode == 130


def test_nohup_protects_from_sighup():
    process = start(
        "print('here', flush=True)\nsys.stdin.read()\nprint('done')",
        stdin=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate("", timeout=60) == ("done\n", "")


def test_last_words_are_called_but_cannot_block_the_end():
    process = start(
        "import time\nlast_words += [lambda: time.sleep(1000), lambda: print('goodbye', flush=True)]\n" + STATES["wait"]
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    assert "goodbye" in process.communicate(timeout=60)[0]
    assert process.returncode == 143


def test_of_several_threads_that_end_the_process_one_says_why():
    code = (
        "import errors, threading\nstarted = threading.Barrier(30)\ndef end(code):\n started.wait()\n"
        " terminal.end_with(errors.PeerError(f'with {code}', code))\n"
        "for code in range(1, 30): threading.Thread(target=end, args=(code,)).start()\nend(30)"
    )
    for _ in range(5):
        process = start(code)
        assert error_line(process) == f"error: with {process.returncode}"


@pytest.mark.parametrize(("seconds", "code"), [(0.2, 0), (60, 143)])
def test_a_signal_is_late_when_the_process_ends_already_unless_that_takes_too_long(seconds, code):
    ends = f"import os, time\nterminal.begin_to_end()\nprint('done', flush=True)\ntime.sleep({seconds})\nos._exit(0)"
    process = start(ends)
    assert process.stdout.readline() == "done\n"
    process.send_signal(signal.SIGTERM)
    assert ("interrupted" in process.communicate(timeout=30)[1]) == (code != 0)
    assert process.returncode == code


def test_a_signal_ends_a_process_whose_stderr_is_full():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 2**16)
    os.set_blocking(writer, True)
    process = start(STATES["wait"], stderr=writer)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    os.close(reader)
    os.close(writer)


def test_a_signal_ends_a_process_that_can_start_no_thread():
    process = start("import threading\nlast_words.append(print)\nthreading.Thread = None\n" + STATES["wait"])
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143


def test_a_line_can_be_printed_while_another_thread_imports_tqdm():
    process = start("import types\nsys.modules['tqdm'] = types.ModuleType('tqdm')\nterminal.fail('here')")
    assert error_line(process) == "error: here"


def test_a_bug_is_reported_as_a_bug(tmp_path):
    code = "try: 1 / 0\nexcept Exception: terminal.report_bug(sys.argv[1])"
    program = f"import sys, terminal\nterminal.open_streams()\n{code}"
    process = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    (report,) = tmp_path.glob("bug_*.txt")
    first, *traceback = process.stderr.splitlines()
    assert first.startswith("error: ") and "bug" in first and str(report) in first and f"exit code {BUG}" in first
    assert traceback[-1] == "ZeroDivisionError: division by zero"
    assert "ZeroDivisionError" in report.read_text()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(closed, tmp_path):
    code = (
        "import terminal; terminal.open_streams()\nwith open('file', 'w') as file:\n"
        " terminal.show('shown'); terminal.warn('warned'); file.write('content')"
    )
    command = f'"{sys.executable}" -c "{code}" {closed}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "file").read_text() == "content"
    assert process.stdout == ("" if ">&-" in closed.replace("2>&-", "") else "shown\n")
    assert process.stderr == ("" if "2>&-" in closed else "warning: warned\n")


def test_a_missing_package_is_one_error_line(tmp_path):
    (tmp_path / "yaml.py").write_text("raise ModuleNotFoundError(\"No module named 'yaml'\")")
    process = run_tool("--help", cwd=tmp_path, PYTHONPATH=tmp_path)
    assert_one_error_line(process, USAGE, "'yaml'", "requirements.txt")
