"""Damaged input: how tests make it, and how they read the answer."""

from hypothesis import strategies as st

from errors import BucketError, ConfigurationError, DatasetError, printable


def attempt(call):
    """The result of a call, or None if it raised an error of ours, which must have a message."""
    try:
        return call()
    except (ConfigurationError, DatasetError, BucketError) as error:
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
