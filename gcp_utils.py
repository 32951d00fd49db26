"""A bucket: list it, read from it, create an object in it. Nothing is ever overwritten or deleted.

`open_bucket` takes ``gs://name[/folder]`` or a plain directory of the same layout. Both give the same methods, all of
them thread-safe; they raise `BucketError`:

    list(prefix) -> list[Blob]     all blobs below the folder `prefix`, sorted by name; with `skip`, without those for
                                   which skip(name below the folder) is true, which are not checked either
    folders(prefix) -> list[str]   the names of the folders directly below a folder, sorted; [] if there is none
    stat(name) -> Blob             one blob; BlobNotFoundError
    read(blob) -> bytes            its content, checked
    fetch(blob) -> Path            its content, checked, as a local file that is not to be changed
    is_here(blob) -> bool          whether `fetch` would not need to download it
    check_room(blobs)              an error if the disk has no room for those that are not here
    create(name, data)             make an object, completely or not at all; FileExistsError if there is one with this
                                   name and other content
    url(name) -> str               its address, for messages
    address                        gs://... or the absolute path of the directory
    on_bytes                       assign a callable: it is called, in any thread, with the number of bytes downloaded,
                                   and with a negative number for bytes that must be downloaded again
    on_retry                       assign a callable: it is called, in any thread, with a sentence when a request fails
                                   for the first time and is tried again; `terminal.warn` if none is assigned
    threads                        the number of reads in parallel that is worth while

Google Cloud Storage is asked for objects.get, objects.list and objects.create only, so roles/storage.objectViewer and
roles/storage.objectCreator on the bucket suffice. google-cloud-storage makes all requests but those for content. gcsfs
fetches the content, because it needs less than half of the processor time.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import logging
import math
import mimetypes
import os
import re
import shutil
import ssl
import stat
import threading
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import terminal
from errors import BlobNotFoundError, BucketError, first_line, printable

RETRY_SECONDS = 120  # stop trying again this long after a request began
SOCKET_SECONDS = 20  # longest wait for a connection, or for the next bytes of an answer
UPLOAD_SPEED = 70_000  # bytes/s; an upload that is slower on average fails
STRAY_SECONDS = 24 * 3600  # a partial file this old was left behind by a killed run
ROOM_TO_SPARE = 500_000_000  # bytes for the counts and results, besides the files to fetch
BLOCK = 4096  # bytes; a file takes a whole number of blocks on the disk

_LEVELS = 2  # of folders, which are listed in parallel: <split>/images, <split>/masks/<class>
_FIELDS = "kind,nextPageToken,prefixes,items(name,size,generation,crc32c,contentEncoding)"
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_KEY_FILE = "GOOGLE_APPLICATION_CREDENTIALS"
_ROLES = {"get": "objectViewer", "list": "objectViewer", "create": "objectCreator"}
_WEB_PAGE = r"(?i)<html|<!doctype html"
# Advice for what cannot get better by waiting, by what the error says.
_HOPELESS = (
    (r"CERTIFICATE_VERIFY_FAILED", "name your network's file of certificates in REQUESTS_CA_BUNDLE; check the clock"),
    (r"Tunnel connection failed: 407|^(\w+: )?407\b", "the proxy wants http://user:password@host:port in HTTPS_PROXY"),
    (r"Tunnel connection failed: 4|^ClientHttpProxyError: 4", "the proxy refuses this: ask the person who manages it"),
    (r"(?i)content-encoding", "a proxy or filter has packed the answer: ask the person who manages the network"),
    (r"the answer is a web page", "it comes from a web filter, or the login page of a network, instead of Google"),
)
# Advice for refusals that have another cause than missing roles on the bucket, by their reason or message.
_REFUSALS = (
    (r"billing|accountDisabled", "this is a matter of billing: ask the person who pays for the project"),
    (r"vpcServiceControls|policy|constraint", "this is a policy of the organisation: ask its administrator"),
    (r"\bscope", "the VM's access scopes are too narrow: give it the scope cloud-platform"),
    (r"serviceusage", "the account needs roles/serviceusage.serviceUsageConsumer on the project that pays"),
    (r"KMS", "this is about the key that encrypts the bucket: ask the person who manages it"),
    (r"requester pays", "name the project that pays in GOOGLE_CLOUD_PROJECT"),
)
# Control characters, and parts that are empty, "." or "..".
_UNSAFE_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f]|(?:^|/)\.{0,2}(?:/|\Z)")


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
        The address is malformed, the directory cannot be used, there are no credentials, or the environment names a
        proxy or certificates that cannot be used.
    """
    if gcp_bucket.startswith("gs://"):
        _import_libraries()
        return _GoogleBucket(gcp_bucket, Path(cache_directory))
    if not gcp_bucket or "://" in gcp_bucket:
        raise BucketError(f"'{_shown(gcp_bucket)}' is no bucket: write gs://name[/folder], or the path of a directory")
    return _DirectoryBucket(gcp_bucket)


def sweep(folder):
    """Delete what killed runs left behind: ``*.partial`` in a folder and its subfolders, if older than STRAY_SECONDS.

    A run that is alive keeps writing to its partial files, so they are younger.
    """
    for path in itertools.chain(Path(folder).glob("*.partial"), Path(folder).glob("*/*.partial")):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > STRAY_SECONDS:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _import_libraries():
    """Import what Google's buckets need. For a directory this would be a tenth of a job of 400 small images: 0.6 s."""
    global ChecksumError, ChunkedEncodingError, GCSFileSystem, GoogleAPICallError, GoogleAuthError, HttpError
    global AnonymousCredentials, InvalidOperation, JSONDecodeError, LocationParseError, Request, Retry, RetryError
    global TransportError, _FAILURES, _PASSING, aiohttp, from_http_status, get_loop, google, google_crc32c, parse_url
    global requests, storage, sync

    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # these two, or else gcsfs and google-cloud-storage ask
    os.environ["DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA"] = "true"  # for the bucket itself (buckets.get)
    os.environ["NETRC"] = os.devnull  # a password from ~/.netrc would take the place of our token
    warnings.filterwarnings("ignore", module="google")  # about quota projects, and future versions of Python

    import aiohttp
    import google.auth
    import google_crc32c
    import requests
    from fsspec.asyn import get_loop, sync
    from gcsfs import GCSFileSystem
    from gcsfs.retry import ChecksumError, HttpError
    from google.api_core.exceptions import GoogleAPICallError, RetryError, from_http_status
    from google.api_core.retry import Retry
    from google.auth.credentials import AnonymousCredentials
    from google.auth.exceptions import GoogleAuthError, InvalidOperation, TransportError
    from google.auth.transport.requests import Request
    from google.cloud import storage
    from requests.exceptions import ChunkedEncodingError, JSONDecodeError
    from urllib3.exceptions import LocationParseError
    from urllib3.util import parse_url

    for library in ("google", "urllib3", "gcsfs"):  # failures are tried again, and reported if that fails too
        logging.getLogger(library).setLevel(logging.CRITICAL)
    # What a network raises, or a server that is not ready; and what else the libraries raise for a failed request.
    _PASSING = (
        *(requests.ConnectionError, requests.Timeout, ChunkedEncodingError, JSONDecodeError, TransportError),
        *(aiohttp.ClientError, ChecksumError, ConnectionError, TimeoutError),
    )
    _FAILURES = (*_PASSING, requests.RequestException, GoogleAPICallError, GoogleAuthError, RetryError)


class _GoogleBucket:
    threads = 32

    def __init__(self, gcp_bucket, cache):
        self._bucket, _, folder = gcp_bucket.removeprefix("gs://").partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", self._bucket):
            raise BucketError(f"{_shown(gcp_bucket)}: no bucket can have this name; write gs://name[/folder]")
        self._folder = _folder_prefix(folder, printable(gcp_bucket))
        self.address = f"gs://{self._bucket}/{self._folder}".rstrip("/")
        self.on_bytes, self.on_retry = lambda number: None, terminal.warn
        self._cache = cache
        self._payer = None  # the project to charge, once the bucket has asked for one
        self._has_told, self._lock = False, threading.Lock()
        self._emulator, emulator = "", os.environ.get("STORAGE_EMULATOR_HOST")
        if emulator:
            emulator = _server(emulator, "STORAGE_EMULATOR_HOST")
            self._emulator = f" (at {parse_url(emulator).netloc}, which STORAGE_EMULATOR_HOST names)"  # for messages
        self._client, credentials = _connect(self.url(""), emulator)
        self._gcsfs = _open_gcsfs(self._client.api_endpoint, credentials, self._tell)

    def url(self, name):
        return printable(f"gs://{self._bucket}/{self._folder}{name}")

    def list(self, prefix, skip=None):
        root = self._folder + _folder_prefix(prefix, self.url(""))

        def is_wanted(name):
            return not (skip and skip(name.removeprefix(root).rstrip("/")))

        def blob_or_none(found):  # the console makes an object with "/" at the end of its name for each folder
            return None if found.name.endswith("/") or not is_wanted(found.name) else self._blob(found)

        def list_folder(folder, levels):
            found, folders = self._list_folder(folder, "/" if levels else None, blob_or_none)
            return filter(None, found), [
                pool.submit(list_folder, name, levels - 1) for name in folders if is_wanted(name)
            ]

        # Each page names the next, so the pages of a folder come one after the other; folders are listed in parallel.
        blobs = []
        with ThreadPoolExecutor(self.threads) as pool:
            listings = [pool.submit(list_folder, root, _LEVELS)]
            for listing in listings:
                found, more = listing.result()
                blobs.extend(found)
                listings.extend(more)
        if not blobs:
            self._refuse_backslashes(root)
        return sorted(blobs)

    def folders(self, prefix):
        root = self._folder + _folder_prefix(prefix, self.url(""))
        _, folders = self._list_folder(root, "/", lambda found: None)
        return sorted(name.removeprefix(root).rstrip("/") for name in folders)

    def stat(self, name):
        path = self._folder + _checked_name(name, self.url(""))
        options = {"timeout": SOCKET_SECONDS, "retry": self._retry()}
        found = self._ask("get", name, lambda bucket: bucket.get_blob(path, **options))
        if found is None:
            self._refuse_backslashes(path)  # or raises an error if the bucket is missing
            raise BlobNotFoundError(f"{self.url(name)}: there is no such object")
        return self._blob(found)

    def read(self, blob):
        with _disk_errors_named(self._cached(blob), "cannot be read"):
            return self.fetch(blob).read_bytes()

    def is_here(self, blob):
        return self._cached(blob).exists()

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
        path = self._cached(blob)
        if not blob.checksum:
            listed, blob = blob, self.stat(blob.name)
            if blob.generation != listed.generation:
                raise self._has_changed(blob)
            if not blob.checksum:
                raise BucketError(f"{self.url(blob.name)}: has no checksum; upload it again without your own key")
        if _is_intact(path, blob):
            return path
        with _disk_errors_named(path, "what is fetched cannot be kept here; make room, or delete what is in the way"):
            self._cache.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
            try:
                self._ask("get", blob.name, lambda bucket: self._retry()(self._download)(bucket, blob, partial))
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        return path

    def create(self, name, data):
        path = self._folder + _checked_name(name, self.url(""))

        def upload(bucket):
            bucket.blob(path).upload_from_string(
                data,
                mimetypes.guess_type(name)[0] or "application/octet-stream",
                if_generation_match=0,
                checksum="crc32c",  # the server compares it before it stores the object
                timeout=SOCKET_SECONDS + len(data) / UPLOAD_SPEED,  # sending all of the data counts as one wait
                retry=None,
            )

        clash = None
        try:
            self._ask("create", name, self._retry()(upload))
        except FileExistsError as error:
            clash = error  # with an earlier attempt at this upload, if its answer was lost, or with another object
        if self.stat(name).checksum != _base64(google_crc32c.Checksum(data)):
            raise clash or BucketError(f"{self.url(name)}: holds other content than was sent; upload it again")

    def _cached(self, blob):
        # A hash, so that no object name can lead to a place outside the cache.
        key = json.dumps([self._bucket, self._folder + blob.name, blob.version])
        return self._cache / hashlib.sha256(key.encode()).hexdigest()

    def _has_changed(self, blob):
        return BucketError(f"{self.url(blob.name)}: changed in the bucket during the run; run again")

    def _blob(self, found):
        """Make a `Blob` of google-cloud-storage's."""
        name = _checked_name(found.name[len(self._folder) :], self.url(""))
        if found.content_encoding == "gzip":  # its size and checksum are those of the compressed bytes
            raise BucketError(f"{self.url(name)}: is stored gzip-encoded; upload it without 'gsutil cp -z' or '-j'")
        return Blob(name, int(found.size), int(found.generation), found.crc32c or "")

    def _list_folder(self, folder, delimiter, convert):
        """Return a folder's objects, of google-cloud-storage, converted; with the delimiter "/" also its subfolders."""
        options = {"prefix": folder, "delimiter": delimiter, "fields": _FIELDS, "timeout": SOCKET_SECONDS}

        def ask(bucket):
            found = self._client.list_blobs(bucket, retry=self._retry(), **options)
            return [convert(each) for each in found], found.prefixes

        return self._ask("list", folder.removeprefix(self._folder), ask)

    def _refuse_backslashes(self, path):
        """Raise an error if there are objects that a program on Windows has uploaded with "\\" for "/"."""
        for wrong in (path.replace("/", "\\"), "\\".join(path.rsplit("/", 1))):
            names, _ = self._list_folder(wrong, "/", lambda found: found.name)
            if name := next((name for name in names if "\\" in name), None):
                raise BlobNotFoundError(
                    f"gs://{self._bucket}: '{printable(name)}' has '\\' in its name; upload it again with '/'"
                )

    def _download(self, bucket, blob, path):
        """Let gcsfs download a file, which repeats what fails some six times, in half a minute."""
        received = _Received(self.on_bytes)
        try:
            self._gcsfs.get_file(
                f"{self._bucket}/{self._folder}{blob.name}", str(path), generation=blob.generation,
                userProject=bucket.user_project, callback=received, concurrency=1,
            )  # fmt: skip
            if not _is_intact(path, blob):
                with open(path, errors="replace") as file:
                    page = re.search(_WEB_PAGE, file.read(1000))
                raise ChecksumError(page[0] if page else "content that does not match its checksum")
        except Exception as error:
            received.set_size(None)
            if answer := _answer_to_gcsfs(error):
                raise (self._has_changed(blob) if answer.code == 404 else answer) from error
            raise

    def _retry(self):
        return Retry(_is_transient, initial=0.25, maximum=16, timeout=RETRY_SECONDS, on_error=self._tell)

    def _tell(self, error):
        """Tell of the first failure in the life of this bucket; raise BucketError if waiting does not help."""
        if advice := _advice(error):
            raise BucketError(f"{self.url('')}{self._emulator}: {_said(error)}; {advice}")
        with self._lock:
            has_told, self._has_told = self._has_told, True
        if not has_told:
            self.on_retry(f"{self.url('')}{self._emulator}: {_said(error)}; trying again for {RETRY_SECONDS} s")

    def _ask(self, permission, name, call):
        """Return what `call` returns for the bucket; raise one line for what the libraries raise."""
        payer, project = self._payer, os.environ.get("GOOGLE_CLOUD_PROJECT")
        try:
            return call(self._client.bucket(self._bucket, user_project=payer))
        except _FAILURES as error:
            if payer or not project or "requester pays" not in str(error):
                raise self._explained(error, permission, name) from error
        self._payer = project  # only from now on, because it needs a permission on the project
        return self._ask(permission, name, call)

    def _explained(self, error, permission, name):
        """Return the exception to raise for one that the libraries raised."""
        url, gave_up = self.url(name) + self._emulator, isinstance(error, RetryError)
        error = error.cause if gave_up else error
        said, status = _said(error), error.code if isinstance(error, GoogleAPICallError) else None
        if status == 412:
            return FileExistsError(f"{self.url(name)}: exists already, with other content")
        if status == 404:
            return BucketError(f"gs://{self._bucket}{self._emulator}: there is no such bucket; check its name")
        if advice := _advice(error):
            return BucketError(f"{url}: {said}; {advice}")
        if gave_up:
            return BucketError(
                f"{url}: gave up after trying again for {RETRY_SECONDS} s; the last error: {said}; check the network, "
                "then run again"
            )
        if status == 401 or isinstance(error, InvalidOperation):  # the latter: anonymous credentials, for an emulator
            return BucketError(f"{url}: the credentials are refused ({said}); {_login_advice()}")
        if isinstance(error, GoogleAuthError):
            return BucketError(f"{url}: {said}; {_login_advice()}")
        if status == 403 and re.search("(?i)does not have|permission|^403: forbidden", said):
            return BucketError(
                f"{url}: the permission storage.objects.{permission} is missing ({said}); grant the account "
                f"roles/storage.{_ROLES[permission]} on the bucket"
            )
        if status:
            return BucketError(f"{url}: the bucket refuses the request ({said}); check --gcp-bucket")
        return BucketError(f"{url}: {said}; check the settings of the network (HTTPS_PROXY, STORAGE_EMULATOR_HOST)")


class _Received:
    """Tells of the bytes that gcsfs has received: its callback for one file."""

    def __init__(self, on_bytes):
        self._on_bytes, self._number = on_bytes, 0

    def set_size(self, size):
        """Begin an attempt, so what an earlier one has received does not count."""
        self._on_bytes(-self._number)
        self._number = 0

    def relative_update(self, number):
        self._on_bytes(number)
        self._number += number


def _connect(url, emulator):
    """Return google-cloud-storage's client and its credentials; the environment determines both."""
    key_file = os.environ.get(_KEY_FILE)
    if key_file and not emulator and not os.path.isfile(key_file):
        raise BucketError(f"{_KEY_FILE} is not the path of a file; it must not hold the credentials themselves")
    try:
        credentials = AnonymousCredentials() if emulator else google.auth.default(scopes=[_SCOPE])[0]
        options = {"api_endpoint": emulator} if emulator else {}
        return storage.Client(project=None, credentials=credentials, client_options=options), credentials
    except Exception as error:  # of google.auth, or of any type for an odd credentials file
        raise BucketError(
            f"{url}: no Google credentials ({_shown(first_line(_message(error)))}); {_login_advice()}"
        ) from error


def _open_gcsfs(endpoint, credentials, on_failure):
    """Return the file system of gcsfs, with the proxy and the certificates that requests uses too.

    `on_failure` is called with the exception of any request that gets no answer; what it raises ends the download.
    """
    settings = requests.Session().merge_environment_settings(endpoint, {}, None, None, None)
    proxy = requests.utils.select_proxy(endpoint, settings["proxies"])
    if proxy:
        proxy = _server(proxy, "the proxy of HTTPS_PROXY, HTTP_PROXY or ALL_PROXY")
    place = requests.certs.where() if settings["verify"] is True else settings["verify"]
    try:
        certificates = ssl.create_default_context(**{"capath" if os.path.isdir(place) else "cafile": place})
    except OSError as error:
        names = "REQUESTS_CA_BUNDLE (or CURL_CA_BUNDLE)"
        raise BucketError(f"{names}: {printable(place)}: no certificates can be read ({_said(error)})") from error

    async def connector():
        return aiohttp.TCPConnector(ssl=certificates)

    async def tell(session, context, request):
        on_failure(request.exception)

    async def renew_token(session, context, request):  # gcsfs keeps a token as long as its time has not come
        if request.response.status == 401 and request.headers.get("Authorization") == f"Bearer {credentials.token}":
            credentials.refresh(Request())

    trace = aiohttp.TraceConfig()
    trace.on_request_exception.append(tell)
    trace.on_request_end.append(renew_token)
    session = {
        "connector": sync(get_loop(), connector),
        "headers": {"Accept-Encoding": "identity"},
        "proxy": proxy,
        "trace_configs": [trace],
    }
    return GCSFileSystem(
        token=credentials, endpoint_url=endpoint, session_kwargs=session, consistency="none", skip_instance_cache=True,
        requests_timeout=aiohttp.ClientTimeout(sock_connect=SOCKET_SECONDS, sock_read=SOCKET_SECONDS),
    )  # fmt: skip


def _server(address, what):
    """Return an address [http[s]://[user:password@]]host[:port] with its scheme.

    Another one is refused, and not shown: any part of it may be a part of a password.
    """
    address = address if "://" in address or "@" in address else f"http://{address}"
    with contextlib.suppress(LocationParseError):
        scheme, _, host, _, path, query, fragment = parse_url(address)
        if host and scheme in ("http", "https") and path in (None, "/") and not (query or fragment):
            return address.rstrip("/")
    raise BucketError(
        f"{what} cannot be used: write http://host:port or http://user:password@host:port, with %2F for '/' and so on; "
        "SOCKS is not supported"
    )


def _answer_to_gcsfs(error):
    """Return Google's own exception for the status that gcsfs has made an exception of; None if there is no status."""
    if isinstance(error, ValueError):  # the message has "invalid" in it, or, then the cause, "requester pays"
        return from_http_status(400, str(error.__cause__ or error))
    if isinstance(error, HttpError):
        return from_http_status(int(error.code), str(error.message))
    if isinstance(error, requests.exceptions.ProxyError):
        return from_http_status(502, "Bad Gateway")
    if isinstance(error, FileNotFoundError) and error.errno is None:
        return from_http_status(404, "there is no such object")
    if isinstance(error, OSError) and str(error).startswith("Forbidden: "):
        return from_http_status(403, str(error).partition("\n")[2])
    return None


def _is_transient(error):
    """Whether a request that failed may succeed when it is tried again, unless `_tell` knows that it cannot."""
    if isinstance(error, GoogleAPICallError):
        is_limit = "ratelimit" in f"{error.errors}{_message(error)}".lower().replace(" ", "")
        return error.code in (408, 429) or error.code >= 500 or (error.code == 403 and is_limit)
    return isinstance(error, _PASSING) or getattr(error, "retryable", False)


def _advice(error):
    """Return what to do about an error that does not get better by waiting; None if it is another one."""
    is_answer = isinstance(error, GoogleAPICallError)
    if is_answer and (error.code in (408, 429) or error.code >= 500):
        return None
    table = (*_HOPELESS, *_REFUSALS) if is_answer else _HOPELESS
    text = f"{_said(error)} {error.errors if is_answer else error}"  # the text of an answer's error has names in it
    return next((advice for pattern, advice in table if re.search(pattern, text)), None)


def _said(error):
    """Return what an error says about its cause, in a few words that may be shown."""
    said = "no access token, " if isinstance(error, GoogleAuthError) else ""
    if isinstance(error, GoogleAPICallError):
        said += f"{error.code}: {_message(error)}"
    else:
        # The libraries wrap the reason several times; below a ValueError there is only how Python came to it.
        while not isinstance(error, ValueError) and (inner := error.__cause__ or error.__context__):
            error = inner
        said += f"{type(error).__name__}: {_message(error)}".rstrip(": ")
    is_page = re.search(_WEB_PAGE, said + getattr(error, "doc", "")[:1000])
    return "the answer is a web page" if is_page else _shown(said)[:300]


def _message(error):
    """The message of a server's answer if there is one, else what the library says, without what may hold a token."""
    with contextlib.suppress(AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
        answer = json.loads(error.args[1]) if isinstance(error, GoogleAuthError) else error.response.json()
        return answer["error"]["message"]
    return error.args[0] if isinstance(error, (GoogleAPICallError, GoogleAuthError)) and error.args else error


def _login_advice():
    if path := os.environ.get(_KEY_FILE):
        return f"{_KEY_FILE} names {printable(path)}: make a new key, set this machine's clock, or unset the variable"
    return "run on a VM with a service account, or run 'gcloud auth application-default login' first"


def _shown(text):
    """The text in printable characters, without the user and the password of an address."""
    return printable(re.sub(r"//[^/\s]*@", "//", str(text)))


def _base64(checksum):
    return base64.b64encode(checksum.digest()).decode()


def _is_intact(path, blob):
    checksum = google_crc32c.Checksum()
    try:
        with open(path, "rb") as file:
            for _ in checksum.consume(file, 1 << 20):
                pass
    except OSError:
        return False
    return _base64(checksum) == blob.checksum


class _DirectoryBucket:
    """A directory, which may also be a mounted bucket, exFAT, or a shared folder of a virtual machine.

    A file is refused if its size or mtime has changed since it was listed. Its inode number and its ctime do not count:
    on these, they change without a reason, and the latter also when a backup links the file. In `Blob.version`
    the ctime does count: there a change without a reason costs no more than to read the file again.
    """

    threads = 8

    def __init__(self, gcp_bucket):
        self._root = Path(gcp_bucket)
        self.address = os.path.abspath(gcp_bucket)
        self.on_bytes, self.on_retry = lambda number: None, terminal.warn  # nothing is downloaded
        with _disk_errors_named(gcp_bucket, "cannot be used as a bucket; name a directory or gs://name[/folder]"):
            os.scandir(gcp_bucket).close()

    def url(self, name):
        return printable(self._root / name)

    def list(self, prefix, skip=None):
        root, blobs = _folder_prefix(prefix, self.url("")), []
        top = os.path.join(self._root, root)
        for folder, subfolders, files in os.walk(top, onerror=self._refuse, followlinks=True):
            below = f"{folder[len(top) :]}/".lstrip("/")
            wanted = {name for name in subfolders + files if not (skip and skip(below + name))}
            subfolders[:] = [name for name in subfolders if name in wanted and not _is_circle(Path(folder, name))]
            blobs.extend(self.stat(root + below + name) for name in files if name in wanted)
        return sorted(blobs)

    def folders(self, prefix):
        top = self._root / _folder_prefix(prefix, self.url(""))
        _, folders, _ = next(os.walk(top, onerror=self._refuse), (top, [], []))
        return sorted(folders)

    def stat(self, name):
        path = self._root / _checked_name(name, self.url(""))
        with _disk_errors_named(path, "cannot be read"):
            try:
                return self._blob(name, os.stat(path))
            except (FileNotFoundError, NotADirectoryError):
                raise BlobNotFoundError(f"{self.url(name)}: there is no such file") from None

    def read(self, blob):
        path = self._root / blob.name
        with _disk_errors_named(path, "cannot be read"), open(path, "rb") as file:
            data = file.read()
            self._refuse_changed(blob, os.fstat(file.fileno()))
        return data

    def is_here(self, blob):
        return True

    def check_room(self, blobs):
        pass

    def fetch(self, blob):
        path = self._root / blob.name
        with _disk_errors_named(path, "cannot be read"):
            self._refuse_changed(blob, os.stat(path))
        return path

    def create(self, name, data):
        path = self._root / _checked_name(name, self.url(""))
        with _disk_errors_named(path, "cannot be written; check the permissions and the room on the disk"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _create_file(path, data)
            except FileExistsError:
                is_done = path.read_bytes() == data
            else:
                is_done = True
        if not is_done:
            raise FileExistsError(f"{self.url(name)}: exists already, with other content")

    def _blob(self, name, found):
        if not stat.S_ISREG(found.st_mode):
            raise BlobNotFoundError(f"{self.url(name)}: is not a regular file")
        return Blob(name, found.st_size, mtime=found.st_mtime_ns, ctime=found.st_ctime_ns)

    def _refuse(self, error):
        """Raise an error for a folder that cannot be listed; one that is missing is empty, as in the cloud."""
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise BucketError(f"{printable(error.filename)}: cannot be listed ({error.strerror})") from error

    def _refuse_changed(self, blob, found):
        if (found.st_size, found.st_mtime_ns) != (blob.size, blob.mtime):
            raise BucketError(f"{self.url(blob.name)}: changed in the bucket during the run; run again")


def _is_circle(folder):
    """Whether a folder is a link to one that contains it."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _create_file(path, data):
    """Create a complete file in one step; FileExistsError if the name is taken."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError:  # exFAT and gcsfuse have no hard links. So an empty file takes the name, which only one
            open(path, "xb").close()  # process can make, and the complete file then replaces it.
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _checked_name(name, place):
    """Return the name if it is safe; raises BucketError, which begins with the bucket `place`, if it is not."""
    if not name.isascii() and re.search(r"[\ud800-\udfff]", name):
        raise BucketError(f"{place}: '{printable(name)}' is not UTF-8 as a name; rename it")
    if _UNSAFE_NAME.search(name):
        raise BucketError(
            f"{place}: '{printable(name)}' is refused as a name (control characters, or parts that are empty, '.' or "
            "'..'); rename it"
        )
    return name


def _folder_prefix(prefix, place):
    """What the names in the folder `prefix` begin with; raises BucketError like `_checked_name`."""
    prefix = prefix.strip("/")
    return _checked_name(prefix, place) + "/" if prefix else ""


@contextlib.contextmanager
def _disk_errors_named(place, trouble):
    """Raise BucketError instead of OSError, with the `place` on the disk and what the `trouble` is."""
    try:
        yield
    except OSError as error:
        raise BucketError(f"{printable(place)}: {trouble} ({error.strerror or error})") from error
