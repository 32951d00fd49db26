"""Buckets: against a real fake-gcs-server, mostly behind a proxy that misbehaves, and as plain directories."""

import base64
import contextlib
import errno
import gzip
import hashlib
import ipaddress
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import fake_gcs
import pytest
from chaos_proxy import ChaosProxy, operation
from fake_gcs import answering, listing_stub

import gcp_utils
from errors import BlobNotFoundError, BucketError
from gcp_utils import Blob, open_bucket, sweep

ROOT = Path(__file__).parent.parent
IN_THE_BUCKET = {
    "dataset/config.yaml": b"dataset_config: {}\n",
    "dataset/train/images/a.png": b"\x89PNG" + bytes(range(256)) * 40,
    "dataset/train/images/b.png": b"",
    "dataset/train/images/\u00e9 x?#%2F&a=b+c.png": b"odd name",
    "dataset/train/masks/c/d/e.png": b"deep below",
    "dataset-2/other.yaml": b"not below dataset/",
    "model.hdf5": random.Random(0).randbytes(600_000),
}
# The answers of Google's server for buckets that no test can have; each file says which.
CASES = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "tests/cases/gcs").glob("*.json"))}


@pytest.fixture(scope="session")
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
    monkeypatch.setattr(gcp_utils, "SOCKET_SECONDS", 0.8)


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


def hash_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# One interface


def test_list_gives_all_blobs_below_a_folder_sorted(bucket):
    names = [blob.name for blob in bucket.list("dataset")]
    assert names == sorted(name for name in IN_THE_BUCKET if name.startswith("dataset/"))
    assert names == [blob.name for blob in bucket.list("/dataset/")]
    assert [blob.name for blob in bucket.list("")] == sorted(IN_THE_BUCKET)
    assert [blob.size for blob in bucket.list("")] == [len(IN_THE_BUCKET[name]) for name in sorted(IN_THE_BUCKET)]
    assert bucket.list("dataset/nothing") == bucket.list("dataset/config.yaml") == []


def test_read_fetch_and_stat_agree_with_the_listing(bucket):
    blobs = bucket.list("") * 5
    with ThreadPoolExecutor(bucket.threads) as pool:
        assert list(pool.map(bucket.read, blobs)) == [IN_THE_BUCKET[blob.name] for blob in blobs]
        assert list(pool.map(bucket.stat, [blob.name for blob in blobs])) == blobs
    for blob in blobs:
        assert bucket.fetch(blob).read_bytes() == IN_THE_BUCKET[blob.name] and bucket.is_here(blob)


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
    for name, data in (("empty", b""), ("big", random.Random(1).randbytes(9_000_000))):
        bucket.create(name, data)
        assert bucket.read(bucket.stat(name)) == data


def test_a_version_changes_with_the_content(bucket, server, bucket_name, tmp_path):
    before = bucket.stat("dataset/config.yaml")
    fake_gcs.put_object(server, bucket_name, "dataset/config.yaml", b"dataset_config: []\n")
    if (tmp_path / "bucket").exists():
        (tmp_path / "bucket" / "dataset/config.yaml").write_bytes(b"dataset_config: []\n")
    after = bucket.stat("dataset/config.yaml")
    assert after.size == before.size and after.version != before.version
    assert bucket.read(after) == b"dataset_config: []\n"
    assert "changed in the bucket during the run" in error_of(bucket.read, before)
    assert "changed in the bucket during the run" in error_of(bucket.fetch, before)


def test_the_bytes_that_come_are_told_and_no_others(proxy, bucket_name, tmp_path):
    proxy.bandwidth = 3e6
    told = []
    bucket = open_bucket(f"gs://{bucket_name}", tmp_path / "cache")
    bucket.on_bytes = told.append
    for _ in "network", "cache":
        for blob in bucket.list(""):
            bucket.read(blob)
        assert sum(told) == sum(map(len, IN_THE_BUCKET.values()))
    assert len(told) > len(IN_THE_BUCKET) + 5  # those of the big blob as they come


def test_a_folder_of_a_bucket_is_a_bucket(proxy, bucket_name, directory, tmp_path):
    for where in (f"gs://{bucket_name}/dataset/train/", str(tmp_path / "bucket/dataset/train")):
        bucket = open_bucket(where, tmp_path / "cache")
        assert [blob.name for blob in bucket.list("images")][0] == "images/a.png"
        assert bucket.read(bucket.stat("images/a.png")) == IN_THE_BUCKET["dataset/train/images/a.png"]
        bucket.create("x.yaml", b"x")
    assert (tmp_path / "bucket/dataset/train/x.yaml").read_bytes() == b"x"
    assert open_bucket(f"gs://{bucket_name}", tmp_path).stat("dataset/train/x.yaml").size == 1


def test_a_directory_needs_no_library_of_the_cloud():
    code = "open_bucket('.', Path('cache')).list('configs'); print({'google', 'requests', 'urllib3'} & {*sys.modules})"
    assert output_of(run(code)) == "set()\n"


def test_the_global_random_sequence_is_left_alone(gs, proxy):
    proxy.rate, proxy.faults = 0.5, ("503", "reset")
    random.seed(1)
    expected = random.random()
    random.seed(1)
    for blob in gs.list("dataset"):
        gs.read(blob)
    assert random.random() == expected


# Names

UNSAFE_NAMES = [
    "x/../../etc/passwd", "../x", "..", "x/..", "x/./y", ".", "x//y", "/etc/passwd", "x/\x1b]0;owned\x07.png",
    "x/a\nb.png", "x/\r.png", "x/\x00.png", "x/\x7f.png", "x/\x9b31m.png",
]  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_list_refuses_unsafe_names_and_shows_them_escaped(name, monkeypatch, tmp_path):
    with listing_stub(["x/fine.png", name]) as (url, _):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        message = error_of(open_bucket("gs://sandbox", tmp_path / "cache").list, "")
    assert repr(name) in message and "gs://sandbox" in message
    assert not (tmp_path / "cache").exists()


def test_unsafe_names_are_refused_from_the_real_server_and_in_a_directory(gs, directory, server, bucket_name, tmp_path):
    for name in ("x/\x1b[31m.png", "x/..png/../y", "a\nb"):
        fake_gcs.put_object(server, bucket_name, name, b"x")
        assert repr(name) in error_of(gs.list, "")
        fake_gcs.delete_object(server, bucket_name, name)
    for name in ("a\nb.png", "\x1b[31m.png", "\udcff.png"):  # the last: a name that is not UTF-8
        path = tmp_path / "bucket" / "dataset" / name
        path.write_bytes(b"x")
        message = error_of(directory.list, "dataset")
        assert repr(name)[1:-1] in message and ("is not UTF-8" if "\udcff" in name else "refused as a name") in message
        path.unlink()


@pytest.mark.parametrize("name", ["", "../x", "/etc/passwd", "x/../y", "x\x1b", "x/", "x\udcff"])
def test_unsafe_names_are_refused_whoever_gives_them(bucket, name):
    for call in (lambda: bucket.stat(name), lambda: bucket.create(name, b"x")):
        assert re.search("refused|is not UTF-8", error_of(call))
    if name and not name.startswith("/") and not name.endswith("/"):
        assert re.search("refused|is not UTF-8", error_of(bucket.list, name))


def test_a_folder_of_any_name_works(bucket):
    for folder in ("a b", "a+b", "a%2Fb", "a%b", "a&b=c", "a?b#c", "a#1", "a..", "\u00e9\u4e00", "a\\b'\""):
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


def test_what_is_skipped_may_be_whatever_it_is(gs, directory, server, bucket_name, tmp_path):
    """Names are told as they are below the folder that is listed, whose own name is nothing to skip."""
    leftovers = ".DS_Store", "train/Icon\r", "train/images/.packed", "train/.closed/x.png", "train/images/.#locked"
    for name in leftovers:
        packed = gzip.compress(b"x")
        fake_gcs.put_object(server, bucket_name, f"dataset/{name}", packed, content_encoding="gzip")
        path = tmp_path / "bucket/dataset" / name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to("nowhere")
    asked = []

    def skip(name):
        asked.append(name)
        return name.rpartition("/")[2].startswith((".", "Icon"))

    expected = sorted(name for name in IN_THE_BUCKET if name.startswith("dataset/"))
    for bucket in (gs, directory):
        assert [blob.name for blob in bucket.list("dataset", skip=skip)] == expected
        assert {".DS_Store", "train/.closed", "train/images/a.png"} <= set(asked)
        assert not {"train/.closed/x.png", "dataset", ""} & set(asked)
        asked.clear()
        error_of(bucket.list, "dataset")


def test_the_folders_of_a_split_are_listed_at_once(monkeypatch, tmp_path):
    """The page sizes come in turns of the folders, each as large as a page can be."""
    folders = ["images", *(f"masks/class_{i}" for i in range(3))]
    names = sorted(f"dataset/train/{folder}/{i:06d}.png" for folder in folders for i in range(3500))
    with listing_stub(names, latency=0.05) as (url, page_sizes):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        blobs = open_bucket("gs://sandbox", tmp_path / "cache").list("dataset/train")
    assert [blob.name for blob in blobs] == names and len(set(blobs)) == len(names)
    assert sorted(page_sizes) == [0] * 2 + [500] * 4 + [1000] * 12
    assert page_sizes.index(500) >= 2 + 6  # when the first folder ends, all others have begun


def test_a_folder_per_image_costs_no_request_per_folder(monkeypatch, tmp_path):
    names = sorted(f"dataset/train/masks/{i:06d}/crack.png" for i in range(2500))
    with listing_stub(names) as (url, page_sizes):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        blobs = open_bucket("gs://sandbox", tmp_path / "cache").list("dataset/train")
    assert [blob.name for blob in blobs] == names
    assert len(page_sizes) < 10


# The cache


def test_a_later_run_fetches_what_has_changed_and_nothing_else(gs, proxy, server, bucket_name, tmp_path):
    paths = {blob.name: gs.fetch(blob) for blob in gs.list("")}
    assert len(set(paths.values())) == len(IN_THE_BUCKET) == len(os.listdir(tmp_path / "cache"))
    assert all(re.fullmatch("[0-9a-f]{64}", name) for name in os.listdir(tmp_path / "cache"))
    fake_gcs.put_object(server, bucket_name, "model.hdf5", b"retrained")
    proxy.requests.clear()
    later = open_bucket(f"gs://{bucket_name}", tmp_path / "cache")
    contents = {blob.name: later.read(blob) for blob in later.list("")}
    assert contents == {**IN_THE_BUCKET, "model.hdf5": b"retrained"}
    assert paths["model.hdf5"].read_bytes() == IN_THE_BUCKET["model.hdf5"]  # the earlier run may still be at it
    (fetched,) = (request.path for request in proxy.requests if request.operation != "list")
    assert "/model.hdf5?" in fetched


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
    """The kernel lets no file grow beyond 100 kB: the nearest to a full disk that needs no mount."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
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


def test_a_dataset_larger_than_the_disk_is_told_before_the_fetch(gs, directory, tmp_path, monkeypatch):
    """The cache is not even there yet; what it holds already needs no room."""
    free = shutil.disk_usage(tmp_path).free
    blobs = gs.list("")
    gs.check_room(blobs)
    for size, missing in ((free + 10**12, 1001), (free - 10**8, 1)):
        message = error_of(gs.check_room, [*blobs, Blob("images/x.png", size, 1)])
        assert "disk_gb" in message and str(tmp_path / "cache") in message
        told = int(re.search(r"lacks ([\d,]+) GB", message)[1].replace(",", ""))
        assert abs(told - missing) <= 1  # others write, too
    directory.check_room([Blob("images/x.png", 10**15)])
    monkeypatch.setattr(gcp_utils, "ROOM_TO_SPARE", 10**18)
    gs.fetch(gs.stat("model.hdf5"))
    gs.check_room([gs.stat("model.hdf5")])
    error_of(gs.check_room, blobs)


def test_partial_files_of_killed_runs_are_swept_from_every_folder(tmp_path):
    old = ["objects/ab.12.partial", "counts/ab.npz.12.partial", "results/20260101T000000Z.partial/x.yaml", "x.partial"]
    kept = ["objects/ab", "counts/ab.partial.npz", "results/20260101T000000Z/x.yaml"]
    young = ["objects/cd.34.partial", "counts/cd.npz.34.partial"]
    for name in old + kept + young:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        if name not in young:
            for each in (path, path.parent):
                os.utime(each, (time.time() - 25 * 3600,) * 2)
    sweep(tmp_path)
    sweep(tmp_path / "nothing")
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*kept, *young}
    assert not (tmp_path / "results/20260101T000000Z.partial").exists()


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
    proxy.rate, proxy.delay = 0.2, 0.1
    processes = [run(FETCH_ALL, f"gs://{bucket_name}", tmp_path / "cache") for _ in range(2)]
    expected = [hashlib.sha256(content).hexdigest() for content in many]
    assert [output_of(process).split() for process in processes] == [expected] * 2
    assert sorted(hash_of(path) for path in (tmp_path / "cache").iterdir()) == sorted(expected)


def test_fetching_killed_at_any_moment_leaves_whole_files_and_swept_ones_only(proxy, bucket_name, many, tmp_path):
    proxy.bandwidth = 3e6
    cache, moments, expected = tmp_path / "cache", random.Random(5), {hashlib.sha256(data).hexdigest() for data in many}
    seen = 0
    for _ in range(2):
        process = run(FETCH_ALL, f"gs://{bucket_name}", cache)
        begun = proxy.count("get")
        wait_until(lambda begun=begun: proxy.count("get") > begun + 9)
        time.sleep(moments.uniform(0, 0.25))
        process.kill()
        process.communicate()
        proxy.settle()
        whole = [path for path in cache.iterdir() if not path.name.endswith(".partial")]
        assert {hash_of(path) for path in whole} <= expected
        assert len(whole) >= seen  # fetched stays fetched
        seen = len(whole)
    assert 0 < seen < len(many)
    for path in cache.glob("*.partial"):
        os.utime(path, (0, 0))
    sweep(tmp_path)
    assert len(os.listdir(cache)) == seen
    proxy.bandwidth, begun = None, proxy.count("get")
    assert set(output_of(run(FETCH_ALL, f"gs://{bucket_name}", cache)).split()) == expected
    assert proxy.count("get") - begun == len(many) - seen


# A bad network


def test_everything_works_on_a_bad_network(bucket_name, many, server, tmp_path, monkeypatch):
    """Every kind of fault, on 30 % of the requests; and each was met."""
    told = []
    with ChaosProxy(server, rate=0.3, delay=0.1, seed=2) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        bucket = open_bucket(f"gs://{bucket_name}", tmp_path / "cache")
        bucket.on_bytes = told.append
        with ThreadPoolExecutor(bucket.threads) as pool:
            blobs = bucket.list("many")
            assert list(pool.map(bucket.read, blobs)) == many
            results = {f"models/m/{number}.yaml": str(number).encode() * 100 for number in range(30)}
            list(pool.map(bucket.create, results, results.values()))
        assert {request.fault for request in proxy.requests} == {None, *proxy.faults}
        assert "other" not in {request.operation for request in proxy.requests}
    assert sum(told) == sum(map(len, many))
    assert [name for name in fake_gcs.list_objects(server, bucket_name) if name.startswith("models")] == sorted(results)
    assert all(fake_gcs.get_object(server, bucket_name, name) == content for name, content in results.items())
    assert {path.name[:1] for path in (tmp_path / "cache").iterdir()} <= set("0123456789abcdef")


@pytest.mark.parametrize("fault", ["reset", "lost", "429", "500", "503", "cut", "wrong", "hang"])
def test_a_fault_that_stays_is_an_error_after_a_few_attempts(proxy, gs, brief, fault, caplog, capfd):
    blob = gs.stat("dataset/config.yaml")
    proxy.rate, proxy.faults = 1, (fault,)
    told = []
    gs.on_bytes = told.append
    for call in (lambda: gs.list("dataset"), lambda: gs.read(blob), lambda: gs.create("x", b"x" * 100)):
        proxy.requests.clear()
        message = error_of(call)
        assert message.startswith("gs://") and "check the network" in message
        assert 2 <= len(proxy.requests) <= 10  # it tried again, and not without pauses
    assert sum(told) == 0
    assert caplog.text == "" and capfd.readouterr() == ("", "")  # no warnings of the libraries on the screen


def test_a_server_that_is_down_is_told(brief, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    message = error_of(open_bucket("gs://sandbox", tmp_path).stat, "config.yaml")
    assert message.startswith("gs://sandbox/config.yaml: ") and "tried again for 0.6 s" in message


def test_the_promises_on_patience():
    """Two minutes after the first failure, and four minutes for a figure of 4 MB that the server does not read."""
    assert gcp_utils.RETRY_SECONDS == 120 and gcp_utils.SOCKET_SECONDS == 30
    first_attempt = gcp_utils.SOCKET_SECONDS + 4e6 / gcp_utils.UPLOAD_SPEED
    assert first_attempt + gcp_utils.RETRY_SECONDS + gcp_utils.SOCKET_SECONDS <= 240


def test_an_upload_that_nobody_reads_is_given_up(brief, monkeypatch, tmp_path):
    """An attempt takes longer than the patience here: the second gets what is left of that, and there is no third."""
    monkeypatch.setattr(gcp_utils, "UPLOAD_SPEED", 1e7)
    attempt, connections, times = gcp_utils.SOCKET_SECONDS + 2, [], [time.monotonic()]

    def accept(listener):
        with contextlib.suppress(OSError):
            while True:
                connections.append(listener.accept())  # and never reads
                times.append(time.monotonic())

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{listener.getsockname()[1]}")
        message = error_of(open_bucket("gs://sandbox", tmp_path).create, "x.png", bytes(20_000_000))
        times.append(time.monotonic())
        listener.shutdown(socket.SHUT_RDWR)
    assert "gs://sandbox/x.png" in message and "timed out" in message and "gave up after" in message
    _, first, second, end = times
    assert second - first < 3 * attempt and end - second < 0.75 * (second - first)


def test_a_slow_line_is_no_fault(proxy, gs, brief, monkeypatch):
    blob = gs.stat("model.hdf5")
    proxy.bandwidth, proxy.latency = 5e5, 0.1
    proxy.requests.clear()
    assert gs.read(blob) == IN_THE_BUCKET["model.hdf5"]  # longer than any of the limits
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("fault", ["wrong", "cut", "503"])
def test_a_failure_after_a_long_download_is_tried_again(proxy, gs, brief, fault):
    """The patience counts from the first failure, not from the start."""
    blob = gs.stat("model.hdf5")
    proxy.bandwidth, proxy.requests[:] = 8e5, []
    proxy.draw = lambda *request, draw=proxy.draw: draw(*request) or (fault if len(proxy.requests) == 1 else None)
    told = []
    gs.on_bytes = told.append
    assert gs.read(blob) == IN_THE_BUCKET["model.hdf5"]
    assert len(proxy.requests) == 2 and sum(told) == len(IN_THE_BUCKET["model.hdf5"])


def test_more_bytes_than_listed_are_not_kept(gs, brief, tmp_path):
    blob = gs.stat("model.hdf5")
    assert "more bytes than" in error_of(gs.fetch, blob._replace(size=1000))
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize("fault", ["lost", "wrong", "cut"])
def test_an_upload_whose_answer_is_lost_is_done_once(proxy, gs, server, bucket_name, fault):
    proxy.draw = lambda *request, draw=proxy.draw: draw(*request) or (fault if len(proxy.requests) == 1 else None)
    gs.create("models/m/result.yaml", b"x: 1\n" * 1000)
    assert fake_gcs.get_object(server, bucket_name, "models/m/result.yaml") == b"x: 1\n" * 1000
    assert [request.operation for request in proxy.requests] == ["create", "create", "get"]


def test_an_upload_is_not_done_if_the_bucket_holds_something_else(gs, proxy, server, bucket_name):
    """Somebody else's object takes the place of ours between the upload and its confirmation."""

    def meddle(method, path, headers):
        if method == "GET":
            fake_gcs.put_object(server, bucket_name, "x.yaml", b"theirs")

    proxy.play = meddle
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


# Kinds of buckets


def refusal(name):
    """A refusal of Google's server, as the proxy plays it."""
    return CASES[name]["error"]["code"], json.dumps(CASES[name]).encode()


@pytest.mark.parametrize("checksum", ["crc32c", "md5Hash", None])
def test_listings_without_checksums(proxy, gs, checksum, tmp_path):
    """As of buckets with an encryption key of their own: the object is asked, only where it is to be fetched."""
    (example,) = CASES["list_of_a_bucket_with_its_own_key"]["items"]
    wanted = {"name", "size", "generation", "kmsKeyName", checksum}

    def as_with_a_key(operation, answer):
        if operation == "list":
            assert wanted - {checksum} == set(example) - {"kind"}
            return answer | {
                "items": [
                    {key: value for key, value in (example | item).items() if key in wanted}
                    for item in answer.get("items", ())
                ]
            }
        return answer

    proxy.rewrite = as_with_a_key
    blobs = gs.list("")
    for _ in "network", "cache":
        proxy.requests.clear()
        assert {blob.name: gs.read(blob) for blob in blobs} == IN_THE_BUCKET
        asked = sum("alt=media" not in request.path for request in proxy.requests)
        assert asked == (0 if checksum else len(blobs))
    assert len(os.listdir(tmp_path / "cache")) == len(IN_THE_BUCKET)
    assert [blob.version for blob in blobs] == [gs.stat(blob.name).version for blob in blobs]


def test_an_object_that_changed_after_a_listing_without_checksums(proxy, gs, server, bucket_name):
    blob = gs.stat("dataset/config.yaml")._replace(checksum="")
    fake_gcs.put_object(server, bucket_name, blob.name, b"dataset_config: []\n")
    assert "changed in the bucket during the run" in error_of(gs.fetch, blob)


def all_operations(bucket, name="models/new.yaml"):
    """Something of each kind that a run does; fetching last, which the others must not have to wait for."""
    blobs = bucket.list("dataset")
    bucket.create(name, b"x: 1\n")
    assert [bucket.read(blob) for blob in blobs] == [IN_THE_BUCKET[blob.name] for blob in blobs]
    assert bucket.read(bucket.stat(name)) == b"x: 1\n"


def test_requester_pays(proxy, gs, monkeypatch):
    def play(method, path, headers):
        if parse_qs(urlsplit(path).query).get("userProject") != ["our-project"]:
            return refusal("400_requester_pays")

    blob = gs.stat("model.hdf5")
    proxy.play = play
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    for call in (lambda: gs.list(""), lambda: gs.read(blob), lambda: gs.create("x", b"x")):
        message = error_of(call)
        assert "requester pays" in message and "GOOGLE_CLOUD_PROJECT" in message and "--gcp-bucket" not in message
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "our-project")
    assert gs.read(blob) == IN_THE_BUCKET["model.hdf5"]
    all_operations(gs)


def test_nobody_is_charged_unasked(proxy, bucket_name, monkeypatch, tmp_path):
    """A project named in the environment serves other purposes, too, and may be one that the account cannot charge."""
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "our-project")
    all_operations(open_bucket(f"gs://{bucket_name}", tmp_path / "cache"))
    assert not any("userProject" in request.path for request in proxy.requests)


@pytest.mark.parametrize("operation_", ["list", "get", "create"])
def test_rate_limits_are_tried_again(proxy, gs, operation_):
    refused = []

    def play(method, path, headers):
        if operation(method, path) == operation_ and len(refused) < 3:
            refused.append(path)
            return refusal("403_rate_limit")

    proxy.play = play
    all_operations(gs)
    assert len(refused) == 3


def other_refusal(message, reason="forbidden"):
    error = {"code": 403, "message": message, "errors": [{"reason": reason, "message": message}]}
    return 403, json.dumps({"error": error}).encode()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (refusal("403_billing"), "matter of billing"),
        (refusal("403_policy"), "administrator"),
        (other_refusal("Provided scope(s) are not authorized"), "cloud-platform"),
        (other_refusal("Permission denied on Cloud KMS key. Please ensure ..."), "encrypts"),
        (other_refusal("x does not have serviceusage.services.use access"), "serviceUsageConsumer"),
        (other_refusal("The bucket is quarantined", "quarantined"), "quarantined"),
    ],
)
def test_refusals_that_are_not_about_the_two_roles(proxy, gs, answer, words):
    blob = gs.stat("model.hdf5")
    proxy.play = lambda *request: answer
    for call in (lambda: gs.list(""), lambda: gs.read(blob), lambda: gs.create("x", b"x")):
        proxy.requests.clear()
        message = error_of(call)
        assert json.loads(answer[1])["error"]["message"] in message and words in message
        assert "roles/storage" not in message and len(proxy.requests) <= 2


def test_content_refused_in_plain_text(proxy, gs):
    """As Google's server does where content is asked for; the reason is learnt by asking for the object."""
    blob = gs.stat("model.hdf5")
    proxy.play = lambda method, path, headers: (403, b"Forbidden") if "alt=media" in path else refusal("403_billing")
    assert "billing" in error_of(gs.read, blob)


def test_behind_an_http_proxy(proxy, bucket_name, monkeypatch, tmp_path):
    """The name of the storage server is one that only the proxy can know; it wants a password."""

    def play(method, path, headers):
        if headers["Proxy-Authorization"] != "Basic " + base64.b64encode(b"me:s e").decode():
            return 407, b""

    proxy.play = play
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://storage.example.test")
    monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("://", "://me:s%20e@"))
    all_operations(open_bucket(f"gs://{bucket_name}", tmp_path / "cache"))
    assert {request.operation for request in proxy.requests} == {"list", "get", "create"}
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    proxy.play = lambda *request: None
    all_operations(open_bucket(f"gs://{bucket_name}", tmp_path / "cache 2"), "models/second.yaml")


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A PEM file with a key and a certificate for storage.example.test that is its own authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name.from_rfc4514_string("CN=storage.example.test")
    names = [x509.DNSName("storage.example.test"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now = datetime.now().astimezone()
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    pem = serialization.Encoding.PEM
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()) + made.public_bytes(pem)
    )
    return path


def test_behind_an_https_proxy_with_an_authority_of_its_own(server, bucket_name, certificate, monkeypatch, tmp_path):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "https://storage.example.test")
    monkeypatch.setattr(gcp_utils, "RETRY_SECONDS", 0.1)
    with ChaosProxy(server, certificate=certificate) as storage, ChaosProxy(storage.url) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        assert "CERTIFICATE_VERIFY_FAILED" in error_of(open_bucket(f"gs://{bucket_name}", tmp_path).list, "")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        all_operations(open_bucket(f"gs://{bucket_name}", tmp_path / "cache"))
        assert {request.operation for request in storage.requests} == {"list", "get", "create"}
        assert {request.path for request in proxy.requests} == {"storage.example.test:443"}


def test_a_proxy_that_cannot_be_one_is_told_at_once(bucket_name, monkeypatch, tmp_path):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://storage.example.test")
    monkeypatch.setenv("HTTP_PROXY", "socks5h://127.0.0.1:1")
    assert "HTTPS_PROXY" in error_of(open_bucket(f"gs://{bucket_name}", tmp_path).list, "")


def test_an_object_stored_packed_is_refused_by_name(gs, server, bucket_name):
    fake_gcs.put_object(server, bucket_name, "packed.yaml", gzip.compress(b"x: 1"), content_encoding="gzip")
    assert "packed.yaml: is stored gzip-encoded" in error_of(gs.list, "")


# Permissions and credentials


def test_get_list_and_create_are_all_that_is_needed(proxy, gs):
    proxy.permissions = ("get", "list", "create")
    all_operations(gs)
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
    assert "someone@example.com" in message and len(proxy.requests) <= 2


def test_refused_credentials_are_told(proxy, gs):
    blob = gs.stat("model.hdf5")
    proxy.permissions, proxy.refusal = (), 401
    for call in (lambda: gs.list(""), lambda: gs.read(blob), lambda: gs.create("x", b"x")):
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


@pytest.fixture(scope="session")
def private_key():
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@pytest.fixture
def as_service_account(proxy, bucket_name, private_key, monkeypatch, tmp_path):
    """Open the bucket with the key file of a service account, and the real server in the place of Google's."""

    def open_as(token_uri):
        account = {"type": "service_account", "client_email": "someone@example.com"}
        account |= {"private_key": private_key.decode(), "token_uri": token_uri, "project_id": "p"}
        (tmp_path / "key.json").write_text(json.dumps(account))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
        monkeypatch.setenv("API_ENDPOINT_OVERRIDE", proxy.url)
        monkeypatch.delenv("STORAGE_EMULATOR_HOST")
        return open_bucket(f"gs://{bucket_name}", tmp_path / "cache")

    return open_as


@pytest.mark.parametrize("operation_", ["list", "get", "create", "content"])
def test_a_token_that_is_refused_once_is_renewed(as_service_account, proxy, operation_):
    """By its time it would still be valid; and no token is in the message when the new one is refused, too."""
    refused = []

    def play(method, path, headers):
        if operation_ == "content":  # where it is asked for, then where the object is asked for the reason
            meant = len(refused) < 2 and ("alt=media" in path or refused)
        else:
            meant = operation(method, path) == operation_ and not refused
        if meant:
            refused.append(path)
            return refusal("401_token_refused_once")

    proxy.token = "a-secret-token"
    with answering(200, {"access_token": "a-secret-token", "expires_in": 3600, "token_type": "Bearer"}) as url:
        bucket = as_service_account(url)
        proxy.play = play
        all_operations(bucket)
        assert refused
        blob, proxy.token = bucket.stat("model.hdf5"), "another"
        for call in (lambda: bucket.list(""), lambda: bucket.read(blob), lambda: bucket.create("x", b"x")):
            message = error_of(call)
            assert "credentials are refused" in message and "secret" not in message


def test_credentials_that_give_no_token_are_told(as_service_account, brief, capfd):
    with answering(400, {"error": "invalid_grant", "error_description": "Account is gone"}) as url:
        bucket = as_service_account(url)
        message = error_of(bucket.list, "")
        assert "no access token" in message and "invalid_grant" in message and "PRIVATE" not in message
        assert "tried again" not in message  # there is no use in it
    message = error_of(bucket.list, "")  # the token server is down: there was use in it
    assert "no access token" in message and "tried again" in message
    assert capfd.readouterr() == ("", "")


ELSEWHERE = {"kind": "storage#object", "name": "elsewhere/x", "size": "1", "generation": "1", "crc32c": "AAAAAA=="}


@pytest.mark.parametrize(
    "answer", [{}, [], "x", {"kind": "storage#objects", "items": [{"name": "x"}]},
               {"kind": "storage#objects", "items": [ELSEWHERE]}]
)  # fmt: skip
def test_what_is_not_the_storage_api_is_no_empty_bucket(brief, monkeypatch, tmp_path, answer):
    with answering(200, answer) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        bucket = open_bucket("gs://sandbox/folder", tmp_path / "cache")
        for call in (lambda: bucket.list(""), lambda: bucket.stat("x"), lambda: bucket.create("x", b"x")):
            assert "not in the manner of Google Cloud Storage" in error_of(call)


@pytest.mark.parametrize("operation_", ["list", "stat", "create"])
def test_an_unknown_bucket_is_told(proxy, tmp_path, operation_):
    bucket = open_bucket("gs://no-such-bucket/folder", tmp_path)
    call = {"list": bucket.list, "stat": bucket.stat, "create": lambda name: bucket.create(name, b"x")}[operation_]
    assert error_of(call, "x") == "gs://no-such-bucket: there is no such bucket; check its name"


@pytest.mark.parametrize(
    "address",
    ["gs://", "gs:///x", "gs://UPPER", "gs://..", "gs://a b/c", "gs://sandbox/../x", "gs://sandbox/a//b", "gs://a\x1b"],
)
def test_a_malformed_address_is_told(address, tmp_path):
    assert error_of(open_bucket, address, tmp_path).startswith(repr(address)[1:-1] + ": ")


# A directory


def test_a_directory_is_used_in_place(directory, tmp_path):
    blob = directory.stat("model.hdf5")
    assert directory.fetch(blob) == tmp_path / "bucket" / "model.hdf5"
    assert not (tmp_path / "cache").exists()


def test_a_version_in_a_directory_outlives_what_does_not_touch_the_content(directory, tmp_path):
    """A backup, other permissions, another hard link, another place: none of these costs a second pass."""
    versions = [(blob.name, blob.version) for blob in directory.list("")]
    subprocess.run(["cp", "-a", tmp_path / "bucket", tmp_path / "copy"], check=True)
    shutil.rmtree(tmp_path / "bucket")
    for path in list((tmp_path / "copy").rglob("*.*")):
        if path.is_file():
            path.chmod(0o644)
            os.link(path, tmp_path / f"link {hash(path)}")
    moved = (tmp_path / "copy").rename(tmp_path / "moved")
    assert [(blob.name, blob.version) for blob in open_bucket(str(moved), tmp_path).list("")] == versions


@pytest.mark.parametrize("first", ["read", "fetch"])
@pytest.mark.parametrize("later", ["read", "fetch"])
def test_where_the_mtime_changes_the_content_decides(directory, tmp_path, first, later):
    blob = directory.stat("model.hdf5")
    path = tmp_path / "bucket" / "model.hdf5"
    getattr(directory, first)(blob)
    os.utime(path, (1, 1))
    getattr(directory, later)(blob)
    path.write_bytes(IN_THE_BUCKET["model.hdf5"][:-1] + b"?")
    assert "changed in the bucket during the run" in error_of(getattr(directory, later), blob)
    path.write_bytes(b"shorter")
    assert "changed in the bucket during the run" in error_of(getattr(directory, later), blob)


def test_a_file_that_changes_before_it_was_read_is_told(directory, tmp_path):
    """What was in it when it was listed, which is what the counts are filed under, nobody can say."""
    blob = directory.stat("model.hdf5")
    os.utime(tmp_path / "bucket" / "model.hdf5", (1, 1))
    for call in (directory.read, directory.fetch):
        assert "changed in the bucket during the run" in error_of(call, blob)
    (tmp_path / "bucket" / "model.hdf5").unlink()
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


# What file systems lack: files without a name, also hard links, or only these.
LACKING = {
    "nothing": "",
    "nameless files": "os.O_TMPFILE = os.O_RDONLY | os.O_EXCL | os.O_CREAT",  # refused for a directory
    "hard links": "def no_links(*_, **__): raise PermissionError(1, 'Operation not permitted')\nos.link = no_links",
}
LACKING["both"] = f"{LACKING['nameless files']}\n{LACKING['hard links']}"


@pytest.mark.parametrize("lacking", LACKING)
def test_create_in_a_directory_killed_at_any_moment_leaves_whole_files_only(tmp_path, lacking):
    code = f"""
{LACKING[lacking]}
import hashlib, itertools
bucket = open_bucket(sys.argv[1], Path("cache"))
for number in itertools.count(int(sys.argv[2])):
    data = number.to_bytes(4, "big") * 1_000_000
    print(flush=True)
    bucket.create(f"results/{{hashlib.sha256(data).hexdigest()}}.yaml", data)
"""
    moments, results = random.Random(7), tmp_path / "results"
    for attempt in range(5):
        process = run(code, tmp_path, 1000 * attempt)
        for _ in range(2):
            process.stdout.readline()
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.communicate()
    whole = [path for path in results.glob("[0-9a-f]*") if path.stat().st_size]  # a name may be taken, never by half
    assert len(whole) >= 5 and all(path.stem == hash_of(path) for path in whole)
    hidden = list(results.glob(".*"))
    assert len(hidden) <= 5 if lacking != "nothing" else not hidden
    assert oct(whole[0].stat().st_mode & 0o777) == oct(0o666 & ~current_umask())


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_result_is_published_where_there_are_no_hard_links(directory, tmp_path, monkeypatch, number):
    """As on exFAT, gcsfuse and shared folders; nor can such a folder be flushed. And never over another's."""

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    directory.create("models/m/x.yaml", b"x: 1\n")
    directory.create("models/m/x.yaml", b"x: 1\n")
    error_of(directory.create, "models/m/x.yaml", b"x: 2\n", error=FileExistsError)
    assert directory.read(directory.stat("models/m/x.yaml")) == b"x: 1\n"
    assert os.listdir(tmp_path / "bucket/models/m") == ["x.yaml"]


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
