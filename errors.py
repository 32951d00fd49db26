"""Errors that a user can cause or repair. Each is one line, says what to do, and carries its exit code."""

DONE, BUG, USAGE, INPUT, BUCKET, NOT_CONVERGED, CLUSTER = range(7)

EXIT_CODES = {
    DONE: "done",
    BUG: "a bug in this program: please report it",
    USAGE: "usage: an argument or a package is missing or wrong",
    INPUT: "input: dataset, masks, model or configuration",
    BUCKET: "bucket: not reached, not permitted, changed during the run, or no room for its files",
    NOT_CONVERGED: "a class did not converge",
    CLUSTER: "Dask cluster: no scheduler, no worker, another version, or no worker could count a chunk",
    129: "interrupted: the terminal was closed (SIGHUP)",
    130: "interrupted: Ctrl-C (SIGINT)",
    143: "interrupted: SIGTERM",
}


class ExpectedError(Exception):
    """An error that `main` shows in one line, without a traceback. Subclasses set the exit code."""

    exit_code = INPUT


class UsageError(ExpectedError):
    """An argument or environment variable cannot be used; the message names it."""

    exit_code = USAGE


class ConfigurationError(ExpectedError):
    """A config.yaml, or a setting in models.py, cannot be used; the message names it."""


class DatasetError(ExpectedError):
    """A dataset cannot be used; the message names the file."""


class ModelError(ExpectedError):
    """A model, its weights or its probabilities cannot be used."""


class NotConvergedError(ExpectedError):
    """minimize_scalar did not converge for a class; the message says which and what to adjust."""

    exit_code = NOT_CONVERGED


class BucketError(ExpectedError):
    """A bucket or an object in it cannot be used; the message names it."""

    exit_code = BUCKET


class BlobNotFoundError(BucketError):
    """The bucket exists, but not the blob."""

    exit_code = INPUT


class ClusterError(ExpectedError):
    """The Dask cluster that Dask's configuration names cannot count the images."""

    exit_code = CLUSTER


def first_line(error):
    """The first line of an error's text that is not blank, else the name of its type; at most 300 characters."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def printable(text):
    """The text with escapes for characters that steer a terminal, which file names and contents may have."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
