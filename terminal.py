"""The terminal: lines, progress bars, the report of a bug, and ending on a signal.

Only quick imports stand at the top, so that `end_on_signals` can be called as soon as the program starts.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from errors import BUG, USAGE, printable

INTERRUPTED = "interrupted; what was fetched and counted is kept in tmp: run the same command again to continue"
LAST_WORD_SECONDS = 0.5  # for each of the functions that are called before an interrupted run ends
END_SECONDS = 3  # a thread that has not ended the process after this time is stuck, say in a full pipe

_ending = threading.RLock()  # held, until the process has ended, by the thread that ends it


def open_streams():
    """Make stdin, stdout and stderr usable.

    A closed one (`>&-`) becomes /dev/null; otherwise the next file to be opened would get its number, and our lines.
    Characters that the terminal's encoding does not have are printed as escapes.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")
    # A copy: at times descriptor 2 leads elsewhere, to hide log lines of native code.
    sys.stderr = open(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")  # noqa: SIM115


def explain_missing_packages():
    """Make a missing package one error line: often the environment is not activated."""

    def explain(kind, error, trace):
        if not issubclass(kind, ModuleNotFoundError):
            sys.__excepthook__(kind, error, trace)
            return
        sys.stderr.write(f"error: {error}: activate the environment, or install requirements.txt into it\n")
        os._exit(USAGE)

    sys.excepthook = explain


def end_on_signals():
    """From now on, SIGINT, SIGTERM and SIGHUP end the process immediately, with one line and exit code 128 + number.

    Nothing is cleaned up: all files that are used again are whole on disk at any moment. A thread of its own waits for
    the signals, so it does not matter what the other threads do. Under `nohup`, SIGHUP is ignored as before.

    Returns
    -------
    list
        Append functions without arguments to it: they are called before the end, each for at most LAST_WORD_SECONDS.
    """
    ends = {signal.SIGINT, signal.SIGTERM}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        ends.add(signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # threads that are started later inherit this
    screen = os.dup(2)  # at times descriptor 2 leads elsewhere
    last_words = []

    def wait():
        code = 128 + signal.sigwait(ends)
        try:
            begin_to_end()
            with contextlib.suppress(OSError):
                if select.select([], [screen], [], 0)[1]:  # else nobody reads what is there already
                    os.write(screen, ("\n" * os.isatty(screen) + f"error: {INTERRUPTED}\n").encode())
            for last_word in list(last_words):
                thread = threading.Thread(target=last_word, daemon=True)
                thread.start()
                thread.join(LAST_WORD_SECONDS)
        finally:
            os._exit(code)

    threading.Thread(target=wait, daemon=True).start()
    return last_words


def begin_to_end():
    """Make this thread the one that ends the process; if another one is ending it, wait for that (END_SECONDS).

    Else two threads that end it at the same time would print two lines, perhaps for different exit codes.
    """
    _ending.acquire(timeout=END_SECONDS)


def show(line=""):
    """Print a line to stdout. A reader that has gone (`| head`) is no error: the run still has a result to write."""
    _write(line, sys.stdout)


def warn(line):
    """Print a warning to stderr."""
    _write(f"warning: {line}", sys.stderr)


def fail(line):
    """Print the error that ends the process to stderr. If another thread is ending it already, wait for that."""
    begin_to_end()
    _write(f"error: {line}", sys.stderr)


def _write(line, stream):
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
        if tqdm := getattr(sys.modules.get("tqdm"), "tqdm", None):  # else it is not imported, or not to the end
            tqdm.write(printable(line), file=stream)  # above the progress bars
        else:
            print(printable(line), file=stream)
        stream.flush()


def end_with(error):
    """End the process with an ExpectedError, from whatever thread."""
    try:
        fail(error)
    finally:
        os._exit(error.exit_code)


def progress(title, total, **options):
    """A progress bar with rates; shown only on a terminal."""
    from tqdm import tqdm

    return tqdm(desc=title, total=total, disable=None, dynamic_ncols=True, mininterval=0.25, **options)


def report_bug(folder):
    """Show that the exception being handled is a bug, with its traceback, and save a report in `folder`."""
    report = f"{' '.join(sys.argv)}\nPython {sys.version}\n{traceback.format_exc()}"
    path = Path(folder) / f"bug_{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}_{os.getpid()}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(report, errors="backslashreplace")
        where = f"please send the report {path}"
    except OSError as error:
        where = f"the report could not be saved ({error.strerror or error}), so please send the lines below"
    fail(f"this is a bug in this program (exit code {BUG}), not your mistake; {where}")
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(report)
