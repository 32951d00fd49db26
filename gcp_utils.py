"""A bucket: list it, read from it, create an object in it. Nothing is ever overwritten or deleted.

`open_bucket` takes ``gs://name[/folder]`` or a plain directory of the same layout. Both give the same methods, all of
them thread-safe; they raise `BucketError`:

    list(prefix) -> list[Blob]     all blobs below the folder `prefix`, sorted by name; with `skip`, without those for
                                   which skip(name below the folder) is true, which are not checked either
    folders(prefix) -> list[str]   the names of the folders directly below a folder, sorted; [] if there is none
    stat(name) -> Blob             one blob; BlobNotFoundError
    read(blob) -> bytes            its content, checked
    fetch(blob) -> Path            its content, checked, as a local file that is not to be changed
    bytes_to_fetch(blobs) -> int   how many bytes `fetch` must download; an error if the disk has no room for them
    create(name, data)             make an object, completely or not at all; FileExistsError if there is one with this
                                   name and other content
    url(name) -> str               its address, for messages
    address                        gs://... or the absolute path of the directory
    on_bytes                       assign a callable: it is called, in any thread, with the number of bytes that have
                                   come, also of downloads that fail and are repeated
    threads                        the number of reads in parallel that is worth while
"""

import contextlib
import os
import re
import shutil
import time
import uuid
from pathlib import Path
from typing import NamedTuple

from errors import BlobNotFoundError, BucketError, printable

HAS_CHANGED = "changed in the bucket during the run; run again"
STRAY_SECONDS = 24 * 3600  # a partial file this old was left behind by a killed run
# Control characters, bytes that are not UTF-8, and parts of a path that are empty, "." or "..".
UNSAFE_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]|(?:^|/)\.{0,2}(?:/|\Z)")


class Blob(NamedTuple):
    """One object of a bucket: its name (the path below the bucket and its folder, "/"-separated) and size in bytes.

    In Google Cloud Storage: the number that this content of the object has, and its crc32c in base64, which is empty in
    some listings, such as those of buckets with a customer-managed encryption key. In a directory: when the content of
    the file was changed, and when anything about it was, in nanoseconds since 1970.
    """

    name: str
    size: int
    generation: int = 0
    checksum: str = ""
    mtime: int = 0
    ctime: int = 0

    @property
    def version(self):
        """A text that changes when the content may have changed; in a directory also when only `ctime` changes."""
        return f"{self.size}:{self.generation}:{self.checksum}:{self.mtime}:{self.ctime}"


def open_bucket(gcp_bucket: str, cache_directory: Path):
    """Open a bucket, as it is described at the top of this file; this makes no request to the server.

    Parameters
    ----------
    gcp_bucket : str
        ``gs://name``, ``gs://name/folder`` or the path of a directory.
    cache_directory : Path
        Where the fetched blobs of a ``gs://`` bucket are kept; any number of runs may share it. The files of a
        directory are used in place.

    Raises
    ------
    BucketError
        The address is malformed, the directory cannot be used, there are no credentials, or the environment names a
        proxy or certificates that cannot be used.
    """
    if gcp_bucket.startswith("gs://"):
        from google_bucket import GoogleBucket  # only here: Google's libraries take 0.6 s

        return GoogleBucket(gcp_bucket, Path(cache_directory))
    if not gcp_bucket or "://" in gcp_bucket:
        raise BucketError(f"'{without_password(gcp_bucket)}' is no bucket: write gs://name[/folder], or a directory")
    return DirectoryBucket(gcp_bucket)


def sweep(folder):
    """Delete what killed runs left behind: ``*.partial`` anywhere below a folder, if older than STRAY_SECONDS.

    A run that is alive keeps writing to its partial files, so they are younger.
    """
    for path in list(Path(folder).rglob("*.partial")):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > STRAY_SECONDS:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


class DirectoryBucket:
    """A directory, which may also be a mounted bucket, exFAT, or a shared folder of a virtual machine.

    On these, inode numbers and ctimes change without a reason. So only another size or mtime refuses a file.
    """

    threads = 8

    def __init__(self, gcp_bucket):
        self._root = Path(gcp_bucket)
        self.address = os.path.abspath(gcp_bucket)
        with disk_errors_named(gcp_bucket, "cannot be used as a bucket; name a directory or gs://name[/folder]"):
            os.scandir(gcp_bucket).close()

    def url(self, name):
        return printable(self._root / name)

    def list(self, prefix, skip=None):
        root, blobs = folder_prefix(prefix, self.url), []
        top = os.path.join(self._root, root)
        for folder, subfolders, files in os.walk(top, onerror=self._refuse, followlinks=True):
            below = f"{folder[len(top) :]}/".lstrip("/")
            wanted = {name for name in subfolders + files if not (skip and skip(below + name))}
            subfolders[:] = wanted.intersection(subfolders)
            blobs.extend(self.stat(root + below + name) for name in files if name in wanted)
        return sorted(blobs)

    def folders(self, prefix):
        top = self._root / folder_prefix(prefix, self.url)
        _, folders, _ = next(os.walk(top, onerror=self._refuse), (top, [], []))
        return sorted(folders)

    def stat(self, name):
        path = os.path.join(self._root, checked_name(name, self.url))  # quicker than Path, for a million files
        with disk_errors_named(path, "cannot be read"):
            if not os.path.isfile(path):
                raise BlobNotFoundError(f"{self.url(name)}: there is no such file")
            found = os.stat(path)
        return Blob(name, found.st_size, mtime=found.st_mtime_ns, ctime=found.st_ctime_ns)

    def read(self, blob):
        path = self._root / blob.name
        with disk_errors_named(path, "cannot be read"):
            data = path.read_bytes()
        self.fetch(blob)  # which notices a change while it was read
        return data

    def bytes_to_fetch(self, blobs):
        return 0

    def fetch(self, blob):
        found = self.stat(blob.name)
        if (found.size, found.mtime) != (blob.size, blob.mtime):
            raise BucketError(f"{self.url(blob.name)}: {HAS_CHANGED}")
        return self._root / blob.name

    def create(self, name, data):
        path = self._root / checked_name(name, self.url)
        with disk_errors_named(path, "cannot be written; check the permissions and the room on the disk"):
            path.parent.mkdir(parents=True, exist_ok=True)
            is_there = _create_file(path, data) or path.read_bytes() == data
        if not is_there:
            raise FileExistsError(f"{self.url(name)}: exists already, with other content")

    def _refuse(self, error):
        """Raise an error for a folder that cannot be listed; one that is missing is empty, as in the cloud."""
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise BucketError(f"{printable(error.filename)}: cannot be listed ({error.strerror})") from error


def _create_file(path, data):
    """Create a complete file in one step; return False if the name is taken."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)
        except OSError:  # the name is taken, or there are no hard links, as on exFAT and gcsfuse
            open(path, "xb").close()  # takes the name, which only one process can do
            os.replace(partial, path)
        return True
    except FileExistsError:
        return False
    finally:
        partial.unlink(missing_ok=True)


def checked_name(name, url):
    """Return the name if it is safe; raises BucketError, which begins with `url("")`, the bucket's, if it is not."""
    if UNSAFE_NAME.search(name):
        raise BucketError(
            f"{url('')}: '{printable(name)}' is refused as a name (control characters, not UTF-8, or parts that are "
            "empty, '.' or '..'); rename it"
        )
    return name


def folder_prefix(prefix, url):
    """What the names in the folder `prefix` begin with; raises BucketError like `checked_name`."""
    prefix = prefix.strip("/")
    return checked_name(prefix, url) + "/" if prefix else ""


@contextlib.contextmanager
def disk_errors_named(place, trouble):
    """Raise BucketError instead of OSError, with the `place` on the disk and what the `trouble` is."""
    try:
        yield
    except OSError as error:
        raise BucketError(f"{printable(place)}: {trouble} ({error.strerror or error})") from error


def without_password(text):
    """The text in printable characters, without the user and the password of an address."""
    return printable(re.sub(r"//[^/\s]*@", "//", str(text)))
