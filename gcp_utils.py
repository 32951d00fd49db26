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
    on_bytes                       assign a callable: it is called, in any thread, with the size of each file downloaded
    threads                        the number of reads in parallel that is worth while

Google Cloud Storage is asked for objects.get, objects.list and objects.create only. google-cloud-storage makes all
requests but those for content. gcsfs fetches the content, because it needs less than half of the processor time.
"""

import base64
import contextlib
import hashlib
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

_LEVELS = 2  # of folders, which are listed in parallel: <split>/images, <split>/masks/<class>
_FIELDS = "kind,nextPageToken,prefixes,items(name,size,generation,crc32c,contentEncoding)"
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_KEY_FILE = "GOOGLE_APPLICATION_CREDENTIALS"
_ROLES = {"get": "objectViewer", "list": "objectViewer", "create": "objectCreator"}
_WEB_PAGE = r"(?i)<html|<!doctype html"
# Advice for what neither waiting nor another role on the bucket mends, by what the error says.
_ADVICE = (
    (r"CERTIFICATE_VERIFY_FAILED", "name your network's file of certificates in REQUESTS_CA_BUNDLE; check the clock"),
    (r"Tunnel connection failed: 407|^(\w+: )?407\b", "the proxy wants http://user:password@host:port in HTTPS_PROXY"),
    (r"Tunnel connection failed: 4|^ClientHttpProxyError: 4", "the proxy refuses this: ask the person who manages it"),
    (r"(?i)content-encoding", "a proxy or filter has packed the answer: ask the person who manages the network"),
    (r"the answer is a web page", "it comes from a web filter, or the login page of a network, instead of Google"),
    (r"billing|account.* disabled", "this is a matter of billing: ask the person who pays for the project"),
    (r"policy|constraint", "this is a policy of the organisation: ask its administrator"),
    (r"\bscope", "the VM's access scopes are too narrow: give it the scope cloud-platform"),
    (r"serviceusage", "the account needs roles/serviceusage.serviceUsageConsumer on the project that pays"),
    (r"KMS", "this is about the key that encrypts the bucket: ask the person who manages it"),
    (r"requester pays", "name the project that pays in GOOGLE_CLOUD_PROJECT"),
    (r"^404\b", "there is no such bucket: check its name"),
)
# Control characters, parts of characters, and path components that are empty, "." or "..".
_UNSAFE_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]|(?:^|/)\.{0,2}(?:/|\Z)")


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
        _import_libraries()
        return _GoogleBucket(gcp_bucket, Path(cache_directory))
    if not gcp_bucket or "://" in gcp_bucket:
        raise BucketError(f"'{_shown(gcp_bucket)}' is no bucket: write gs://name[/folder], or the path of a directory")
    return _DirectoryBucket(gcp_bucket)


def sweep(folder):
    """Delete what killed runs left behind: ``*.partial`` anywhere below a folder, if older than STRAY_SECONDS.

    A run that is alive keeps writing to its partial files, so they are younger.
    """
    for path in list(Path(folder).rglob("*.partial")):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > STRAY_SECONDS:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _import_libraries():
    """Import what Google's buckets need. For a directory this would be a tenth of a job of 400 small images: 0.6 s."""
    global aiohttp, fsspec, gcsfs, google, google_crc32c, requests, urllib3

    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # these two, or else gcsfs and google-cloud-storage ask
    os.environ["DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA"] = "true"  # for the bucket itself (buckets.get)
    os.environ["NETRC"] = os.devnull  # a password from ~/.netrc would take the place of our token
    warnings.filterwarnings("ignore", module="google")  # about quota projects, and future versions of Python

    import aiohttp
    import fsspec.asyn
    import gcsfs.retry
    import google.api_core.exceptions
    import google.api_core.retry
    import google.auth.transport.requests
    import google.cloud.storage
    import google_crc32c
    import requests
    import urllib3

    for library in ("google", "urllib3", "gcsfs"):  # failures are tried again, and reported if that fails too
        logging.getLogger(library).setLevel(logging.CRITICAL)


class _GoogleBucket:
    threads = 32

    def __init__(self, gcp_bucket, cache):
        self._bucket, _, folder = gcp_bucket.removeprefix("gs://").partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", self._bucket):
            raise BucketError(f"{_shown(gcp_bucket)}: no bucket can have this name; write gs://name[/folder]")
        self._folder = _folder_prefix(folder, printable(gcp_bucket))
        self.address = f"gs://{self._bucket}/{self._folder}".rstrip("/")
        self.on_bytes = lambda number: None
        self._cache = cache.absolute()
        with _disk_errors_named(self._cache, "what is fetched cannot be kept here"):
            self._cache.mkdir(parents=True, exist_ok=True)
        self._payer = None  # the project to charge, once the bucket has asked for one
        self._first_failure = threading.Lock()  # the one who gets it tells
        self._retry = google.api_core.retry.Retry(
            _is_transient, initial=0.25, maximum=16, timeout=RETRY_SECONDS, on_error=self._tell
        )
        self._emulator, emulator = "", os.environ.get("STORAGE_EMULATOR_HOST")
        if emulator:
            emulator = _server(emulator, "STORAGE_EMULATOR_HOST")
            self._emulator = f" (at {_shown(emulator)}, which STORAGE_EMULATOR_HOST names)"  # for messages
        self._client, credentials = _connect(self.url(""), emulator)
        self._gcsfs = _open_gcsfs(self._client.api_endpoint, credentials, self._tell)

    def url(self, name):
        return printable(f"gs://{self._bucket}/{self._folder}{name}")

    def list(self, prefix, skip=None):
        root = self._folder + _folder_prefix(prefix, self.url(""))

        def is_wanted(name):
            return not (skip and skip(name.removeprefix(root).rstrip("/")))

        def list_below(folder, levels):
            found, folders = self._list_folder(folder, "/" if levels else None, is_wanted)
            return found, [pool.submit(list_below, name, levels - 1) for name in folders if is_wanted(name)]

        # Each page names the next, so the pages of a folder come one after the other; folders are listed in parallel.
        blobs = []
        with ThreadPoolExecutor(self.threads) as pool:
            listings = [pool.submit(list_below, root, _LEVELS)]
            for listing in listings:
                found, more = listing.result()
                blobs.extend(found)
                listings.extend(more)
        if not blobs:
            self._refuse_backslashes(root)
        return sorted(blobs)

    def folders(self, prefix):
        root = self._folder + _folder_prefix(prefix, self.url(""))
        _, folders = self._list_folder(root, "/", lambda name: False)
        return sorted(name.removeprefix(root).rstrip("/") for name in folders)

    def stat(self, name):
        path = self._folder + _checked_name(name, self.url(""))
        found = self._ask("get", name, lambda bucket: bucket.get_blob(path, timeout=SOCKET_SECONDS, retry=None))
        if found is None:
            self._refuse_backslashes(path)  # or raises an error if the bucket is missing
            raise BlobNotFoundError(f"{self.url(name)}: there is no such object")
        return self._blob(found)

    def read(self, blob):
        return self.fetch(blob).read_bytes()

    def is_here(self, blob):
        return self._cached(blob).exists()

    def check_room(self, blobs):
        needed = sum(blob.size for blob in blobs if not self.is_here(blob))
        missing = needed + ROOM_TO_SPARE - shutil.disk_usage(self._cache).free
        if needed and missing > 0:
            raise BucketError(
                f"{printable(self._cache)}: {math.ceil(needed / 1e9):,} GB are to be fetched, for which the disk lacks "
                f"{math.ceil(missing / 1e9):,} GB; make room, or set a larger disk_gb in Terraform"
            )

    def fetch(self, blob):
        path = self._cached(blob)
        if not blob.checksum:
            listed, blob = blob, self.stat(blob.name)
            if blob.generation != listed.generation:
                raise _has_changed(self.url(blob.name))
        with _disk_errors_named(path, "what is fetched cannot be kept here; make room, or delete what is in the way"):
            if path.exists() and _checksum(path) == blob.checksum:
                return path
            partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
            try:
                self._ask("get", blob.name, lambda bucket: self._download(bucket, blob, partial))
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        self.on_bytes(blob.size)
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

        try:
            self._ask("create", name, upload)
        except FileExistsError:  # another object, or an earlier attempt at this upload, whose answer was lost
            if self.stat(name).checksum != _base64(google_crc32c.Checksum(data)):
                raise

    def _cached(self, blob):
        # A hash, so that no object name can lead to a place outside the cache.
        key = json.dumps([self._bucket, self._folder + blob.name, blob.version])
        return self._cache / hashlib.sha256(key.encode()).hexdigest()

    def _blob(self, found):
        """Make a `Blob` of google-cloud-storage's."""
        name = _checked_name(found.name[len(self._folder) :], self.url(""))
        if found.content_encoding == "gzip":  # its size and checksum are those of the compressed bytes
            raise BucketError(f"{self.url(name)}: is stored gzip-encoded; upload it without 'gsutil cp -z' or '-j'")
        return Blob(name, int(found.size), int(found.generation), found.crc32c or "")

    def _list_folder(self, folder, delimiter, is_wanted):
        """Return a folder's wanted blobs, and, with the delimiter "/", the folders in it; these may have no blobs."""
        options = {"prefix": folder, "delimiter": delimiter, "fields": _FIELDS, "timeout": SOCKET_SECONDS}

        def ask(bucket):
            found = self._client.list_blobs(bucket, retry=self._retry, **options)  # each page anew
            # The console makes an object with "/" at the end of its name for each folder.
            blobs = [self._blob(each) for each in found if is_wanted(each.name) and not each.name.endswith("/")]
            return blobs, found.prefixes

        return self._ask("list", folder.removeprefix(self._folder), ask)

    def _refuse_backslashes(self, path):
        """Raise an error if there are objects that a program on Windows has uploaded with "\\" for "/"."""
        for wrong in (path.replace("/", "\\"), "\\".join(path.rsplit("/", 1))):
            blobs, _ = self._list_folder(wrong, "/", lambda name: "\\" in name)
            if blobs:
                raise BlobNotFoundError(
                    f"{self.url('')}: '{printable(blobs[0].name)}' has '\\' in its name; upload it again with '/'"
                )

    def _download(self, bucket, blob, path):
        """Let gcsfs download a file, which repeats what fails some six times, in half a minute."""
        try:
            self._gcsfs.get_file(
                f"{self._bucket}/{self._folder}{blob.name}", str(path), generation=blob.generation,
                userProject=bucket.user_project, concurrency=1,
            )  # fmt: skip
        except Exception as error:
            if isinstance(error, FileNotFoundError) and error.errno is None:
                raise _has_changed(self.url(blob.name)) from error
            if answer := _answer_to_gcsfs(error):
                raise answer from error
            raise
        if _checksum(path) != blob.checksum:
            with open(path, errors="replace") as file:
                page = re.search(_WEB_PAGE, file.read(1000))
            raise gcsfs.retry.ChecksumError(page[0] if page else "content that does not match its checksum")

    def _tell(self, error):
        """Tell of the first failure in the life of this bucket; raise BucketError if waiting does not help."""
        what = f"{self.url('')}{self._emulator}: {_said(error)}"
        if _status(error) is None and (advice := _advice(error)):
            raise BucketError(f"{what}; {advice}")
        if self._first_failure.acquire(blocking=False):
            terminal.warn(f"{what}; trying again for {RETRY_SECONDS} s")

    def _ask(self, permission, name, call):
        """Return what `call` returns for the bucket; raise one line for what the libraries raise."""
        payer, project = self._payer, os.environ.get("GOOGLE_CLOUD_PROJECT")
        try:
            return self._retry(call)(self._client.bucket(self._bucket, user_project=payer))
        except (google.api_core.exceptions.GoogleAPIError, *_network_errors()) as error:
            if payer or not project or "requester pays" not in str(error):
                raise self._explained(error, permission, name) from error
        self._payer = project  # only from now on, because it needs a permission on the project
        return self._ask(permission, name, call)

    def _explained(self, error, permission, name):
        """Return the exception to raise for one that the libraries raised."""
        gave_up = isinstance(error, google.api_core.exceptions.RetryError)
        error = error.cause if gave_up else error
        said, status = _said(error), _status(error)
        if status == 412:
            return FileExistsError(f"{self.url(name)}: exists already, with other content")
        if advice := _advice(error):
            pass
        elif gave_up:
            said = f"gave up after trying again for {RETRY_SECONDS} s; the last error: {said}"
            advice = "check the network, then run again"
        elif status == 401 or isinstance(error, google.auth.exceptions.GoogleAuthError):
            advice = _login_advice()
        elif status == 403 and re.search("(?i)does not have|permission|^403: forbidden", said):
            said = f"the permission storage.objects.{permission} is missing ({said})"
            advice = f"grant the account roles/storage.{_ROLES[permission]} on the bucket"
        else:
            advice = "check --gcp-bucket, and the settings of the network (HTTPS_PROXY, STORAGE_EMULATOR_HOST)"
        return BucketError(f"{self.url(name)}{self._emulator}: {said}; {advice}")


def _connect(url, emulator):
    """Return google-cloud-storage's client and its credentials; the environment determines both."""
    key_file = os.environ.get(_KEY_FILE)
    if key_file and not emulator and not os.path.isfile(key_file):
        raise BucketError(f"{_KEY_FILE} is not the path of a file; it must not hold the credentials themselves")
    try:
        if emulator:
            credentials, options = google.auth.credentials.AnonymousCredentials(), {"api_endpoint": emulator}
        else:
            credentials, options = google.auth.default(scopes=[_SCOPE])[0], {}
        client = google.cloud.storage.Client(project=None, credentials=credentials, client_options=options)
    except Exception as error:  # of google.auth, or of any type for an odd credentials file
        raise BucketError(
            f"{url}: no Google credentials ({_shown(first_line(_message(error)))}); {_login_advice()}"
        ) from error
    return client, credentials


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
            credentials.refresh(google.auth.transport.requests.Request())

    trace = aiohttp.TraceConfig()
    trace.on_request_exception.append(tell)
    trace.on_request_end.append(renew_token)
    session = {
        "connector": fsspec.asyn.sync(fsspec.asyn.get_loop(), connector),
        "headers": {"Accept-Encoding": "identity"},
        "proxy": proxy,
        "trace_configs": [trace],
    }
    return gcsfs.GCSFileSystem(
        token=credentials, endpoint_url=endpoint, session_kwargs=session, consistency="none", skip_instance_cache=True,
        requests_timeout=aiohttp.ClientTimeout(sock_connect=SOCKET_SECONDS, sock_read=SOCKET_SECONDS),
    )  # fmt: skip


def _server(address, what):
    """Return an address [http[s]://[user:password@]]host[:port] with its scheme.

    Another one is refused, and not shown: any part of it may be a part of a password.
    """
    address = address if "://" in address or "@" in address else f"http://{address}"
    with contextlib.suppress(urllib3.exceptions.LocationParseError):
        scheme, _, host, _, path, query, fragment = urllib3.util.parse_url(address)
        if host and scheme in ("http", "https") and path in (None, "/") and not (query or fragment):
            return address.rstrip("/")
    raise BucketError(
        f"{what} cannot be used: write http://host:port or http://user:password@host:port, with %2F for '/' and so on; "
        "SOCKS is not supported"
    )


def _answer_to_gcsfs(error):
    """Return Google's own exception for an answer of which gcsfs has made another one; None if it is no answer."""
    if isinstance(error, ValueError):  # the message has "invalid" in it, or, then the cause, "requester pays"
        return google.api_core.exceptions.from_http_status(400, str(error.__cause__ or error))
    if isinstance(error, gcsfs.retry.HttpError):
        return google.api_core.exceptions.from_http_status(int(error.code), str(error.message))
    if isinstance(error, OSError) and str(error).startswith("Forbidden: "):
        return google.api_core.exceptions.from_http_status(403, str(error).partition("\n")[2])
    return None


def _network_errors():
    """What the libraries raise for a request that gets no answer, or not the right one, and for a login that fails."""
    no_answer = requests.RequestException, aiohttp.ClientError, ConnectionError, TimeoutError
    return *no_answer, gcsfs.retry.ChecksumError, google.auth.exceptions.GoogleAuthError


def _status(error):
    """The status of a server's answer; None if there was no answer."""
    return error.code if isinstance(error, google.api_core.exceptions.GoogleAPICallError) else None


def _is_transient(error):
    """Whether a request that failed may succeed when it is tried again, unless `_tell` knows that it cannot."""
    if status := _status(error):
        is_limit = status == 403 and re.search("(?i)rate ?limit", _said(error))
        return status in (408, 429) or status >= 500 or bool(is_limit)
    if isinstance(error, google.auth.exceptions.GoogleAuthError):
        return error.retryable or isinstance(error, google.auth.exceptions.TransportError)
    return isinstance(error, _network_errors())


def _advice(error):
    """Return what to do about an error that neither waiting nor a role mends; None if it is another one."""
    return next((advice for pattern, advice in _ADVICE if re.search(pattern, _said(error))), None)


def _said(error):
    """Return what an error says about its cause, in a few words that may be shown."""
    said = "no access token, " if isinstance(error, google.auth.exceptions.GoogleAuthError) else ""
    if status := _status(error):
        said += f"{status}: {_message(error)}"
    else:
        # The libraries wrap the reason several times; below these two there is only how Python came to it.
        ends = ValueError, requests.exceptions.ContentDecodingError
        while not isinstance(error, ends) and (inner := error.__cause__ or error.__context__):
            error = inner
        said += f"{type(error).__name__}: {_message(error)}".rstrip(": ")
    is_page = re.search(_WEB_PAGE, said + getattr(error, "doc", "")[:1000])
    return "the answer is a web page" if is_page else _shown(said)[:300]


def _message(error):
    """The message of a server's answer if there is one, else what the library says, without what may hold a token."""
    is_login = isinstance(error, google.auth.exceptions.GoogleAuthError)
    with contextlib.suppress(AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
        answer = json.loads(error.args[1]) if is_login else error.response.json()
        return answer["error"]["message"]
    return error.args[0] if error.args and (is_login or _status(error)) else error


def _login_advice():
    if path := os.environ.get(_KEY_FILE):
        return f"{_KEY_FILE} names {printable(path)}: make a new key, set this machine's clock, or unset the variable"
    return "run on a VM with a service account, or run 'gcloud auth application-default login' first"


def _shown(text):
    """The text in printable characters, without the user and the password of an address."""
    return printable(re.sub(r"//[^/\s]*@", "//", str(text)))


def _checksum(path):
    """The crc32c of a file, in base64."""
    checksum = google_crc32c.Checksum()
    with open(path, "rb") as file:
        for _ in checksum.consume(file, 1 << 20):
            pass
    return _base64(checksum)


def _base64(checksum):
    return base64.b64encode(checksum.digest()).decode()


def _has_changed(url):
    return BucketError(f"{url}: changed in the bucket during the run; run again")


class _DirectoryBucket:
    """A directory, which may also be a mounted bucket, exFAT, or a shared folder of a virtual machine.

    On these, inode numbers and ctimes change without a reason. So only another size or mtime refuses a file.
    """

    threads = 8

    def __init__(self, gcp_bucket):
        self._root = Path(gcp_bucket)
        self.address = os.path.abspath(gcp_bucket)
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
            subfolders[:] = wanted.intersection(subfolders)
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
                found = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                raise BlobNotFoundError(f"{self.url(name)}: there is no such file") from None
        if not stat.S_ISREG(found.st_mode):
            raise BlobNotFoundError(f"{self.url(name)}: is not a regular file")
        return Blob(name, found.st_size, mtime=found.st_mtime_ns, ctime=found.st_ctime_ns)

    def read(self, blob):
        path = self._root / blob.name
        with _disk_errors_named(path, "cannot be read"):
            data = path.read_bytes()
        self.fetch(blob)  # which notices a change while it was read
        return data

    def is_here(self, blob):
        return True

    def check_room(self, blobs):
        pass

    def fetch(self, blob):
        found = self.stat(blob.name)
        if (found.size, found.mtime) != (blob.size, blob.mtime):
            raise _has_changed(self.url(blob.name))
        return self._root / blob.name

    def create(self, name, data):
        path = self._root / _checked_name(name, self.url(""))
        with _disk_errors_named(path, "cannot be written; check the permissions and the room on the disk"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _create_file(path, data)
                is_done = True
            except FileExistsError:
                is_done = path.read_bytes() == data
        if not is_done:
            raise FileExistsError(f"{self.url(name)}: exists already, with other content")

    def _refuse(self, error):
        """Raise an error for a folder that cannot be listed; one that is missing is empty, as in the cloud."""
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise BucketError(f"{printable(error.filename)}: cannot be listed ({error.strerror})") from error


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
    if _UNSAFE_NAME.search(name):
        raise BucketError(
            f"{place}: '{printable(name)}' is refused as a name (control characters, not UTF-8, or parts that are "
            "empty, '.' or '..'); rename it"
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
