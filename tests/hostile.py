"""Damaged and hostile input: how tests make it, and the limits for what it may cause."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import strategies as st

import terminal
from errors import BucketError, ConfigurationError, DatasetError, printable

EXPECTED = (ConfigurationError, DatasetError, BucketError)
MEGABYTES = 300  # that a test may take


def memory(kind):
    """A number of /proc/self/status, such as VmRSS, in MiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024


@contextlib.contextmanager
def sealed_folder(folder):
    """Check that what runs meanwhile takes little memory and leaves nothing in the folder but what a run may leave."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak, VmHWM, to what is in use now
    before = memory("VmRSS")
    yield
    assert memory("VmHWM") - before < MEGABYTES
    assert {path.name for path in folder.iterdir()} <= {"bucket", "tmp", "no_tensorflow", "counted"}


def error_line(call, capsys, *words):
    """The line that a user reads of the error that a call must raise."""
    with pytest.raises(EXPECTED) as caught:
        call()
    capsys.readouterr()
    terminal.fail(caught.value)
    output = capsys.readouterr()
    assert output.out == ""
    line = output.err.removesuffix("\n")
    assert line.startswith("error: ") and line.isprintable() and len(line) < 2500
    for word in words:
        assert word in line
    return line


def attempt(call):
    """The result of a call, or None if it raised an error of ours, which must have a message."""
    try:
        return call()
    except EXPECTED as error:
        assert printable(error)
        return None


mutations = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["flip", "cut", "repeat", "insert"]), st.binary(max_size=9)),
    min_size=1,
    max_size=4,
)


def mutate(data, steps):
    """Damaged bytes; `steps` are drawn from `mutations`."""
    for where, how, extra in steps:
        position = int(where * (len(data) - 1))
        match how:
            case "flip":
                data = data[:position] + bytes(b ^ 0x55 for b in extra) + data[position + len(extra) :]
            case "cut":
                data = data[:position] + data[position + 8 * len(extra) :]
            case "repeat":
                data = data[:position] + data[position // 2 :]
            case "insert":
                data = data[:position] + extra + data[position:]
        data = data or b"\0"
    return data
