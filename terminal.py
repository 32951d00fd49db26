"""The terminal: lines, progress bars, and ending on a signal.

Only quick imports stand at the top, so that `prepare` can be called as soon as the program starts.
"""

import contextlib
import os
import signal
import sys
import threading

from errors import USAGE, printable

kept = ""  # the images whose counts are kept, as in "8 of 11 images"; an interruption says so
warned = []  # every warning of this run, in order


def prepare():
    """End with one line on a signal or a missing package; never fail on a character that the terminal lacks."""
    if not sys.platform.startswith("linux"):
        sys.exit(_end(USAGE, f"this program runs on Linux, not on {sys.platform}: use a VM, a container or WSL"))
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as some schedulers of jobs do
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # for characters that the terminal's encoding does not have
    sys.excepthook = _explain_missing_package
    ends = {signal.SIGINT, signal.SIGTERM}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        ends.add(signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # threads that are started later inherit this
    threading.Thread(target=_end_on_signal, args=(ends,), daemon=True).start()


def _end_on_signal(ends):
    """Wait for a signal, whatever the other threads do, and end the process at once: what is kept is whole on disk."""
    number = signal.sigwait(ends)
    line_break = "\n" * sys.stderr.isatty()  # below a progress bar
    what = f"what was fetched and the counts of {kept} are" if kept else "what was fetched is"
    os._exit(_end(128 + number, f"interrupted; {what} kept in tmp: run the same command again to continue", line_break))


def missing_package(error):
    """What to do about a ModuleNotFoundError: often the environment is not activated."""
    return f"{error}: activate the environment, or install requirements.txt into it"


def _explain_missing_package(kind, error, trace):
    if issubclass(kind, ModuleNotFoundError):
        os._exit(_end(USAGE, missing_package(error)))
    sys.__excepthook__(kind, error, trace)


def _end(code, line, before=""):
    with contextlib.suppress(OSError):
        os.write(2, f"{before}error: {line}\n".encode())
    return code


def images_text(number):
    """1 image, 2 images, 1,000 images."""
    return f"{number:,} image{'s' * (number != 1)}"


def show(line=""):
    """Print a line to stdout. A reader that has gone (`| head`) is no error: the run still has a result to write."""
    _write(line, sys.stdout)


def warn(line):
    """Print a warning to stderr, once for each sentence."""
    if line not in warned:
        warned.append(line)
        _write(f"warning: {line}", sys.stderr)


def fail(line):
    """Print the error that ends the process to stderr."""
    _write(f"error: {line}", sys.stderr)


def _write(line, stream):
    from tqdm import tqdm

    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
        tqdm.write(printable(line), file=stream)  # above the progress bars
        stream.flush()


@contextlib.contextmanager
def updating_line():
    """Yields a function that shows a line: on a terminal each in place of the one before, else one below the other."""
    if not sys.stdout.isatty():
        yield show
        return
    yield lambda line: print(f"\r\x1b[K{printable(line)}", end="", flush=True)
    print()


def progress(title, total, **options):
    """A progress bar with rates; shown only on a terminal, from the first progress on."""
    from tqdm import tqdm

    return tqdm(desc=title, total=total, disable=None, dynamic_ncols=True, mininterval=0.25, delay=0.01, **options)
