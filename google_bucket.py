"""A bucket of Google Cloud Storage, as gcp_utils.py describes it.

Google is asked for objects.get, objects.list and objects.create only. google-cloud-storage makes all requests but those
for content. gcsfs fetches the content, because it needs less than half of the processor time.
"""

import base64
import hashlib
import json
import logging
import math
import mimetypes
import os
import re
import shutil
import ssl
import threading
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import terminal
from errors import BlobNotFoundError, BucketError, first_line, printable
from gcp_utils import HAS_CHANGED, Blob, checked_name, disk_errors_named, folder_prefix, without_password

# Without these two, gcsfs and google-cloud-storage also ask for the bucket itself, which needs buckets.get.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
os.environ["DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA"] = "true"
os.environ["NETRC"] = os.devnull  # a password from ~/.netrc would take the place of our token
warnings.filterwarnings("ignore", module="google")  # about quota projects, and future versions of Python

# ruff: noqa: E402
import aiohttp
import fsspec.asyn
import gcsfs
import google.auth.credentials
import google_crc32c
import requests
import urllib3
from gcsfs.retry import ChecksumError, HttpError
from google.api_core import exceptions
from google.api_core.retry import Retry
from google.auth.exceptions import GoogleAuthError, TransportError
from google.auth.transport.requests import Request
from google.cloud import storage

for library in ("google", "urllib3", "gcsfs"):  # failures are tried again, and reported if that fails too
    logging.getLogger(library).setLevel(logging.CRITICAL)

RETRY_SECONDS = 120  # stop trying again this long after a request began
SOCKET_SECONDS = 20  # longest wait for a connection, or for the next bytes of an answer
UPLOAD_SPEED = 70_000  # bytes/s; an upload that is slower on average fails
ROOM_TO_SPARE = 500_000_000  # bytes for the counts and results, besides the files to fetch

_FIELDS = "kind,nextPageToken,prefixes,items(name,size,generation,crc32c,contentEncoding)"
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_KEY_FILE = "GOOGLE_APPLICATION_CREDENTIALS"
_WEB_PAGE = r"(?i)<html|<!doctype html"
# What the libraries raise for a request that gets no answer, or not the right one.
_NO_ANSWER = requests.RequestException, aiohttp.ClientError, ConnectionError, TimeoutError, ChecksumError
# Advice for what neither waiting nor another role on the bucket mends, by what the error says.
_ADVICE = (
    (r"CERTIFICATE_VERIFY_FAILED", "name your network's file of certificates in REQUESTS_CA_BUNDLE; check the clock"),
    (r"Tunnel connection failed: 407|^(\w+: )?407\b", "the proxy wants http://user:password@host:port in HTTPS_PROXY"),
    (r"Tunnel connection failed: 4|^ClientHttpProxyError: 4", "the proxy refuses this: ask the person who manages it"),
    (r"(?i)content-encoding|decompress", "a proxy has packed the answer: ask the person who manages the network"),
    (r"the answer is a web page", "it comes from a web filter, or the login page of a network, instead of Google"),
    (r"billing|account.* disabled", "this is a matter of billing: ask the person who pays for the project"),
    (r"policy|constraint", "this is a policy of the organisation: ask its administrator"),
    (r"KMS", "this is about the key that encrypts the bucket: ask the person who manages it"),
    (r"requester pays", "name the project that pays in GOOGLE_CLOUD_PROJECT"),
    (r"^404\b", "there is no such bucket: check its name"),
)


class GoogleBucket:
    threads = 32

    def __init__(self, gcp_bucket, cache):
        self._bucket, _, folder = gcp_bucket.removeprefix("gs://").partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", self._bucket):
            raise BucketError(f"{without_password(gcp_bucket)}: no bucket can have this name; write gs://name[/folder]")
        self._folder = folder_prefix(folder, lambda _: printable(gcp_bucket))
        self.address = f"gs://{self._bucket}/{self._folder}".rstrip("/")
        self.on_bytes = lambda number: None
        self._cache = cache.absolute()
        with disk_errors_named(self._cache, "what is fetched cannot be kept here"):
            self._cache.mkdir(parents=True, exist_ok=True)
        self._payer = None  # the project to charge, once the bucket has asked for one
        self._first_failure = threading.Lock()  # only the first thread to get it warns
        self._retry = Retry(_is_transient, initial=0.25, maximum=16, timeout=RETRY_SECONDS, on_error=self._on_failure)
        self._emulator = ""  # for messages
        if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
            emulator = _checked_address(emulator, "STORAGE_EMULATOR_HOST")
            self._emulator = f" (at {without_password(emulator)}, which STORAGE_EMULATOR_HOST names)"
        self._client, credentials = _open_client(self.url(""), emulator)
        self._gcsfs = _open_gcsfs(self._client.api_endpoint, credentials, self._on_failure)

    def url(self, name):
        return printable(f"gs://{self._bucket}/{self._folder}{name}")

    def list(self, prefix, skip=None):
        root = self._folder + folder_prefix(prefix, self.url)

        def is_wanted(name):
            return not (skip and skip(name.removeprefix(root).rstrip("/")))

        # Each page names the next, so the pages of a folder come one after the other; folders are listed in parallel.
        blobs = []
        with ThreadPoolExecutor(self.threads) as pool:
            listings = [pool.submit(self._list_folder, root, is_wanted)]
            for listing in listings:  # which grows by the folders that are found
                found, folders = listing.result()
                blobs.extend(found)
                listings.extend(pool.submit(self._list_folder, each, is_wanted) for each in folders if is_wanted(each))
        if not blobs:
            self._refuse_backslashes(root)
        return sorted(blobs)

    def folders(self, prefix):
        root = self._folder + folder_prefix(prefix, self.url)
        _, folders = self._list_folder(root, lambda name: False)
        return sorted(name.removeprefix(root).rstrip("/") for name in folders)

    def stat(self, name):
        path = self._folder + checked_name(name, self.url)
        found = self._with_retries(
            "get", name, lambda bucket: bucket.get_blob(path, timeout=SOCKET_SECONDS, retry=None)
        )
        if found is None:
            self._refuse_backslashes(path)  # or raises an error if the bucket is missing
            raise BlobNotFoundError(f"{self.url(name)}: there is no such object")
        return self._blob(found)

    def read(self, blob):
        return self.fetch(blob).read_bytes()

    def bytes_to_fetch(self, blobs):
        needed = sum(blob.size for blob in blobs if not self._cache_path(blob).exists())
        missing = needed + ROOM_TO_SPARE - shutil.disk_usage(self._cache).free
        if needed and missing > 0:
            raise BucketError(
                f"{printable(self._cache)}: {math.ceil(needed / 1e9):,} GB are to be fetched, for which the disk lacks "
                f"{math.ceil(missing / 1e9):,} GB; make room, or set a larger disk_gb in Terraform"
            )
        return needed

    def fetch(self, blob):
        path = self._cache_path(blob)
        if not blob.checksum:
            listed, blob = blob, self.stat(blob.name)
            if blob.generation != listed.generation:
                raise BucketError(f"{self.url(blob.name)}: {HAS_CHANGED}")
        with disk_errors_named(path, "what is fetched cannot be kept here; make room, or delete what is in the way"):
            if path.exists() and _checksum(path.read_bytes()) == blob.checksum:
                return path
            partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
            try:
                self._with_retries("get", blob.name, lambda bucket: self._download(bucket, blob, partial))
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        return path

    def create(self, name, data):
        path = self._folder + checked_name(name, self.url)

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
            self._with_retries("create", name, upload)
        except FileExistsError:  # another object, or an earlier attempt at this upload, whose answer was lost
            if self.stat(name).checksum != _checksum(data):
                raise

    def _cache_path(self, blob):
        # A hash, so that no object name can lead to a place outside the cache.
        key = json.dumps([self._bucket, self._folder + blob.name, blob.version])
        return self._cache / hashlib.sha256(key.encode()).hexdigest()

    def _blob(self, found):
        """Make a `Blob` of google-cloud-storage's."""
        name = checked_name(found.name[len(self._folder) :], self.url)
        if found.content_encoding == "gzip":  # its size and checksum are those of the compressed bytes
            raise BucketError(f"{self.url(name)}: is stored gzip-encoded; upload it without 'gsutil cp -z' or '-j'")
        return Blob(name, int(found.size), int(found.generation), found.crc32c or "")

    def _list_folder(self, folder, is_wanted):
        """Return the wanted blobs directly in a folder, and the folders in it."""
        options = {"delimiter": "/", "fields": _FIELDS, "timeout": SOCKET_SECONDS}

        def list_folder(bucket):
            found = self._client.list_blobs(bucket, prefix=folder, retry=self._retry, **options)  # retries each page
            # The console makes an object with "/" at the end of its name for each folder.
            blobs = [self._blob(each) for each in found if is_wanted(each.name) and not each.name.endswith("/")]
            return blobs, found.prefixes

        return self._with_retries("list", folder.removeprefix(self._folder), list_folder)

    def _refuse_backslashes(self, path):
        """Raise an error if there are objects that a program on Windows has uploaded with "\\" for "/"."""
        for wrong in (path.replace("/", "\\"), "\\".join(path.rsplit("/", 1))):
            blobs, _ = self._list_folder(wrong, lambda name: "\\" in name)
            if blobs:
                raise BlobNotFoundError(
                    f"{self.url('')}: '{printable(blobs[0].name)}' has '\\' in its name; upload it again with '/'"
                )

    def _download(self, bucket, blob, path):
        """Download a file with gcsfs, which itself tries some six times, for half a minute."""
        progress = fsspec.Callback()
        progress.relative_update = lambda number: self.on_bytes(number)  # gcsfs calls it with each part of the file
        try:
            self._gcsfs.get_file(
                f"{self._bucket}/{self._folder}{blob.name}", str(path), generation=blob.generation,
                userProject=bucket.user_project, concurrency=1, callback=progress,
            )  # fmt: skip
        except exceptions.NotFound as error:
            raise BucketError(f"{self.url(blob.name)}: {HAS_CHANGED}") from error
        except HttpError as error:  # after several tries with new tokens
            raise exceptions.Unauthorized(error.message) from error
        data = path.read_bytes()
        if _checksum(data) != blob.checksum:
            raise ChecksumError(f"content that does not match its checksum and begins with {data[:50]}")

    def _on_failure(self, error):
        """Warn of the first failure in the life of this bucket; raise BucketError if waiting does not help."""
        what = f"{self.url('')}{self._emulator}: {_reason(error)}"
        if _status(error) is None and (advice := _advice(error)):
            raise BucketError(f"{what}; {advice}")
        if self._first_failure.acquire(blocking=False):
            terminal.warn(f"{what}; trying again for {RETRY_SECONDS} s")

    def _with_retries(self, permission, name, call):
        """Return what call(bucket) returns, after some attempts; raise BucketError where the libraries fail."""
        payer, project = self._payer, os.environ.get("GOOGLE_CLOUD_PROJECT")
        try:
            return self._retry(call)(self._client.bucket(self._bucket, user_project=payer))
        except (exceptions.GoogleAPIError, GoogleAuthError, *_NO_ANSWER) as error:
            if payer or not project or "requester pays" not in str(error):
                raise self._error_to_raise(error, permission, name) from error
        self._payer = project  # only from now on, because it needs a permission on the project
        return self._with_retries(permission, name, call)

    def _error_to_raise(self, error, permission, name):
        """Return the exception to raise for one that the libraries raised."""
        gave_up = isinstance(error, exceptions.RetryError)
        error = error.cause if gave_up else error
        reason, status = _reason(error), _status(error)
        if status == 412:
            return FileExistsError(f"{self.url(name)}: exists already, with other content")
        if gave_up:
            reason = f"gave up after trying again for {RETRY_SECONDS} s; the last error: {reason}"
            advice = "check the network, then run again"
        elif status == 401 or isinstance(error, GoogleAuthError):
            advice = _login_advice()
        elif status == 403 and re.search("(?i)does not have .*storage|permission|^403: forbidden", reason):
            role = "roles/storage.objectCreator" if permission == "create" else "roles/storage.objectViewer"
            advice = f"the permission storage.objects.{permission} is missing: grant the account {role} on the bucket"
        else:
            advice = "check --gcp-bucket, and the settings of the network (HTTPS_PROXY, STORAGE_EMULATOR_HOST)"
        return BucketError(f"{self.url(name)}{self._emulator}: {reason}; {_advice(error) or advice}")


def _open_client(url, emulator):
    """Return google-cloud-storage's client and its credentials; the environment determines both."""
    key_file = os.environ.get(_KEY_FILE)
    if key_file and not emulator and not os.path.isfile(key_file):
        raise BucketError(f"{_KEY_FILE} is not the path of a file; it must not hold the credentials themselves")
    try:
        if emulator:
            credentials = google.auth.credentials.AnonymousCredentials()
        else:
            credentials, _ = google.auth.default(scopes=[_SCOPE])
        client = storage.Client(project=None, credentials=credentials, client_options={"api_endpoint": emulator})
    except Exception as error:  # of google.auth, or of any type for an odd credentials file
        reason = without_password(first_line(_safe_message(error)))
        raise BucketError(f"{url}: no Google credentials ({reason}); {_login_advice()}") from error
    return client, credentials


def _proxy_and_certificates(endpoint):
    """Return the proxy's address, or None, and the certificates to trust, as requests finds them in the environment."""
    settings = requests.Session().merge_environment_settings(endpoint, {}, None, None, None)
    proxy = requests.utils.select_proxy(endpoint, settings["proxies"])
    if proxy:
        proxy = _checked_address(proxy, "the proxy of HTTPS_PROXY, HTTP_PROXY or ALL_PROXY")
    place = requests.certs.where() if settings["verify"] is True else settings["verify"]
    try:
        return proxy, ssl.create_default_context(**{"capath" if os.path.isdir(place) else "cafile": place})
    except OSError as error:
        names = "REQUESTS_CA_BUNDLE (or CURL_CA_BUNDLE)"
        raise BucketError(f"{names}: {printable(place)}: no certificates can be read ({_reason(error)})") from error


def _open_gcsfs(endpoint, credentials, on_failure):
    """Return gcsfs's file system, which behaves to the network and to refusals as google-cloud-storage does.

    gcsfs tries again by itself. Before it does, `on_failure` is called with the exception; if that raises another one,
    the download ends.
    """
    proxy, certificates = _proxy_and_certificates(endpoint)

    async def connector():
        return aiohttp.TCPConnector(ssl=certificates)

    async def after_exception(session, context, request):
        if _is_transient(request.exception):
            on_failure(request.exception)

    async def after_answer(session, context, request):
        answer = request.response
        if answer.status == 401:  # gcsfs tries again, but keeps a token as long as its time has not come
            if request.headers.get("Authorization") == f"Bearer {credentials.token}":
                credentials.refresh(Request())
        elif answer.status >= 400:
            raise exceptions.from_http_status(answer.status, await answer.text(errors="replace"))

    trace = aiohttp.TraceConfig()
    trace.on_request_exception.append(after_exception)
    trace.on_request_end.append(after_answer)
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


def _checked_address(address, what):
    """Return an address, [http[s]://[user:password@]]host[:port], with its scheme. No other is accepted, or shown."""
    address = address if "://" in address or "@" in address else f"http://{address}"
    with suppress(urllib3.exceptions.LocationParseError):
        scheme, _, host, _, path, query, fragment = urllib3.util.parse_url(address)
        if host and scheme in ("http", "https") and path in (None, "/") and not (query or fragment):
            return address.rstrip("/")
    raise BucketError(
        f"{what} cannot be used: write http://host:port or http://user:password@host:port, with %2F for '/' and so on; "
        "SOCKS is not supported"
    )


def _status(error):
    """The status of a server's answer; None if there was no answer."""
    return error.code if isinstance(error, exceptions.GoogleAPICallError) else None


def _is_transient(error):
    """Whether a request that failed is to be tried again, unless `_on_failure` knows that this cannot help."""
    if status := _status(error):
        is_limit = status == 403 and re.search("(?i)rate ?limit", _reason(error))
        return is_limit or status in (408, 429) or status >= 500
    if isinstance(error, GoogleAuthError):
        return error.retryable or isinstance(error, TransportError)
    return isinstance(error, _NO_ANSWER)


def _advice(error):
    """Return what to do about an error, if _ADVICE knows it, else None."""
    return next((advice for pattern, advice in _ADVICE if re.search(pattern, _reason(error))), None)


def _reason(error):
    """What an error says about its cause, in a few words without secrets."""
    what_is_missing = "no access token, " if isinstance(error, GoogleAuthError) else ""
    if status := _status(error):
        reason = f"{status}: {_safe_message(error)}"
    else:
        # The libraries wrap the cause several times. A ValueError is the cause; what it wraps is a detail.
        while not isinstance(error, ValueError) and (inner := error.__cause__ or error.__context__):
            error = inner
        reason = f"{type(error).__name__}: {_safe_message(error)}".rstrip(": ")
    is_page = re.search(_WEB_PAGE, reason + getattr(error, "doc", "")[:1000])
    return "the answer is a web page" if is_page else without_password(what_is_missing + reason)[:300]


def _safe_message(error):
    """The message of a server's answer if there is one, else what the library says, without what may hold a token."""
    answer = getattr(error, "response", None)
    with suppress(IndexError, KeyError, TypeError, ValueError):
        return json.loads(error.args[-1] if answer is None else answer.text)["error"]["message"]
    return error.args[0] if error.args and (isinstance(error, GoogleAuthError) or _status(error)) else error


def _login_advice():
    if path := os.environ.get(_KEY_FILE):
        return f"{_KEY_FILE} names {printable(path)}: make a new key, set this machine's clock, or unset the variable"
    return "run on a VM with a service account, or run 'gcloud auth application-default login' first"


def _checksum(data):
    """The crc32c of bytes, as Google writes it: in base64."""
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()
