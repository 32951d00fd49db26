"""What both kinds of bucket share: blobs, the rule for their names, and what is said of trouble with the disk."""

import contextlib
import re
from typing import NamedTuple

from errors import BucketError, printable

# Control characters, and parts that are empty, "." or "..".
_UNSAFE_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f]|(?:^|/)\.{0,2}(?:/|\Z)")


class Blob(NamedTuple):
    """One object of a bucket.

    Attributes
    ----------
    name : str
        Its path below the bucket (and its folder), "/"-separated.
    size : int
        Bytes.
    generation : int
        The number that Google Cloud Storage gives to this content of the object; 0 in a directory.
    checksum : str
        "crc32c:" or "md5:" and the checksum in base64. Empty in a directory, and in listings without checksums, such as
        those of buckets with a customer-managed encryption key.
    mtime : int
        When the file was changed, in nanoseconds since 1970; 0 in Google Cloud Storage.
    """

    name: str
    size: int
    generation: int = 0
    checksum: str = ""
    mtime: int = 0

    @property
    def version(self):
        """A text that changes when the content changes; in a directory also when only `mtime` changes."""
        return f"{self.size}:{self.generation}:{self.mtime}"


def checked_name(name, place):
    """Return the name if it is safe; raises BucketError, which begins with the bucket `place`, if it is not."""
    if not name.isascii() and re.search(r"[\ud800-\udfff]", name):
        raise BucketError(f"{place}: '{printable(name)}' is not UTF-8 as a name; rename it")
    if _UNSAFE_NAME.search(name):
        raise BucketError(
            f"{place}: '{printable(name)}' is refused as a name (control characters, or parts that are empty, '.' or "
            "'..'); rename it"
        )
    return name


def folder_prefix(prefix, place):
    """What the names in the folder `prefix` begin with; raises BucketError like `checked_name`."""
    prefix = prefix.strip("/")
    return checked_name(prefix, place) + "/" if prefix else ""


@contextlib.contextmanager
def explained(place, trouble):
    """Raise BucketError instead of OSError, with the `place` on the disk and what the `trouble` is."""
    try:
        yield
    except OSError as error:
        raise BucketError(f"{printable(place)}: {trouble} ({error.strerror or error})") from error
