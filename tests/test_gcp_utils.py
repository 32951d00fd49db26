"""Buckets: against a real fake-gcs-server, mostly behind a proxy that misbehaves, and as plain directories."""

import contextlib
import hashlib
import http.server
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import fake_gcs
import pytest
from chaos_proxy import ChaosProxy

import gcp_utils
from gcp_utils import Blob, BlobNotFoundError, BucketError, open_bucket

ROOT = Path(__file__).parent.parent
IN_THE_BUCKET = {
    "dataset/config.yaml": b"dataset_config: {}\n",
    "dataset/train/images/a.png": b"\x89PNG" + bytes(range(256)) * 40,
    "dataset/train/images/b.png": b"",
    "dataset/train/images/\u00e9 x?#%2F&a=b+c.png": b"odd name",
    "dataset-2/other.yaml": b"not below dataset/",
    "model.hdf5": random.Random(0).randbytes(3_000_000),
}


@pytest.fixture(scope="module")
def server():
    with fake_gcs.fake_gcs_server() as url:
        yield url


@pytest.fixture
def bucket_name(server, request):
    """A bucket of the test's own, filled with IN_THE_BUCKET."""
    name = "b" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]
    fake_gcs.create_bucket(server, name)
    for blob, content in IN_THE_BUCKET.items():
        fake_gcs.put_object(server, name, blob, content)
    return name


@pytest.fixture
def proxy(server, monkeypatch):
    """A proxy that everything goes through, faultless to begin with."""
    with ChaosProxy(server) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        yield proxy


@pytest.fixture
def gs(proxy, bucket_name, tmp_path):
    return open_bucket(f"gs://{bucket_name}", tmp_path / "cache")


@pytest.fixture
def directory(tmp_path):
    for name, content in IN_THE_BUCKET.items():
        path = tmp_path / "bucket" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return open_bucket(str(tmp_path / "bucket"), tmp_path / "cache")


@pytest.fixture(params=["gs", "directory"])
def bucket(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def brief(monkeypatch):
    """Patience that a test can wait for."""
    monkeypatch.setattr(gcp_utils, "RETRY_SECONDS", 0.6)
    monkeypatch.setattr(gcp_utils, "SOCKET_SECONDS", 0.4)
    monkeypatch.setattr(gcp_utils, "BACKOFF_SECONDS", (0.1, 16))


@contextlib.contextmanager
def unprivileged():
    """Be someone whom permissions stop."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that is writable for all and has no closed folder above it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


def error_of(call, *arguments, error=BucketError):
    """Return the message of the error that a call must raise, which must be one printable line."""
    with pytest.raises(error) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 700
    return message


def run(code, *arguments, **kwargs):
    """Start a Python process that runs `code` next to gcp_utils."""
    start = "import sys, os; from pathlib import Path; import gcp_utils; from gcp_utils import open_bucket\n"
    return subprocess.Popen(
        [sys.executable, "-c", start + code, *map(str, arguments)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs,
    )  # fmt: skip


def output_of(process):
    """Wait for a process that must end well and say nothing on stderr; return its stdout."""
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    return out


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# One interface


def test_list_gives_all_blobs_below_a_folder_sorted(bucket):
    names = [blob.name for blob in bucket.list("dataset")]
    assert names == sorted(name for name in IN_THE_BUCKET if name.startswith("dataset/"))
    assert names == [blob.name for blob in bucket.list("/dataset/")]
    assert [blob.name for blob in bucket.list("")] == sorted(IN_THE_BUCKET)
    assert [blob.size for blob in bucket.list("")] == [len(IN_THE_BUCKET[name]) for name in sorted(IN_THE_BUCKET)]
    assert bucket.list("dataset/nothing") == bucket.list("dataset/config.yaml") == []


def test_read_fetch_and_stat_agree_with_the_listing(bucket):
    for blob in bucket.list(""):
        assert bucket.read(blob) == IN_THE_BUCKET[blob.name] == bucket.fetch(blob).read_bytes()
        assert bucket.stat(blob.name) == blob


@pytest.mark.parametrize("name", ["nothing", "dataset", "dataset/config.yaml/x", "dataset/images/c.png"])
def test_what_is_not_there_is_told_by_name(bucket, name):
    assert bucket.url(name) in error_of(bucket.stat, name, error=BlobNotFoundError)


def test_create_is_seen_by_all_and_never_overwrites(bucket):
    name = "models/m 1/\u00e9.yaml"
    bucket.create(name, b"x: 1\n")
    blob = bucket.stat(name)
    assert bucket.read(blob) == b"x: 1\n" and bucket.list("models") == [blob]
    bucket.create(name, b"x: 1\n")  # the same again: it is done
    assert bucket.url(name) in error_of(bucket.create, name, b"x: 2\n", error=FileExistsError)
    assert bucket.stat(name) == blob and bucket.read(blob) == b"x: 1\n"
    bucket.create("empty", b"")
    bucket.create("big", IN_THE_BUCKET["model.hdf5"])
    assert bucket.read(bucket.stat("empty")) == b"" and bucket.read(bucket.stat("big")) == IN_THE_BUCKET["model.hdf5"]


def test_a_version_changes_with_the_content(bucket, server, bucket_name, tmp_path):
    before = bucket.stat("dataset/config.yaml")
    fake_gcs.put_object(server, bucket_name, "dataset/config.yaml", b"dataset_config: []\n")
    if hasattr(bucket, "_root"):
        (tmp_path / "bucket" / "dataset/config.yaml").write_bytes(b"dataset_config: []\n")
    after = bucket.stat("dataset/config.yaml")
    assert after.size == before.size and after.version != before.version
    assert bucket.read(after) == b"dataset_config: []\n"
    assert "changed in the bucket during the run" in error_of(bucket.read, before)
    assert "changed in the bucket during the run" in error_of(bucket.fetch, before)


def test_the_bytes_that_come_are_told_and_no_others(proxy, bucket_name, tmp_path):
    told = []
    bucket = open_bucket(f"gs://{bucket_name}", tmp_path / "cache")
    bucket.on_bytes = told.append
    for _ in "network", "cache":
        for blob in bucket.list(""):
            bucket.read(blob)
        assert sum(told) == sum(map(len, IN_THE_BUCKET.values()))


def test_the_big_blob_is_told_as_it_comes(proxy, bucket_name, tmp_path):
    proxy.bandwidth = 6e6
    told = []
    bucket = open_bucket(f"gs://{bucket_name}", tmp_path / "cache")
    bucket.on_bytes = lambda count: told.append(time.monotonic())
    bucket.fetch(bucket.stat("model.hdf5"))
    assert len(told) > 10 and told[-1] - told[0] > 0.3


def test_a_folder_of_a_bucket_is_a_bucket(proxy, bucket_name, directory, tmp_path):
    for where in (f"gs://{bucket_name}/dataset/train/", str(tmp_path / "bucket/dataset/train")):
        bucket = open_bucket(where, tmp_path / "cache")
        assert [blob.name for blob in bucket.list("images")][0] == "images/a.png"
        assert bucket.read(bucket.stat("images/a.png")) == IN_THE_BUCKET["dataset/train/images/a.png"]
        bucket.create("x.yaml", b"x")
    assert (tmp_path / "bucket/dataset/train/x.yaml").read_bytes() == b"x"
    assert open_bucket(f"gs://{bucket_name}", tmp_path).stat("dataset/train/x.yaml").size == 1


def test_many_threads_read_at_once(bucket):
    blobs = bucket.list("") * 10
    with ThreadPoolExecutor(bucket.threads) as pool:
        assert list(pool.map(bucket.read, blobs)) == [IN_THE_BUCKET[blob.name] for blob in blobs]


def test_gcsfs_is_imported_for_a_cloud_bucket_alone(tmp_path):
    code = "open_bucket('.', Path('cache')).list('configs'); print('gcsfs' in sys.modules, 'fsspec' in sys.modules)"
    assert output_of(run(code)) == "False False\n"
    code = "open_bucket('gs://sandbox', Path('x')); print(*({'gcsfs.core', 'gcsfs.extended_gcsfs'} & {*sys.modules}))"
    assert output_of(run(code, env={**os.environ, "STORAGE_EMULATOR_HOST": "127.0.0.1:1"})) == "gcsfs.core\n"


def test_the_global_random_sequence_is_left_alone(gs, proxy):
    proxy.rate, proxy.faults = 0.5, ("503", "reset")
    random.seed(1)
    expected = random.random()
    random.seed(1)
    for blob in gs.list(""):
        gs.read(blob)
    assert random.random() == expected


# Names

UNSAFE_NAMES = [
    "x/../../etc/passwd", "../x", "..", "x/..", "x/./y", ".", "x//y", "/etc/passwd", "x/\x1b]0;owned\x07.png",
    "x/a\nb.png", "x/\r.png", "x/\x00.png", "x/\x7f.png", "x/\x9b31m.png",
]  # fmt: skip


class ListingStub(http.server.BaseHTTPRequestHandler):
    """The storage API's objects.list, page by page, for names that no server can be filled with in good time."""

    names, page_sizes = (), []
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        start, size = int(query.get("pageToken") or 0), min(int(query.get("maxResults", 1000)), 1000)
        names = [name for name in self.names[start : start + size] if name.startswith(query.get("prefix", ""))]
        same = {"kind": "storage#object", "size": "5", "generation": "1700000000000001", "crc32c": "mnG7TA=="}
        items = [{**same, "name": name} for name in names]
        answer = {"kind": "storage#objects", "items": items}
        if start + size < len(self.names):
            answer["nextPageToken"] = str(start + size)
        content = json.dumps(answer).encode()
        self.page_sizes.append(len(names))
        self.send_response(200)
        self.send_header("Content-Type", "application/json; charset=UTF-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def listing_stub(names):
    handler = type("Handler", (ListingStub,), {"names": names, "page_sizes": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listener:
        threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.server_port}", handler.page_sizes
        finally:
            listener.shutdown()  # else it spins on a closed socket, at the cost of all tests after it


@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_list_refuses_unsafe_names_and_shows_them_escaped(name, monkeypatch, tmp_path):
    with listing_stub(["x/fine.png", name]) as (url, _):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        message = error_of(open_bucket("gs://sandbox", tmp_path / "cache").list, "")
    assert repr(name) in message and "gs://sandbox" in message
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["x/\x1b[31m.png", "x/..png/../y", "a\nb"])
def test_unsafe_names_are_refused_from_the_real_server_too(gs, server, bucket_name, name):
    fake_gcs.put_object(server, bucket_name, name, b"x")
    assert repr(name) in error_of(gs.list, "")


def test_unsafe_names_are_refused_in_a_directory_too(directory, tmp_path):
    for name in ("a\nb.png", "\x1b[31m.png", "\udcff.png"):  # the last: a name that is not UTF-8
        path = tmp_path / "bucket" / "dataset" / name
        path.write_bytes(b"x")
        assert repr(name)[1:-1] in error_of(directory.list, "dataset")
        path.unlink()


@pytest.mark.parametrize("name", ["", "../x", "/etc/passwd", "x/../y", "x\x1b", "x/", "x\udcff"])
def test_unsafe_names_are_refused_whoever_gives_them(bucket, name):
    for call in (lambda: bucket.stat(name), lambda: bucket.create(name, b"x")):
        assert "refused" in error_of(call)
    if name and not name.startswith("/") and not name.endswith("/"):
        assert "refused" in error_of(bucket.list, name)


@pytest.mark.parametrize("folder", ["a b", "a+b", "a%2Fb", "a%b", "a&b=c", "a?b#c", "a..", "\u00e9\u4e00", "a\\b'\""])
def test_a_folder_of_any_name_works(bucket, folder):
    name = f"{folder}/{folder}"
    bucket.create(name, b"x")
    (blob,) = bucket.list(folder)
    assert blob.name == name and bucket.read(blob) == b"x" and bucket.stat(name) == blob


def test_names_that_only_look_odd_are_kept(gs, server, bucket_name):
    names = "odd/A.png", "odd/a.png", "odd/..a", "odd/a..", "odd/\u202egnp.x", "odd/ "
    contents = {name: name.encode() for name in names}
    for name, content in contents.items():
        fake_gcs.put_object(server, bucket_name, name, content)
    fake_gcs.put_object(server, bucket_name, "odd/", b"")  # as the console makes a "folder"
    fake_gcs.put_object(server, bucket_name, "odd/placeholder/", b"")
    blobs = gs.list("odd")
    assert {blob.name: gs.read(blob) for blob in blobs} == contents
    assert len({gs.fetch(blob) for blob in blobs}) == len(contents)
    assert "\u202e" not in gs.url("odd/\u202egnp.x")


def test_a_cached_file_is_named_by_a_hash(gs, tmp_path):
    for blob in gs.list(""):
        path = gs.fetch(blob)
        assert path.parent == tmp_path / "cache" and re.fullmatch("[0-9a-f]{64}", path.name)
    assert len(os.listdir(tmp_path / "cache")) == len(IN_THE_BUCKET)


def test_listing_100_000_objects():
    """Time and memory, in a process of its own; the memory is what the blobs themselves take, and some."""
    names = [f"dataset/train/images/{number:06d}.png" for number in range(100_000)]
    code = """
import time, resource
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
bucket = open_bucket("gs://sandbox", Path("cache"))
bucket.list("dataset/none")
before, start = peak(), time.monotonic()
blobs = bucket.list("dataset")
print(time.monotonic() - start, peak() - before, len(blobs), blobs[0].name, blobs[-1].name, len(set(blobs)))
"""
    with listing_stub(names) as (url, page_sizes):
        result = output_of(run(code, env={**os.environ, "STORAGE_EMULATOR_HOST": url})).split()
    seconds, megabytes = float(result[0]), float(result[1])
    print(f"listing 100,000 objects: {seconds:.1f} s, {megabytes:.0f} MB")
    assert result[2:] == ["100000", names[0], names[-1], "100000"]
    assert page_sizes == [0] * 100 + [1000] * 100
    assert seconds < 20 and megabytes < 80


# The cache


def test_a_later_run_fetches_what_has_changed_and_nothing_else(gs, proxy, server, bucket_name, tmp_path):
    paths = {blob.name: gs.fetch(blob) for blob in gs.list("")}
    fake_gcs.put_object(server, bucket_name, "model.hdf5", b"retrained")
    proxy.requests.clear()
    later = open_bucket(f"gs://{bucket_name}", tmp_path / "cache")
    contents = {blob.name: later.read(blob) for blob in later.list("")}
    assert contents == {**IN_THE_BUCKET, "model.hdf5": b"retrained"}
    assert paths["model.hdf5"].read_bytes() == IN_THE_BUCKET["model.hdf5"]  # the earlier run may still be at it
    assert [request.path.split("?")[0].rpartition("/")[2] for request in proxy.requests] == ["o", "model.hdf5"]


@pytest.mark.parametrize("damage", [b"", b"other", b"dataset_config: {]\n", b"dataset_config: {}\n\n"])
def test_a_damaged_cached_file_is_fetched_again(gs, damage):
    blob = gs.stat("dataset/config.yaml")
    path = gs.fetch(blob)
    path.write_bytes(damage)
    assert gs.read(blob) == IN_THE_BUCKET[blob.name] == path.read_bytes()


def test_the_cache_works_without_writing_when_all_is_there(proxy, bucket_name, open_folder):
    cache = open_folder / "cache"
    bucket = open_bucket(f"gs://{bucket_name}", cache)
    blob = bucket.stat("model.hdf5")
    bucket.fetch(blob).chmod(0o444)
    cache.chmod(0o555)
    with unprivileged():
        assert bucket.read(blob) == IN_THE_BUCKET["model.hdf5"]
        message = error_of(bucket.read, bucket.stat("dataset/config.yaml"))
    assert str(cache) in message and "Permission denied" in message and "make room" in message


def test_a_cache_folder_that_cannot_be_made_is_named(proxy, bucket_name, tmp_path):
    (tmp_path / "file").write_text("in the way")
    bucket = open_bucket(f"gs://{bucket_name}", tmp_path / "file" / "cache")
    for call in (bucket.read, bucket.fetch):
        message = error_of(call, bucket.stat("model.hdf5"))
        assert str(tmp_path / "file" / "cache") in message and "Not a directory" in message


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(proxy, bucket_name, tmp_path):
    """The kernel refuses to let any file grow beyond 1 MB, which is the nearest to a full disk that needs no mount."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
bucket = open_bucket(sys.argv[1], Path(sys.argv[2]))
bucket.read(bucket.stat("dataset/train/images/a.png"))
try:
    bucket.fetch(bucket.stat("model.hdf5"))
except gcp_utils.BucketError as error:
    print(error)
"""
    message = output_of(run(code, f"gs://{bucket_name}", tmp_path / "cache"))
    assert str(tmp_path / "cache") in message and "make room" in message and "File too large" in message
    assert len(os.listdir(tmp_path / "cache")) == 1


def test_old_partial_downloads_are_removed_and_young_ones_are_not(gs, bucket_name, tmp_path):
    kept = gs.fetch(gs.stat("model.hdf5"))
    old, young = (tmp_path / "cache" / f".partial-{age}" for age in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"x")
    for path in (old, kept):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    open_bucket(f"gs://{bucket_name}", tmp_path / "cache")
    assert young.exists() and kept.exists() and not old.exists()


FETCH_ALL = """
from concurrent.futures import ThreadPoolExecutor
import hashlib
bucket = open_bucket(sys.argv[1], Path(sys.argv[2]))
with ThreadPoolExecutor(8) as pool:
    blobs = bucket.list("many")
    print(*[hashlib.sha256(content).hexdigest() for content in pool.map(bucket.read, blobs)])
"""


@pytest.fixture
def many(server, bucket_name):
    """The contents of 40 more blobs of the bucket, in the order of their names."""
    contents = [random.Random(number).randbytes(1000 + 5000 * number) for number in range(40)]
    for number, content in enumerate(contents):
        fake_gcs.put_object(server, bucket_name, f"many/{number:02d}", content)
    return contents


def test_processes_share_a_cache_on_a_bad_network(proxy, bucket_name, many, tmp_path):
    proxy.rate, proxy.delay = 0.3, 0.1
    processes = [run(FETCH_ALL, f"gs://{bucket_name}", tmp_path / "cache") for _ in range(3)]
    expected = [hashlib.sha256(content).hexdigest() for content in many]
    assert [output_of(process).split() for process in processes] == [expected] * 3
    assert sorted(hash_of(path) for path in (tmp_path / "cache").iterdir()) == sorted(expected)


def hash_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_fetching_killed_at_any_moment_leaves_whole_files_only(proxy, bucket_name, many, tmp_path):
    proxy.bandwidth = 3e6
    cache, moments, expected = tmp_path / "cache", random.Random(5), {hashlib.sha256(data).hexdigest() for data in many}
    seen = 0
    for _ in range(3):
        process = run(FETCH_ALL, f"gs://{bucket_name}", cache)
        begun = proxy.count("get")
        wait_until(lambda begun=begun: proxy.count("get") > begun + 2)
        time.sleep(moments.uniform(0, 0.25))
        process.kill()
        process.communicate()
        whole = [path for path in cache.iterdir() if not path.name.startswith(".partial-")]
        assert {hash_of(path) for path in whole} <= expected
        assert len(whole) >= seen  # fetched stays fetched
        seen = len(whole)
    assert 0 < seen < len(many)
    proxy.bandwidth, begun = None, proxy.count("get")
    assert set(output_of(run(FETCH_ALL, f"gs://{bucket_name}", cache)).split()) == expected
    assert proxy.count("get") - begun == len(many) - seen


# A bad network


@pytest.mark.parametrize("seed", range(3))
def test_everything_works_on_a_bad_network(proxy, bucket_name, many, server, tmp_path, seed):
    """Every kind of fault, on 30 % of the requests; and each was met."""
    proxy.rate, proxy.delay, proxy._random = 0.3, 0.1, random.Random(seed)
    told = []
    bucket = open_bucket(f"gs://{bucket_name}", tmp_path / "cache")
    bucket.on_bytes = told.append
    with ThreadPoolExecutor(bucket.threads) as pool:
        blobs = bucket.list("many")
        assert list(pool.map(bucket.read, blobs)) == many
        results = {f"models/m/{number}.yaml": str(number).encode() * 100 for number in range(30)}
        list(pool.map(bucket.create, results, results.values()))
    assert sum(told) == sum(map(len, many))
    assert [name for name in fake_gcs.list_objects(server, bucket_name) if name.startswith("models")] == sorted(results)
    assert all(fake_gcs.get_object(server, bucket_name, name) == content for name, content in results.items())
    assert {request.fault for request in proxy.requests} == {None, *proxy.faults}
    assert {path.name[:1] for path in (tmp_path / "cache").iterdir()} <= set("0123456789abcdef")


@pytest.mark.parametrize("fault", ["reset", "lost", "429", "500", "503", "cut", "wrong", "hang"])
def test_a_fault_that_stays_is_an_error_in_bounded_time(proxy, gs, brief, fault, caplog, capfd):
    blob = gs.stat("dataset/config.yaml")
    proxy.rate, proxy.faults = 1, (fault,)
    told = []
    gs.on_bytes = told.append
    for call in (lambda: gs.list("dataset"), lambda: gs.read(blob), lambda: gs.create("x", b"x" * 100)):
        proxy.requests.clear()
        start = time.monotonic()
        message = error_of(call)
        assert time.monotonic() - start < gcp_utils.RETRY_SECONDS + 2 * gcp_utils.SOCKET_SECONDS + 0.5
        assert message.startswith("gs://") and "check the network" in message
        assert 2 <= len(proxy.requests) <= 10  # it tried again, and not without pauses
    assert sum(told) == 0
    assert caplog.text == "" and capfd.readouterr() == ("", "")  # no tracebacks of gcsfs or asyncio on the screen


def test_a_server_that_is_down_is_an_error_in_bounded_time(bucket_name, brief, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    start = time.monotonic()
    message = error_of(open_bucket("gs://sandbox", tmp_path).stat, "config.yaml")
    assert 0.2 < time.monotonic() - start < 2
    assert message.startswith("gs://sandbox/config.yaml: ") and "tried again for 0.6 s" in message


def test_an_upload_that_nobody_reads_is_given_up(brief, monkeypatch, tmp_path):
    monkeypatch.setattr(gcp_utils, "UPLOAD_SPEED", 1e8)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes connections, and leaves them
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{listener.getsockname()[1]}")
        start = time.monotonic()
        assert "Timeout" in error_of(open_bucket("gs://sandbox", tmp_path).create, "x", bytes(20_000_000))
    assert time.monotonic() - start < 5


def test_the_default_patience_is_two_minutes():
    assert gcp_utils.RETRY_SECONDS == 120 and gcp_utils.SOCKET_SECONDS == 30


def test_a_slow_line_is_no_fault(proxy, gs, brief, monkeypatch):
    blob = gs.stat("model.hdf5")
    monkeypatch.setattr(gcp_utils, "SOCKET_SECONDS", 1)
    proxy.bandwidth, proxy.latency = 1.5e6, 0.1
    proxy.requests.clear()
    assert gs.read(blob) == IN_THE_BUCKET["model.hdf5"]  # some 2 s: longer than any of the limits
    assert len(proxy.requests) == 1


def test_a_failure_after_a_long_download_is_tried_again(proxy, gs, brief):
    """The patience counts from the first failure, not from the start."""
    blob = gs.stat("model.hdf5")
    proxy.bandwidth, proxy.rate, proxy.faults = 3e6, 1, ("wrong",)
    threading.Timer(0.5, lambda: setattr(proxy, "rate", 0)).start()
    assert gs.read(blob) == IN_THE_BUCKET["model.hdf5"]
    assert len(proxy.requests) == 3


def test_a_wrong_body_is_fetched_again(proxy, gs):
    blob = gs.stat("model.hdf5")
    proxy.rate, proxy.faults = 1, ("wrong",)
    threading.Timer(0.2, lambda: setattr(proxy, "rate", 0)).start()
    assert gs.read(blob) == IN_THE_BUCKET["model.hdf5"]
    assert [request.fault for request in proxy.requests[1:]].count("wrong") >= 1


def test_the_md5_serves_where_there_is_no_crc32c(gs):
    content = IN_THE_BUCKET["dataset/config.yaml"]
    blob = gs.stat("dataset/config.yaml")
    generation = blob.version.split(":")[0]
    md5 = gcp_utils._base64(hashlib.md5(content))
    item = {"name": blob.name, "size": "19", "generation": generation, "md5Hash": md5}
    assert gs.read(gs._blob(item)) == content
    assert gs._blob({**item, "crc32c": "AAAAAA=="}).version == f"{generation}:crc32c:AAAAAA=="


def test_more_bytes_than_listed_are_not_kept(gs, brief, tmp_path):
    generation = gs.stat("model.hdf5").version.split(":")[0]
    assert "more bytes than" in error_of(gs.fetch, Blob("model.hdf5", 1000, f"{generation}:crc32c:AAAAAA=="))
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize("fault", ["lost", "wrong", "cut"])
def test_an_upload_whose_answer_is_lost_is_done_once(proxy, gs, server, bucket_name, fault):
    proxy.rate, proxy.faults = 1, (fault,)
    uploaded = threading.Event()
    draw = proxy.draw

    def draw_once(method, path):
        proxy.rate = 0 if uploaded.is_set() else 1
        uploaded.set()
        return draw(method, path)

    proxy.draw = draw_once
    gs.create("models/m/result.yaml", b"x: 1\n" * 1000)
    assert fake_gcs.get_object(server, bucket_name, "models/m/result.yaml") == b"x: 1\n" * 1000
    assert [(request.operation, request.fault) for request in proxy.requests] == [
        ("create", fault), ("create", None), ("get", None),
    ]  # fmt: skip


def test_an_upload_is_not_done_if_the_bucket_holds_something_else(gs, proxy, server, bucket_name):
    """Somebody else's object takes the place of ours between the upload and its confirmation."""
    draw = proxy.draw

    def meddle(method, path):
        if method == "GET":
            fake_gcs.put_object(server, bucket_name, "x.yaml", b"theirs")
        return draw(method, path)

    proxy.draw = meddle
    assert "holds other content" in error_of(gs.create, "x.yaml", b"ours")


def test_uploads_of_one_name_at_once_leave_one_winner(bucket):
    """Real processes; the one that wins is the one whose content is there, and all others are told."""
    code = """
bucket = open_bucket(sys.argv[1], Path("cache"))
print("ready", flush=True)
sys.stdin.readline()
for name in "abc":
    try:
        bucket.create(f"race/{name}.yaml", sys.argv[2].encode() * 50_000)
        print(name)
    except FileExistsError:
        pass
"""
    processes = [run(code, bucket.url(""), number, stdin=subprocess.PIPE) for number in range(3)]
    assert all(process.stdout.readline() == "ready\n" for process in processes)
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    won = [output_of(process).split() for process in processes]
    assert sorted(sum(won, [])) == ["a", "b", "c"]
    for name in "abc":
        (winner,) = (number for number in range(3) if name in won[number])
        assert bucket.read(bucket.stat(f"race/{name}.yaml")) == str(winner).encode() * 50_000
    assert len(bucket.list("race")) == 3


# Permissions and credentials


def test_get_list_and_create_are_all_that_is_needed(proxy, gs):
    proxy.permissions = ("get", "list", "create")
    for blob in gs.list(""):
        assert gs.read(blob) == IN_THE_BUCKET[blob.name]
    gs.create("models/new.yaml", b"x")
    error_of(gs.create, "models/new.yaml", b"y", error=FileExistsError)
    error_of(gs.stat, "nothing", error=BlobNotFoundError)
    assert {request.operation for request in proxy.requests} == {"get", "list", "create"}


@pytest.mark.parametrize("missing", ["get", "list", "create"])
def test_a_missing_permission_is_named_with_its_role(proxy, gs, missing):
    blob = gs.stat("dataset/config.yaml")
    proxy.permissions = {"get", "list", "create"} - {missing}
    call = {"get": lambda: gs.read(blob), "list": lambda: gs.list(""), "create": lambda: gs.create("x", b"x")}[missing]
    proxy.requests.clear()
    message = error_of(call)
    role = "objectCreator" if missing == "create" else "objectViewer"
    assert f"storage.objects.{missing} " in message and f"roles/storage.{role} " in message and "gs://" in message
    assert "someone@example.com" in message and len(proxy.requests) == 1


def test_refused_credentials_are_told(proxy, gs):
    proxy.permissions, proxy.refusal = (), 401
    for call in (lambda: gs.list(""), lambda: gs.create("x", b"x")):
        message = error_of(call)
        assert "credentials are refused" in message and "gcloud auth application-default login" in message


def test_missing_credentials_are_told(monkeypatch, tmp_path):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    for content, name in ((None, "none.json"), ("{", "half.json"), ('{"type": "odd"}', "odd.json")):
        if content:
            (tmp_path / name).write_text(content)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / name))
        message = error_of(open_bucket, "gs://sandbox", tmp_path / "cache")
        assert message.startswith("gs://sandbox/: no Google credentials") and "gcloud auth" in message


@contextlib.contextmanager
def answering(status, answer):
    """Run a server that has one answer to everything, say to requests for access tokens; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        do_GET = do_POST

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.server_port}"
        listener.shutdown()


@pytest.fixture
def as_service_account(proxy, bucket_name, monkeypatch, tmp_path):
    """Open the bucket with the key file of a service account, and the real server in the place of Google's."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )

    def open_as(token_uri):
        account = {"type": "service_account", "client_email": "someone@example.com", "private_key": key.decode()}
        (tmp_path / "key.json").write_text(json.dumps({**account, "token_uri": token_uri, "project_id": "p"}))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
        monkeypatch.delenv("STORAGE_EMULATOR_HOST")
        bucket = open_bucket(f"gs://{bucket_name}", tmp_path / "cache")
        bucket._fs._endpoint = proxy.url
        return bucket

    return open_as


def test_the_default_credentials_are_used(as_service_account, proxy):
    proxy.token = "a-secret-token"
    with answering(200, {"access_token": "a-secret-token", "expires_in": 3600, "token_type": "Bearer"}) as url:
        bucket = as_service_account(url)
        assert bucket.read(bucket.stat("model.hdf5")) == IN_THE_BUCKET["model.hdf5"]
        proxy.token = "another"
        message = error_of(bucket.list, "")
    assert "credentials are refused" in message and "secret" not in message


def test_credentials_that_give_no_token_are_told(as_service_account, brief):
    with answering(400, {"error": "invalid_grant", "error_description": "Account is gone"}) as url:
        bucket = as_service_account(url)
        message = error_of(bucket.list, "")
        assert "no access token" in message and "invalid_grant" in message and "PRIVATE" not in message
        assert "tried again" not in message  # there is no use in it
    message = error_of(bucket.list, "")  # the token server is down: there was use in it
    assert "no access token" in message and "tried again" in message
    assert len(message) < 700


ELSEWHERE = {"kind": "storage#object", "name": "elsewhere/x", "size": "1", "generation": "1", "crc32c": "AAAAAA=="}


@pytest.mark.parametrize(
    "answer", [{}, [], "x", {"kind": "storage#objects", "items": [{"name": "x"}]}, ELSEWHERE,
               {"kind": "storage#objects", "items": [ELSEWHERE]}]
)  # fmt: skip
def test_what_is_not_the_storage_api_is_no_empty_bucket(brief, monkeypatch, tmp_path, answer):
    with answering(200, answer) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        bucket = open_bucket("gs://sandbox/folder", tmp_path / "cache")
        calls = (lambda: bucket.list(""), lambda: bucket.stat("x"), lambda: bucket.create("x", b"x"))
        for call in calls[1:] if answer == ELSEWHERE else calls:
            assert "not in the manner of Google Cloud Storage" in error_of(call)


@pytest.mark.parametrize("operation", ["list", "stat", "create"])
def test_an_unknown_bucket_is_told(proxy, tmp_path, operation):
    bucket = open_bucket("gs://no-such-bucket/folder", tmp_path)
    call = {"list": bucket.list, "stat": bucket.stat, "create": lambda name: bucket.create(name, b"x")}[operation]
    assert error_of(call, "x") == "gs://no-such-bucket: there is no such bucket; check its name"


@pytest.mark.parametrize(
    "address",
    ["gs://", "gs:///x", "gs://UPPER", "gs://..", "gs://a b/c", "gs://sandbox/../x", "gs://sandbox/a//b", "gs://a\x1b"],
)
def test_a_malformed_address_is_told(address, tmp_path):
    assert error_of(open_bucket, address, tmp_path).startswith(repr(address)[1:-1] + ": ")


def test_an_object_stored_packed_is_refused_by_name(gs, server, bucket_name):
    import gzip

    fake_gcs.put_object(server, bucket_name, "packed.yaml", gzip.compress(b"x: 1"), content_encoding="gzip")
    assert "packed.yaml: is stored gzip-encoded" in error_of(gs.list, "")


# A directory


def test_a_directory_is_used_in_place(directory, tmp_path):
    blob = directory.stat("model.hdf5")
    assert directory.fetch(blob) == tmp_path / "bucket" / "model.hdf5"
    assert not (tmp_path / "cache").exists()


def test_a_file_that_changes_while_it_is_read_is_told(directory, tmp_path, monkeypatch):
    blob = directory.stat("model.hdf5")
    path = tmp_path / "bucket" / "model.hdf5"

    def change_first(descriptor, fstat=os.fstat):
        with open(path, "r+b") as file:
            file.write(b"changed")
        return fstat(descriptor)

    monkeypatch.setattr(os, "fstat", change_first)
    assert "changed in the bucket during the run" in error_of(directory.read, blob)
    monkeypatch.undo()
    path.unlink()
    for call in (directory.read, directory.fetch):
        assert "model.hdf5" in error_of(call, blob)


def test_a_directory_that_cannot_be_used_is_told(tmp_path, open_folder):
    (tmp_path / "file").write_text("x")
    (open_folder / "closed" / "x").mkdir(parents=True)
    (open_folder / "closed").chmod(0)
    assert "No such file or directory" in error_of(open_bucket, str(tmp_path / "none"), tmp_path)
    assert "Not a directory" in error_of(open_bucket, str(tmp_path / "file"), tmp_path)
    with unprivileged():
        assert "Permission denied" in error_of(open_bucket, str(open_folder / "closed"), tmp_path)
        bucket = open_bucket(str(open_folder), tmp_path)
        for call in (lambda: bucket.list("closed"), lambda: bucket.stat("closed/x")):
            assert "closed" in error_of(call)
    open_folder.chmod(0o555)
    with unprivileged():
        assert "Permission denied" in error_of(bucket.create, "new.yaml", b"x")
    open_folder.chmod(0o777)
    (open_folder / "closed").chmod(0o777)


def test_links_are_followed_but_not_in_circles(directory, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "c.png").write_bytes(b"c")
    images = tmp_path / "bucket/dataset/train/images"
    (images / "c.png").symlink_to(outside / "c.png")
    (images / "again").symlink_to(tmp_path / "bucket" / "dataset")
    (images / "more").symlink_to(outside)
    blobs = directory.list("dataset/train/images")
    assert directory.read(directory.stat("dataset/train/images/c.png")) == b"c"
    assert "dataset/train/images/more/c.png" in [blob.name for blob in blobs]
    assert len(blobs) < 20
    (images / "d.png").symlink_to(outside / "nothing")
    assert "d.png" in error_of(directory.list, "dataset")


def test_what_is_no_file_is_refused(directory, tmp_path):
    os.mkfifo(tmp_path / "bucket" / "dataset" / "pipe")
    assert "pipe" in error_of(directory.list, "dataset")


def test_a_folder_too_deep_for_recursion_is_listed(tmp_path):
    folders = [str(tmp_path) + "/d" * depth for depth in range(1, 1101)]
    for folder in folders:
        os.mkdir(folder)
    Path(folders[-1], "x").write_bytes(b"x")
    assert [blob.name.count("/") for blob in open_bucket(str(tmp_path), tmp_path).list("")] == [1100]
    os.unlink(folders[-1] + "/x")  # pytest could not
    for folder in reversed(folders):
        os.rmdir(folder)


@pytest.mark.parametrize("named", [False, True])
def test_create_in_a_directory_killed_at_any_moment_leaves_whole_files_only(tmp_path, named):
    """With files that have no name until they are whole, and where the file system has none of these."""
    code = """
if sys.argv[2] == "True":
    os.O_TMPFILE = os.O_RDONLY | os.O_EXCL | os.O_CREAT  # refused for a directory
import hashlib, itertools
bucket = open_bucket(sys.argv[1], Path("cache"))
for number in itertools.count(int(sys.argv[3])):
    data = number.to_bytes(4, "big") * 1_000_000
    print(flush=True)
    bucket.create(f"results/{hashlib.sha256(data).hexdigest()}.yaml", data)
"""
    moments, results = random.Random(7), tmp_path / "results"
    for attempt in range(8):
        process = run(code, tmp_path, named, 1000 * attempt)
        for _ in range(2):
            process.stdout.readline()
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.communicate()
    whole = list(results.glob("[0-9a-f]*"))
    assert len(whole) >= 8 and all(path.stem == hash_of(path) for path in whole)
    hidden = list(results.glob(".*"))
    assert len(hidden) <= 8 if named else not hidden
    assert oct(whole[0].stat().st_mode & 0o777) == oct(0o666 & ~current_umask())


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_create_in_a_directory_takes_no_place_in_vain(directory, tmp_path):
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    open_bucket(sys.argv[1], Path("cache")).create("full/x.yaml", bytes(1 << 21))
except gcp_utils.BucketError as error:
    print(error)
"""
    message = output_of(run(code, tmp_path / "bucket"))
    assert "full/x.yaml" in message and "File too large" in message
    assert os.listdir(tmp_path / "bucket" / "full") == []
    (tmp_path / "bucket" / "full" / "dangling").symlink_to("nowhere")
    with pytest.raises((BucketError, FileExistsError)):
        directory.create("full/dangling", b"x")
    assert not (tmp_path / "bucket" / "full" / "nowhere").exists()


def test_interrupting_a_fetch_ends_it_and_leaves_nothing(proxy, bucket_name, tmp_path):
    proxy.bandwidth = 1e5
    code = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
bucket = open_bucket(sys.argv[1], Path(sys.argv[2]))
try:
    bucket.fetch(bucket.stat("model.hdf5"))
except KeyboardInterrupt:
    print("interrupted", os.listdir(sys.argv[2]))
"""
    process = run(code, f"gs://{bucket_name}", tmp_path / "cache")
    wait_until(lambda: any(path.stat().st_size for path in (tmp_path / "cache").glob(".partial-*")))
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    assert output_of(process) == "interrupted []\n"
    assert time.monotonic() - start < 3
