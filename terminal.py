"""The terminal: lines, progress bars, the report of a bug, and the one way to be interrupted.

Nothing heavy is imported here at the top, so that a signal finds its listener from the first moment on.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from errors import BUG, USAGE, printable

INTERRUPTED = "interrupted; what was fetched and counted is kept in tmp: run the same command again to continue"
LAST_WORD_SECONDS = 0.5  # for what is to be done before an interrupted run ends


def open_streams():
    """Open what was closed (`>&-`), lest a file get its number; print what an encoding lacks as an escape."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")
    # Descriptor 2 is left to native code, whose log lines are kept off the screen now and then.
    sys.stderr = open(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")  # noqa: SIM115


def explain_missing_packages():
    """Say in one line what to do where an import of a package fails, as in an environment that is not activated."""

    def explain(kind, error, trace):
        if not issubclass(kind, ModuleNotFoundError):
            sys.__excepthook__(kind, error, trace)
            return
        sys.stderr.write(f"error: {error}: activate the environment, or install requirements.txt into it\n")
        os._exit(USAGE)

    sys.excepthook = explain


def end_on_signals():
    """From now on SIGINT, SIGTERM and SIGHUP end the process at once, with one line and 128 + the signal's number.

    Nothing is cleaned up: what must outlive the process is whole on disk at any moment. A thread waits for the signals,
    so it does not matter what the others do. `nohup` keeps its meaning.

    Returns
    -------
    list
        Functions of no argument may be appended: they are called before the end, and have LAST_WORD_SECONDS.
    """
    ends = {signal.SIGINT, signal.SIGTERM}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        ends.add(signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # all threads that follow inherit this
    screen = os.dup(2)  # libraries are kept off descriptor 2 now and then
    last_words = []

    def wait():
        code = 128 + signal.sigwait(ends)
        with contextlib.suppress(OSError):
            os.write(screen, ("\n" * os.isatty(screen) + f"error: {INTERRUPTED}\n").encode())
        for say in list(last_words):
            saying = threading.Thread(target=say, daemon=True)
            saying.start()
            saying.join(LAST_WORD_SECONDS)
        os._exit(code)

    threading.Thread(target=wait, daemon=True).start()
    return last_words


def show(line=""):
    """Print a line to stdout. That nobody reads it any more (`| head`) is no reason to lose a result."""
    _write(line, sys.stdout)


def warn(line):
    """Print a warning to stderr."""
    _write(f"warning: {line}", sys.stderr)


def fail(line):
    """Print an error to stderr."""
    _write(f"error: {line}", sys.stderr)


def _write(line, stream):
    from tqdm import tqdm

    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
        tqdm.write(printable(line), file=stream)  # without disturbing progress bars
        stream.flush()


def progress(title, total, **options):
    """A progress bar with rates, where somebody watches."""
    from tqdm import tqdm

    return tqdm(desc=title, total=total, disable=None, dynamic_ncols=True, mininterval=0.25, **options)


def report_bug(folder):
    """Say that the exception at hand is a bug, keep its traceback in `folder`, and show it."""
    report = f"{' '.join(sys.argv)}\nPython {sys.version}\n{traceback.format_exc()}"
    path = Path(folder) / f"bug_{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(report, errors="backslashreplace")
        kept = f"the report to send is {path}"
    except OSError as error:
        kept = f"no report could be kept ({error.strerror or error}), so send what follows"
    fail(f"this is a bug in this program (exit code {BUG}), not your mistake; {kept}")
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(report)
