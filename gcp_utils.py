"""A bucket: list it, read from it, create an object in it. Nothing is ever overwritten or deleted.

`open_bucket` takes ``gs://name[/folder]`` or a plain directory of the same layout. Both give the same methods, all of
them thread-safe; they raise `BucketError`:

    list(prefix) -> list[Blob]     all blobs below the folder `prefix`, sorted by name
    stat(name) -> Blob             one blob; BlobNotFoundError
    read(blob) -> bytes            its content, checked
    fetch(blob) -> Path            its content, checked, as a local file that is not to be changed
    is_here(blob) -> bool          whether fetching it needs no network
    create(name, data)             a new object, whole or not at all; FileExistsError if other content is there
    url(name) -> str               its address, for messages
    on_bytes                       called, in any thread, with the number of bytes that came over the network; those
                                   that must come again are taken back with a negative one. Assign a callable.
    threads                        how many reads in parallel pay off

Google Cloud Storage is asked for objects.get, objects.list and objects.create alone, so roles/storage.objectViewer and
roles/storage.objectCreator on the bucket suffice.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import mimetypes
import os
import random
import re
import stat
import tempfile
import time
import uuid
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlencode

from errors import BlobNotFoundError, BucketError, printable

RETRY_SECONDS = 120  # after the first failed attempt at a request, none is begun later than this
SOCKET_SECONDS = 30  # an attempt fails when a connection, or the next bytes of an answer, take longer than this
UPLOAD_SPEED = 10_000  # bytes/s; an upload that is slower than this for all of its time fails
BACKOFF_SECONDS = 0.25, 16  # the pause after the first failed attempt, which then doubles, and the longest pause
STRAY_SECONDS = 24 * 3600  # a partial download this old was left behind by a killed run

_PARTIAL = ".partial-"
_FIELDS = "kind,name,size,generation,crc32c,md5Hash,contentEncoding"
_LOGIN = "run on a VM with a service account, or run 'gcloud auth application-default login' first"
_ROLES = {"get": "objectViewer", "list": "objectViewer", "create": "objectCreator"}
# Control characters, halves of surrogate pairs, and parts that are empty, "." or "..".
_UNSAFE_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]|(?:^|/)\.{0,2}(?:/|\Z)")
_jitter = random.Random()  # its own: the sequence of the global generator belongs to whoever seeded that


class _TransientError(Exception):
    """An attempt failed in a way that the next one need not."""


class Blob(NamedTuple):
    """One object of a bucket.

    Attributes
    ----------
    name : str
        Its path below the bucket (and its folder), "/"-separated.
    size : int
        Bytes.
    version : str
        Changes whenever the content does.
    """

    name: str
    size: int
    version: str


def open_bucket(gcp_bucket: str, cache_directory: Path):
    """Open a bucket, without asking anything of the server yet.

    Parameters
    ----------
    gcp_bucket : str
        ``gs://name``, ``gs://name/folder`` or the path of a directory.
    cache_directory : Path
        Where the blobs of a ``gs://`` bucket are kept; any number of runs may share it. The files of a directory are
        used in place.

    Raises
    ------
    BucketError
        The address is malformed, the directory cannot be used, or there are no credentials.
    """
    if gcp_bucket.startswith("gs://"):
        return _GoogleBucket(gcp_bucket, Path(cache_directory))
    return _DirectoryBucket(gcp_bucket)


def _ignore(_):
    pass


class _GoogleBucket:
    threads = 32

    def __init__(self, gcp_bucket, cache):
        self._bucket, _, folder = gcp_bucket.removeprefix("gs://").partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", self._bucket):
            raise BucketError(f"{printable(gcp_bucket)}: no bucket can have this name; write gs://name[/folder]")
        self._folder = _folder(folder, printable(gcp_bucket))
        self._objects = f"storage/v1/b/{self._bucket}/o"
        self._cache, self.on_bytes = cache, _ignore

        os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # it would need buckets.get, and gRPC
        import gcsfs

        emulated = os.environ.get("STORAGE_EMULATOR_HOST") not in (None, "", "default")
        token = "anon" if emulated else "google_default"
        try:
            self._fs = gcsfs.GCSFileSystem(token=token, access="read_write", skip_instance_cache=True)
        except Exception as error:  # google.auth's own, and whatever an odd credentials file makes of it
            raise BucketError(f"{self.url('')}: no Google credentials ({printable(error)}); {_LOGIN}") from error
        with contextlib.suppress(OSError), os.scandir(cache) as entries:
            for entry in entries:
                if entry.name.startswith(_PARTIAL) and time.time() - entry.stat().st_mtime > STRAY_SECONDS:
                    os.unlink(entry)

    def url(self, name):
        return printable(f"gs://{self._bucket}/{self._folder}{name}")

    def list(self, prefix):
        blobs, token = [], ""
        while token is not None:
            page, token = self._list_page(_folder(prefix, self.url("")), token)
            blobs += page
        return sorted(blobs)

    def stat(self, name):
        blob = self._ask("get", name, self._address(name), self._blob, fields=_FIELDS)
        if blob is None:
            self._list_page("", "", size=1)  # for its error, should it be the bucket that is missing
            raise BlobNotFoundError(f"{self.url(name)}: there is no such object")
        return blob

    def read(self, blob):
        with self._cache_explained():
            return self.fetch(blob).read_bytes()

    def is_here(self, blob):
        return self._path(blob).exists()

    def fetch(self, blob):
        path = self._path(blob)
        if _is_intact(path, blob):
            return path
        with self._cache_explained():
            self._cache.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(prefix=_PARTIAL, dir=self._cache)
            try:
                with open(descriptor, "wb") as file:
                    _persistently(self.url(blob.name), lambda: self._download(blob, file))
                os.replace(partial, path)
            except BaseException:
                os.unlink(partial)
                raise
        return path

    def create(self, name, data):
        about = {"name": self._folder + _checked(name, self.url("")), "crc32c": _base64(_checksum("crc32c", data))}
        content_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
        boundary = uuid.uuid4().hex
        # Of the kinds of upload, multipart is the one where the server compares the checksum before it stores anything.
        body = (
            f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps(about)}\r\n"
            f"--{boundary}\r\nContent-Type: {content_type}\r\n\r\n"
        ).encode()
        body += data + f"\r\n--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/related; boundary={boundary}"}
        query = {"uploadType": "multipart", "ifGenerationMatch": "0"}
        clash = None
        try:
            if not self._ask("create", name, f"upload/{self._objects}", self._blob, "POST", headers, body, **query):
                raise self._no_bucket()
        except FileExistsError as error:
            clash = error  # with an earlier attempt at this very upload, whose answer was lost, or with another object
        held = self.stat(name)
        _, kind, value = held.version.split(":")
        if (held.size, value) != (len(data), _base64(_checksum(kind, data))):
            raise clash or BucketError(f"{self.url(name)}: holds other content than was sent; upload it again")

    def _path(self, blob):
        # A hash, so that the object's name has no say in where its content is kept.
        key = json.dumps([self._bucket, self._folder + blob.name, blob.version])
        return self._cache / hashlib.sha256(key.encode()).hexdigest()

    def _address(self, name):
        return f"{self._objects}/{quote(self._folder + _checked(name, self.url('')), safe='')}"

    def _no_bucket(self):
        return BucketError(f"gs://{self._bucket}: there is no such bucket; check its name")

    def _cache_explained(self):
        trouble = "what is fetched cannot be kept here; make room, make the folder writable, or run elsewhere"
        return _explained(self._cache, trouble)

    def _blob(self, item):
        if not item["name"].startswith(self._folder):
            raise ValueError("an object of another folder")
        name = _checked(item["name"][len(self._folder) :], self.url(""))
        if item.get("contentEncoding") == "gzip":  # size and checksum are those of the packed bytes
            raise BucketError(f"{self.url(name)}: is stored gzip-encoded; upload it without 'gsutil cp -z' or '-j'")
        kind = "crc32c" if "crc32c" in item else "md5Hash"
        return Blob(name, int(item["size"]), f"{int(item['generation'])}:{kind}:{item[kind]}")

    def _list_page(self, prefix, token, size=1000):
        def parse(answer):
            items = (item for item in answer.get("items", []) if not item["name"].endswith("/"))  # not a placeholder
            return [self._blob(item) for item in items], answer.get("nextPageToken") or None

        query = {"prefix": self._folder + prefix, "pageToken": token, "maxResults": size}
        fields = f"kind,nextPageToken,items({_FIELDS})"
        page = self._ask("list", prefix, self._objects, parse, **query, fields=fields)
        if page is None:
            raise self._no_bucket()
        return page

    def _download(self, blob, file):
        generation, kind, value = blob.version.split(":")
        checksum, received = _checksum(kind), 0
        file.seek(0)
        file.truncate()

        def take(chunk):
            nonlocal received
            received += len(chunk)
            self.on_bytes(len(chunk))
            if received > blob.size:
                raise _TransientError("more bytes than the object has")
            checksum.update(chunk)
            with self._cache_explained():
                file.write(chunk)

        headers, query = {"Accept-Encoding": "identity"}, {"alt": "media", "generation": generation}
        try:
            if not self._attempt("get", blob.name, self._address(blob.name), take, headers=headers, **query):
                raise BucketError(f"{self.url(blob.name)}: changed in the bucket during the run; run again")
            if _base64(checksum) != value:
                raise _TransientError("content that does not match its checksum")
        except BaseException:
            self.on_bytes(-received)
            raise

    def _ask(self, permission, name, *request, **parameters):
        return _persistently(self.url(name), lambda: self._attempt(permission, name, *request, **parameters))

    def _attempt(self, permission, name, path, use, method="GET", headers=None, body=None, **parameters):
        """Try one request; returns what `use` makes of the JSON that comes, or None if there is no such thing.

        With ``alt="media"``, `use` gets the chunks of the body as they come, and True is returned.
        """
        url, media = self.url(name), "alt" in parameters
        query = urlencode(parameters, quote_via=quote)
        status, answer = self._exchange(url, method, f"{path}?{query}", headers, body, media and use)
        if status == 404:
            return None
        if status == 412:
            raise FileExistsError(f"{url}: exists already, with other content")
        if status == 200 and media:
            return True
        try:
            answer = json.loads(answer)
            if status == 200 and answer["kind"] in ("storage#object", "storage#objects"):
                return use(answer)
            said = f"{status}: {printable(answer['error']['message'])[:300]}"
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
            said = f"{status}, and not in the manner of Google Cloud Storage"
        if status in (408, 429) or not 400 <= status < 500:
            raise _TransientError(said)
        if status == 401:
            raise BucketError(f"{url}: the credentials are refused ({said}); {_LOGIN}")
        if status == 403:
            raise BucketError(
                f"{url}: the permission storage.objects.{permission} is missing ({said}); grant the account "
                f"roles/storage.{_ROLES[permission]} on the bucket"
            )
        raise BucketError(f"{url}: the bucket refuses the request ({said}); check --gcp-bucket")

    def _exchange(self, url, method, path, headers, body, take):
        """Send a request and return the status and the body, unless it is for `take` to have, chunk by chunk."""
        import aiohttp
        import fsspec.asyn
        from gcsfs.retry import HttpError, NonRetryableError
        from google.auth.exceptions import GoogleAuthError, TransportError

        address = f"{self._fs._location.rstrip('/')}/{path}"
        # A download has no limit as a whole: a large blob on a slow line takes its time. An upload needs one, since a
        # server that does not read is not noticed otherwise.
        total = 2 * SOCKET_SECONDS + len(body) / UPLOAD_SPEED if body else None
        limits = aiohttp.ClientTimeout(total=total, connect=SOCKET_SECONDS, sock_read=SOCKET_SECONDS)

        async def exchange():
            session = await self._fs._set_session()
            request = {"headers": headers, "data": body, "timeout": limits, "allow_redirects": False}
            async with session.request(method, address, **request) as answer:
                if not take or answer.status != 200:
                    return answer.status, await answer.read()
                async for chunk in answer.content.iter_any():
                    take(chunk)
                return answer.status, None

        try:
            headers = self._fs._get_headers(headers)  # with a token, renewed where it is about to expire
            return fsspec.asyn.sync(self._fs.loop, exchange)
        except (aiohttp.ClientError, OSError) as error:
            raise _TransientError(f"{type(error).__name__}: {error}") from error
        except (GoogleAuthError, HttpError, NonRetryableError) as error:
            causes = [error]
            while causes[-1].__cause__:  # gcsfs hides google.auth's error behind its own
                causes.append(causes[-1].__cause__)
            said = f"no access token, {causes[min(1, len(causes) - 1)]}"
            if any(isinstance(cause, TransportError) or getattr(cause, "retryable", False) for cause in causes):
                raise _TransientError(said) from error
            raise BucketError(f"{url}: {printable(said)[:400]}; {_LOGIN}") from error


class _DirectoryBucket:
    threads = len(os.sched_getaffinity(0))
    on_bytes = _ignore

    def __init__(self, gcp_bucket):
        self._root = Path(gcp_bucket)
        with _explained(gcp_bucket, "cannot be used as a bucket; name a directory or gs://name[/folder]"):
            os.scandir(gcp_bucket).close()

    def url(self, name):
        return printable(self._root / name)

    def list(self, prefix):
        place = self.url("")
        blobs, pending = [], [(_folder(prefix, place), ())]
        while pending:
            folder, above = pending.pop()
            with self._explained(folder):
                try:
                    entries = os.listdir(os.path.join(self._root, folder))
                except (FileNotFoundError, NotADirectoryError):
                    continue  # as in the cloud, where a folder is nothing but a part of names
            for entry in entries:
                name = _checked(folder + entry, place)
                with self._explained(name):
                    found = os.stat(os.path.join(self._root, name))
                if not stat.S_ISDIR(found.st_mode):
                    blobs.append(self._blob(name, found))
                elif (found.st_dev, found.st_ino) not in above:  # else a link to a folder that contains it
                    pending.append((name + "/", (*above, (found.st_dev, found.st_ino))))
        return sorted(blobs)

    def stat(self, name):
        with self._explained(name):
            try:
                found = os.stat(self._root / _checked(name, self.url("")))
            except (FileNotFoundError, NotADirectoryError):
                raise BlobNotFoundError(f"{self.url(name)}: there is no such file") from None
        return self._blob(name, found)

    def read(self, blob):
        with self._explained(blob.name), open(self._root / blob.name, "rb") as file:
            data = file.read()
            now = os.fstat(file.fileno())
        self._unchanged(blob, self._blob(blob.name, now))
        return data

    def is_here(self, blob):
        return True

    def fetch(self, blob):
        self._unchanged(blob, self.stat(blob.name))
        return self._root / blob.name

    def create(self, name, data):
        path = self._root / _checked(name, self.url(""))
        with self._explained(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                done = _create_file(folder, path.name, data) or path.read_bytes() == data
                os.fsync(folder)
            finally:
                os.close(folder)
        if not done:
            raise FileExistsError(f"{self.url(name)}: exists already, with other content")

    def _blob(self, name, found):
        if not stat.S_ISREG(found.st_mode):
            raise BlobNotFoundError(f"{self.url(name)}: is not a regular file")
        return Blob(name, found.st_size, f"{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}:{found.st_ino}")

    def _unchanged(self, blob, now):
        if now != blob:
            raise BucketError(f"{self.url(blob.name)}: changed in the bucket during the run; run again")

    def _explained(self, name):
        trouble = "cannot be used; check that it is there, its permissions and the disk"
        return _explained(os.path.join(self._root, name), trouble)


def _create_file(folder, name, data):
    """Create a file in an open directory, at once and whole. Returns False if something of this name is there."""
    hidden = None
    try:
        descriptor = os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o666, dir_fd=folder)  # has no name: dies with us
    except OSError:  # not every file system knows this
        hidden = f".{uuid.uuid4().hex}"
        descriptor = os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666, dir_fd=folder)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
            os.link(hidden or f"/proc/self/fd/{descriptor}", name, src_dir_fd=folder, dst_dir_fd=folder)
    except FileExistsError:
        return False
    finally:
        if hidden:
            os.unlink(hidden, dir_fd=folder)
    return True


def _persistently(url, attempt):
    """Call `attempt` until it raises no `_TransientError`, but no longer than RETRY_SECONDS after the first."""
    deadline, (pause, longest) = None, BACKOFF_SECONDS
    for count in itertools.count(1):
        try:
            return attempt()
        except _TransientError as error:
            deadline = deadline or time.monotonic() + RETRY_SECONDS
            wait = pause * _jitter.uniform(0.5, 1)
            if time.monotonic() + wait > deadline:
                raise BucketError(
                    f"{url}: gave up after {count} attempts, having tried again for {RETRY_SECONDS} s; the last met "
                    f"{printable(error)}; check the network, then run again"
                ) from error
        time.sleep(wait)
        pause = min(2 * pause, longest)


def _checksum(kind, data=b""):
    """Begin a checksum of a kind that Google Cloud Storage gives: "crc32c" or "md5Hash"."""
    if kind == "md5Hash":
        return hashlib.md5(data, usedforsecurity=False)
    import google_crc32c

    return google_crc32c.Checksum(data)


def _base64(checksum):
    return base64.b64encode(checksum.digest()).decode()


def _is_intact(path, blob):
    _, kind, value = blob.version.split(":")
    checksum = _checksum(kind)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                checksum.update(chunk)
    except OSError:
        return False
    return _base64(checksum) == value


def _checked(name, place):
    if _UNSAFE_NAME.search(name):
        raise BucketError(
            f"{place}: '{printable(name)}' is refused as a name (control characters, or parts that are empty, '.' or "
            "'..'); rename it"
        )
    return name


def _folder(prefix, place):
    prefix = prefix.strip("/")
    return _checked(prefix, place) + "/" if prefix else ""


@contextlib.contextmanager
def _explained(place, trouble):
    try:
        yield
    except OSError as error:
        raise BucketError(f"{printable(place)}: {trouble} ({error.strerror or error})") from error
