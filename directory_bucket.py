"""A plain directory as a bucket, with the methods that are described at the top of gcp_utils.py."""

import contextlib
import hashlib
import os
import stat
import uuid
from pathlib import Path

from blobs import Blob, checked_name, explained, folder_prefix
from errors import BlobNotFoundError, BucketError, printable


class DirectoryBucket:
    """A directory, which may also be a mounted bucket, exFAT, or a shared folder of a virtual machine.

    On these, inode numbers change without a reason, so a file counts as unchanged if its size and mtime are unchanged.
    If only the mtime has changed since the listing and this run has read the file before, the content decides. A file
    that the run has not read counts as changed, because its earlier content is not known.
    """

    threads = len(os.sched_getaffinity(0))

    def __init__(self, gcp_bucket):
        self._root = Path(gcp_bucket)
        self.address = os.path.abspath(gcp_bucket)
        self._digests = {}  # of the content of the blobs that were read
        with explained(gcp_bucket, "cannot be used as a bucket; name a directory or gs://name[/folder]"):
            os.scandir(gcp_bucket).close()

    def on_bytes(self, number):
        pass  # nothing is downloaded

    def url(self, name):
        return printable(self._root / name)

    def list(self, prefix, skip=None):
        place, root = self.url(""), folder_prefix(prefix, self.url(""))
        blobs, pending = [], [(root, ())]
        while pending:
            folder, above = pending.pop()
            with self._explained(folder):
                try:
                    entries = os.listdir(os.path.join(self._root, folder))
                except (FileNotFoundError, NotADirectoryError):
                    continue  # no error, as in the cloud, where folders are only parts of names
            for entry in entries:
                if skip and skip((folder + entry).removeprefix(root)):
                    continue
                name = checked_name(folder + entry, place)
                with self._explained(name):
                    found = os.stat(os.path.join(self._root, name))
                if not stat.S_ISDIR(found.st_mode):
                    blobs.append(self._blob(name, found))
                elif (found.st_dev, found.st_ino) not in above:  # or else it is a link to a folder that contains it
                    pending.append((name + "/", (*above, (found.st_dev, found.st_ino))))
        return sorted(blobs)

    def folders(self, prefix):
        p = self._root / prefix
        return sorted(e.name for e in p.iterdir() if e.is_dir()) if p.is_dir() else []

    def stat(self, name):
        with self._explained(name):
            try:
                found = os.stat(self._root / checked_name(name, self.url("")))
            except (FileNotFoundError, NotADirectoryError):
                raise BlobNotFoundError(f"{self.url(name)}: there is no such file") from None
        return self._blob(name, found)

    def read(self, blob):
        with self._explained(blob.name), open(os.path.join(self._root, blob.name), "rb") as file:
            data = file.read()
            now = self._blob(blob.name, os.fstat(file.fileno()))
        digest = hashlib.blake2b(data).digest()
        if self._digests.get(blob, digest if now == blob else None) != digest:
            raise BucketError(f"{self.url(blob.name)}: changed in the bucket during the run; run again")
        self._digests[blob] = digest
        return data

    def is_here(self, blob):
        return True

    def check_room(self, blobs):
        pass

    def fetch(self, blob):
        if self.stat(blob.name) != blob or blob not in self._digests:
            self.read(blob)
        return self._root / blob.name

    def create(self, name, data):
        path = self._root / checked_name(name, self.url(""))
        with self._explained(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                done = _create_file(folder, path.name, data) or path.read_bytes() == data
                with contextlib.suppress(OSError):  # some file systems cannot do this with a folder
                    os.fsync(folder)
            finally:
                os.close(folder)
        if not done:
            raise FileExistsError(f"{self.url(name)}: exists already, with other content")

    def _blob(self, name, found):
        if not stat.S_ISREG(found.st_mode):
            raise BlobNotFoundError(f"{self.url(name)}: is not a regular file")
        return Blob(name, found.st_size, mtime=found.st_mtime_ns)

    def _explained(self, name):
        trouble = "cannot be used; check that it is there, its permissions and the disk"
        return explained(os.path.join(self._root, name), trouble)


def _create_file(folder, name, data, nameless=True):
    """Create a complete file in an open directory in one step. Returns False if the name is taken."""
    hidden = None
    try:
        if not nameless:
            raise OSError
        descriptor = os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o666, dir_fd=folder)  # nameless: it vanishes when we die
    except OSError:  # some file systems do not have this
        hidden = f".{name}.{uuid.uuid4().hex}.partial"
        descriptor = os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666, dir_fd=folder)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
            try:
                os.link(hidden or f"/proc/self/fd/{descriptor}", name, src_dir_fd=folder, dst_dir_fd=folder)
                return True
            except FileExistsError:
                return False
            except OSError:
                if not hidden:
                    return _create_file(folder, name, data, nameless=False)
        # This file system has no hard links either, like exFAT and gcsfuse. So an empty file takes the name, which only
        # one process can do, and the complete file then replaces it.
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666, dir_fd=folder))
        os.rename(hidden, name, src_dir_fd=folder, dst_dir_fd=folder)
        hidden = None
    except FileExistsError:
        return False
    finally:
        if hidden:
            os.unlink(hidden, dir_fd=folder)
    return True
