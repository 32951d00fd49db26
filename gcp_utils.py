"""A bucket: list it, read from it, create an object in it. Nothing is ever overwritten or deleted.

`open_bucket` takes ``gs://name[/folder]`` or a plain directory of the same layout. Both give the same methods, all of
them thread-safe; they raise `BucketError`:

    list(prefix) -> list[Blob]     all blobs below the folder `prefix`, sorted by name; with `skip`, without those for
                                   which skip(name below the folder) is true, which are not checked either
    stat(name) -> Blob             one blob; BlobNotFoundError
    read(blob) -> bytes            its content, checked
    fetch(blob) -> Path            its content, checked, as a local file that is not to be changed
    is_here(blob) -> bool          whether `fetch` would not need to download it
    check_room(blobs)              an error if the disk has no room for those that are not here
    create(name, data)             make an object, completely or not at all; FileExistsError if there is one with this
                                   name and other content
    url(name) -> str               its address, for messages
    on_bytes                       assign a callable: it is called, in any thread, with the number of bytes downloaded,
                                   and with a negative number for bytes that must be downloaded again
    threads                        the number of reads in parallel that is worth while

Google Cloud Storage is asked for objects.get, objects.list and objects.create only, so roles/storage.objectViewer and
roles/storage.objectCreator on the bucket suffice. google-cloud-storage makes all requests but those for content. gcsfs
fetches the content, because it needs less than half of the processor time.
"""

import base64
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import mimetypes
import os
import random
import re
import shutil
import ssl
import time
import uuid
import warnings
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from blobs import Blob, checked_name, explained, folder_prefix
from directory_bucket import DirectoryBucket
from errors import BlobNotFoundError, BucketError, printable

RETRY_SECONDS = 120  # no attempt at a request begins later than this after the first failed one
SOCKET_SECONDS = 30  # longest wait for a connection, or for the next bytes of an answer
UPLOAD_SPEED = 70_000  # bytes/s; an upload that is slower on average fails
BACKOFF_SECONDS = 0.25, 16  # the first pause between attempts, which doubles each time, and the longest
STRAY_SECONDS = 24 * 3600  # a partial file this old was left behind by a killed run
PAGE_SIZE = 1000  # the largest number of objects that one answer lists
MOST_FOLDERS = 500  # that are listed one by one; a dataset has a folder per class, unless by mistake
ROOM_TO_SPARE = 500_000_000  # bytes for the counts and results, besides the files to fetch
BLOCK = 4096  # bytes; a file takes a whole number of blocks on the disk

_LEVELS = 2  # of folders, which are listed in parallel: <split>/images, <split>/masks/<class>
_FIELDS = "kind,nextPageToken,prefixes,items(name,size,generation,crc32c,md5Hash,contentEncoding)"
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_LOGIN = "run on a VM with a service account, or run 'gcloud auth application-default login' first"
_ROLES = {"get": "objectViewer", "list": "objectViewer", "create": "objectCreator"}
# Advice for refusals that have another cause than missing roles on the bucket, by their reason or message.
_REFUSALS = (
    (r"billing|accountDisabled", "this is a matter of billing: ask the person who pays for the project"),
    (r"vpcServiceControls|policy|constraint", "this is a policy of the organisation: ask its administrator"),
    (r"\bscope", "the VM's access scopes are too narrow: give it the scope cloud-platform"),
    (r"serviceusage", "the account needs roles/serviceusage.serviceUsageConsumer on the project that pays"),
    (r"KMS", "this is about the key that encrypts the bucket: ask the person who manages it"),
)
_jitter = random.Random()  # not the global generator, which the user may have seeded


class _TransientError(Exception):
    """An attempt failed, and the next one may succeed."""


class _StatusError(Exception):
    """The server answered a request for content with another status than 200."""

    def __init__(self, code):
        super().__init__(f"the status {code}")
        self.code = code


def open_bucket(gcp_bucket: str, cache_directory: Path):
    """Open a bucket; this makes no request to the server.

    Parameters
    ----------
    gcp_bucket : str
        ``gs://name``, ``gs://name/folder`` or the path of a directory.
    cache_directory : Path
        Where the fetched blobs of a ``gs://`` bucket are kept; any number of runs may share it. The files of a
        directory are used in place.

    Returns
    -------
    object with the methods that are described at the top of this file

    Raises
    ------
    BucketError
        The address is malformed, the directory cannot be used, or there are no credentials.
    """
    if gcp_bucket.startswith("gs://"):
        return _GoogleBucket(gcp_bucket, Path(cache_directory))
    return DirectoryBucket(gcp_bucket)


def sweep(folder):
    """Delete what killed runs left behind: ``*.partial`` in a folder and its subfolders, if older than STRAY_SECONDS.

    A run that is alive keeps writing to its partial files, so they are younger.
    """
    for path in itertools.chain(Path(folder).glob("*.partial"), Path(folder).glob("*/*.partial")):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > STRAY_SECONDS:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _ignore(_):
    pass


class _GoogleBucket:
    threads = 32

    def __init__(self, gcp_bucket, cache):
        self.address = gcp_bucket
        self._bucket, _, folder = gcp_bucket.removeprefix("gs://").partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", self._bucket):
            raise BucketError(f"{printable(gcp_bucket)}: no bucket can have this name; write gs://name[/folder]")
        self._folder = folder_prefix(folder, printable(gcp_bucket))
        self._cache, self.on_bytes = cache, _ignore
        self._payer = None  # the project to charge, once the bucket has asked for one
        try:
            self._client, self._credentials = _connect()
        except BucketError:
            raise
        except Exception as error:  # of google.auth, or of any type for an odd credentials file
            raise BucketError(f"{self.url('')}: no Google credentials ({printable(error)[:300]}); {_LOGIN}") from error

    def url(self, name):
        return printable(f"gs://{self._bucket}/{self._folder}{name}")

    def list(self, prefix, skip=None):
        root = self._folder + folder_prefix(prefix, self.url(""))

        def wanted(name):
            return not (skip and skip(name.removeprefix(root).rstrip("/")))

        def list_folder(folder, levels):
            blobs, folders, token = self._list_page(folder, levels, wanted)
            while token and len(folders) <= MOST_FOLDERS:
                page, more, token = self._list_page(folder, levels, wanted, token)
                blobs, folders = blobs + page, folders | more
            if len(folders) > MOST_FOLDERS:
                return list_folder(folder, 0)  # all of them in one chain of pages
            return blobs, [(subfolder, levels - 1) for subfolder in folders]

        # Each page names the next, so the pages of a folder come one after the other; folders are listed in parallel.
        pool, blobs = ThreadPoolExecutor(self.threads), []
        try:
            pending = {pool.submit(list_folder, root, _LEVELS)}
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for found, folders in (future.result() for future in done):
                    blobs += found
                    pending |= {pool.submit(list_folder, *folder) for folder in folders}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return sorted(blobs)

    def folders(self, prefix):
        return []

    def stat(self, name):
        path = self._folder + checked_name(name, self.url(""))

        def ask(bucket, seconds):
            found = bucket.get_blob(path, timeout=seconds, retry=None)
            return found and self._blob(found)

        blob = self._ask("get", name, ask)
        if blob is None:
            self._list_page(self._folder, 0, lambda name: False)  # raises an error if the bucket is missing
            raise BlobNotFoundError(f"{self.url(name)}: there is no such object")
        return blob

    def read(self, blob):
        with self._cache_explained():
            return self.fetch(blob).read_bytes()

    def is_here(self, blob):
        return self._path(blob).exists()

    def check_room(self, blobs):
        needed = sum(math.ceil(blob.size / BLOCK) * BLOCK for blob in blobs if not self.is_here(blob))
        cache = self._cache.absolute()
        place = next(path for path in (cache, *cache.parents) if path.exists())
        missing = needed + ROOM_TO_SPARE - shutil.disk_usage(place).free
        if needed and missing > 0:
            needed, missing = (f"{math.ceil(number / 1e9):,}" for number in (needed, missing))
            raise BucketError(
                f"{printable(cache)}: {needed} GB are to be fetched, and for these and the results the disk lacks "
                f"{missing} GB; make room there, or set a larger disk_gb in Terraform"
            )

    def fetch(self, blob):
        path = self._path(blob)
        if not blob.checksum:
            listed, blob = blob, self.stat(blob.name)
            if blob.generation != listed.generation:
                raise self._has_changed(blob)
            if not blob.checksum:
                raise BucketError(f"{self.url(blob.name)}: has no checksum; upload it again without your own key")
        if _is_intact(path, blob):
            return path
        with self._cache_explained():
            self._cache.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
            try:
                self._download(blob, partial)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        return path

    def create(self, name, data):
        path = self._folder + checked_name(name, self.url(""))
        content_type = mimetypes.guess_type(name)[0] or "application/octet-stream"

        def upload(bucket, seconds):
            bucket.blob(path).upload_from_string(
                data,
                content_type,
                if_generation_match=0,
                checksum="crc32c",  # the server compares it before it stores the object
                timeout=seconds,
                retry=None,
            )
            return True

        clash = None
        try:
            # Sending all of the data counts as one wait, so the limit grows with its size.
            if not self._ask("create", name, upload, SOCKET_SECONDS + len(data) / UPLOAD_SPEED):
                raise self._no_bucket()
        except FileExistsError as error:
            clash = error  # with an earlier attempt at this upload, if its answer was lost, or with another object
        held = self.stat(name)
        kind = held.checksum.partition(":")[0]
        if (held.size, held.checksum) != (len(data), f"{kind}:{_checksum(kind, [data])}"):
            raise clash or BucketError(f"{self.url(name)}: holds other content than was sent; upload it again")

    def _path(self, blob):
        # A hash, so that no object name can lead to a place outside the cache.
        key = json.dumps([self._bucket, self._folder + blob.name, blob.version])
        return self._cache / hashlib.sha256(key.encode()).hexdigest()

    def _no_bucket(self):
        return BucketError(f"gs://{self._bucket}: there is no such bucket; check its name")

    def _has_changed(self, blob):
        return BucketError(f"{self.url(blob.name)}: changed in the bucket during the run; run again")

    def _cache_explained(self):
        trouble = "what is fetched cannot be kept here; make room, make the folder writable, or run elsewhere"
        return explained(self._cache, trouble)

    def _blob(self, found):
        """Make a `Blob` of google-cloud-storage's."""
        if not found.name.startswith(self._folder):
            raise ValueError("an object of another folder")
        name = checked_name(found.name[len(self._folder) :], self.url(""))
        if found.content_encoding == "gzip":  # its size and checksum are those of the compressed bytes
            raise BucketError(f"{self.url(name)}: is stored gzip-encoded; upload it without 'gsutil cp -z' or '-j'")
        checksum = f"crc32c:{found.crc32c}" if found.crc32c else f"md5:{found.md5_hash}" if found.md5_hash else ""
        return Blob(name, int(found.size), int(found.generation), checksum)

    def _list_page(self, folder, levels, wanted, token=None):
        """List one page of a folder. Returns its blobs, its subfolders if levels > 0, and the next page's token."""

        def ask(bucket, seconds):
            pages = self._client.list_blobs(
                bucket, prefix=folder, delimiter="/" if levels else None, page_token=token, page_size=PAGE_SIZE,
                fields=_FIELDS, timeout=seconds, retry=None,
            )  # fmt: skip
            page = next(pages.pages)
            if page.raw_page["kind"] != "storage#objects":
                raise ValueError("no listing")
            # The console makes an object with "/" at the end of its name for each folder.
            blobs = [self._blob(found) for found in page if not found.name.endswith("/") and wanted(found.name)]
            return blobs, {name for name in pages.prefixes if wanted(name)}, pages.next_page_token

        answer = self._ask("list", folder.removeprefix(self._folder), ask)
        if answer is None:
            raise self._no_bucket()
        return answer

    @functools.cached_property
    def _gcsfs(self):
        """gcsfs without its own retries, which would take minutes and hide the cause of the error."""
        import aiohttp
        import requests
        from fsspec.asyn import get_loop, sync
        from gcsfs import GCSFileSystem

        async def once(request, ask):
            with _one_attempt():
                answer = await ask(request)
            if answer.status != 200:
                answer.release()
                raise _StatusError(answer.status)
            answer.content = _Content(answer.content)
            return answer

        async def connector():
            place = os.environ.get("REQUESTS_CA_BUNDLE") or requests.certs.where()
            context = ssl.create_default_context(**{"capath" if os.path.isdir(place) else "cafile": place})
            return aiohttp.TCPConnector(ssl=context, limit=self.threads)

        session = {
            "connector": sync(get_loop(), connector),
            "headers": {"Accept-Encoding": "identity"},
            # Only if the environment names a proxy: aiohttp then reads the environment and a file for every request.
            "trust_env": bool(requests.utils.get_environ_proxies(self._client.api_endpoint)),
            "middlewares": (once,),
        }
        return GCSFileSystem(
            token=self._credentials, endpoint_url=self._client.api_endpoint, session_kwargs=session,
            requests_timeout=aiohttp.ClientTimeout(sock_connect=SOCKET_SECONDS, sock_read=SOCKET_SECONDS),
            consistency="none", skip_instance_cache=True,
        )  # fmt: skip

    def _download(self, blob, path):
        from fsspec.callbacks import Callback
        from gcsfs.retry import HttpError

        def ask(bucket, seconds):
            received = 0

            def count(_, value):
                nonlocal received
                if value > blob.size:
                    raise _TransientError("more bytes than the object has")
                self.on_bytes(value - received)
                received = value

            try:
                with self._cache_explained():
                    self._gcsfs.get_file(
                        f"{self._bucket}/{self._folder}{blob.name}", str(path), generation=blob.generation,
                        userProject=bucket.user_project, callback=Callback(hooks={"count": count}), concurrency=1,
                    )  # fmt: skip
                if not _is_intact(path, blob):
                    raise _TransientError("content that does not match its checksum")
            except BaseException as error:
                self.on_bytes(-received)
                if not isinstance(error, (_StatusError, HttpError)):
                    raise
                if error.code == 404:
                    raise self._has_changed(blob) from None
                if 400 <= error.code < 500:
                    self.stat(blob.name)  # its error has a reason; and it renews a refused token
                raise _TransientError(str(error)) from error

        self._ask("get", blob.name, ask)

    def _ask(self, permission, name, ask, longest=0):
        """Return what `ask` returns for the bucket and the seconds that it may take; None if there is no object."""
        from google.api_core.exceptions import NotFound

        def attempt(left):
            try:
                bucket = self._client.bucket(self._bucket, user_project=self._payer)
                return ask(bucket, max(SOCKET_SECONDS, min(longest, left)))
            except (BucketError, _TransientError):
                raise
            except NotFound:
                return None
            except Exception as error:
                raise self._meant(error, permission, name) from error

        return _persistently(self.url(name), attempt)

    def _meant(self, error, permission, name):
        """Return the exception to raise for one that the libraries raised."""
        import requests
        from google.api_core.exceptions import GoogleAPICallError
        from google.auth.exceptions import GoogleAuthError, InvalidOperation, TransportError

        url, cause = self.url(name), error
        while inner := cause.__cause__ or cause.__context__:  # the libraries wrap the reason several times
            cause = inner
        said = f"{type(cause).__name__}: {printable(cause)[:300]}"
        if isinstance(error, GoogleAPICallError):
            return self._refused(error, permission, url)
        if isinstance(error, InvalidOperation):  # anonymous credentials, for an emulator, cannot be renewed
            return BucketError(f"{url}: the credentials are refused; {_LOGIN}")
        if isinstance(error, TransportError) or getattr(error, "retryable", False):
            return _TransientError(f"no access token, {said}")
        if isinstance(error, GoogleAuthError):
            return BucketError(f"{url}: no access token, {printable(error.args[0] if error.args else error)}; {_LOGIN}")
        if isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)):
            return BucketError(f"{url}: {said}; check HTTPS_PROXY and STORAGE_EMULATOR_HOST")
        if isinstance(error, OSError):
            return _TransientError(said)
        return _TransientError(f"an answer that is not in the manner of Google Cloud Storage ({said})")

    def _refused(self, error, permission, url):
        """Return the exception to raise for an HTTP status and the JSON that came with it."""
        status = error.code
        try:
            answer = error.response.json()["error"]
            message = printable(answer["message"])[:300]
            reason = " ".join(str(item.get("reason")) for item in answer.get("errors", ()))
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
            message, reason = "not in the manner of Google Cloud Storage", ""
        said, about = f"{status}: {message}", f"{reason} {message}"
        if status in (408, 429) or not 400 <= status < 500 or (status == 403 and "ratelimit" in reason.lower()):
            return _TransientError(said)
        if status == 412:
            return FileExistsError(f"{url}: exists already, with other content")
        if "requester pays" in message:
            project = os.environ.get("GOOGLE_CLOUD_PROJECT")
            if not project:
                return BucketError(f"{url}: {said}; name the project that pays in GOOGLE_CLOUD_PROJECT")
            self._payer = project  # only from now on, because it needs a permission on the project
            return _TransientError(said)
        if status == 401:
            return BucketError(f"{url}: the credentials are refused ({said}); {_LOGIN}")
        if status == 403:
            for pattern, advice in _REFUSALS:
                if re.search(pattern, about):
                    return BucketError(f"{url}: the request is refused ({said}); {advice}")
        if status == 403 and reason in ("", "forbidden", "insufficientPermissions"):
            return BucketError(
                f"{url}: the permission storage.objects.{permission} is missing ({said}); grant the account "
                f"roles/storage.{_ROLES[permission]} on the bucket"
            )
        return BucketError(f"{url}: the bucket refuses the request ({said}); check --gcp-bucket")


def _connect():
    """Return google-cloud-storage's client and its credentials; the environment determines both."""
    os.environ["DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA"] = "true"  # or else both ask for the bucket itself,
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # which needs buckets.get
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about quota projects, and about future versions of Python
        import google.auth
        from google.auth.credentials import AnonymousCredentials
        from google.cloud import storage

        for library in ("google", "urllib3", "gcsfs"):  # failures are tried again, and reported if that fails too
            logging.getLogger(library).setLevel(logging.CRITICAL)
        options, emulator = {}, os.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
        if emulator:
            credentials = AnonymousCredentials()
            options["api_endpoint"] = emulator if "://" in emulator else f"http://{emulator}"
        else:
            credentials, _ = google.auth.default(scopes=[_SCOPE])
            credentials.with_non_blocking_refresh()
        return storage.Client(project=None, credentials=credentials, client_options=options), credentials


@contextlib.contextmanager
def _one_attempt():
    """Replace the errors of aiohttp, after which gcsfs would try again, by one after which it does not."""
    import aiohttp

    try:
        yield
    except aiohttp.ClientError as error:
        raise _TransientError(f"{type(error).__name__}: {error}") from error


class _Content:
    """The stream of an answer's content; an error while it is read ends the attempt."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    async def read(self, size):
        with _one_attempt():
            return await self._stream.read(size)


def _persistently(url, attempt):
    """Call `attempt` until it raises no `_TransientError`; give up RETRY_SECONDS after the first of these.

    `attempt` is called with the number of seconds that are left, and its result is returned.
    """
    deadline, (pause, longest) = math.inf, BACKOFF_SECONDS
    for count in itertools.count(1):
        try:
            return attempt(deadline - time.monotonic())
        except _TransientError as error:
            deadline = min(deadline, time.monotonic() + RETRY_SECONDS)
            wait_seconds = pause * _jitter.uniform(0.5, 1)
            if time.monotonic() + wait_seconds > deadline:
                raise BucketError(
                    f"{url}: gave up after {count} attempts, having tried again for {RETRY_SECONDS} s; the last error: "
                    f"{printable(error)}; check the network, then run again"
                ) from error
        time.sleep(wait_seconds)
        pause = min(2 * pause, longest)


def _checksum(kind, chunks):
    """Return the checksum of some bytes in base64; `kind` is "md5" or "crc32c"."""
    import google_crc32c

    checksum = hashlib.md5(usedforsecurity=False) if kind == "md5" else google_crc32c.Checksum()
    for chunk in chunks:
        checksum.update(chunk)
    return base64.b64encode(checksum.digest()).decode()


def _is_intact(path, blob):
    kind, _, value = blob.checksum.partition(":")
    try:
        with open(path, "rb") as file:
            return _checksum(kind, iter(lambda: file.read(1 << 20), b"")) == value
    except OSError:
        return False
