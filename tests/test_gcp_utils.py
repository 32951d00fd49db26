"""Buckets: against a real fake-gcs-server, mostly behind a proxy that misbehaves, and as plain directories."""

import base64
import errno
import hashlib
import json
import os
import random
import resource
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import parse_qs, urlsplit

import fake_gcs
import pytest
from chaos_proxy import ChaosProxy, operation
from fake_gcs import answering, listing_stub
from helpers import ROOT

import google_bucket
from errors import BlobNotFoundError, BucketError
from gcp_utils import Blob, open_bucket, sweep

IN_THE_BUCKET = {
    "dataset/config.yaml": b"dataset_config: {}\n",
    "dataset/train/images/a.png": b"\x89PNG" + bytes(range(256)) * 40,
    "dataset/train/images/b.png": b"",
    "dataset/train/images/\u00e9 x?#%2F&a=b+c.png": b"odd name",
    "dataset/train/masks/c/d/e.png": b"deep below",
    "dataset-2/..a%2Fb/A\\b'\"\u202e.x": b"not below dataset/",
    "model.hdf5": random.Random(0).randbytes(600_000),
}
# The answers of Google's server for buckets that no test can have.
CASES = {path.stem: json.loads(path.read_text()) for path in (ROOT / "tests/cases/gcs").glob("*.json")}


@pytest.fixture
def bucket_name(server, request):
    """A bucket of the test's own, filled with IN_THE_BUCKET."""
    name = "b" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]
    fake_gcs.create_bucket(server, name)
    for blob, content in IN_THE_BUCKET.items():
        fake_gcs.put_object(server, name, blob, content)
    return name


@pytest.fixture
def gs(proxy, bucket_name, monkeypatch, tmp_path):
    """That bucket, behind a proxy that is faultless to begin with."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    return open_bucket(f"gs://{bucket_name}", tmp_path / "cache")


@pytest.fixture
def directory(tmp_path):
    for name, content in IN_THE_BUCKET.items():
        path = tmp_path / "bucket" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    folder = tmp_path / "bucket/dataset-2"
    folder.symlink_to(folder.rename(tmp_path / "elsewhere"))  # links are followed
    return open_bucket(str(tmp_path / "bucket"), tmp_path / "cache")


@pytest.fixture(params=["gs", "directory"])
def bucket(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def brief(monkeypatch):
    """Patience that a test can wait for; ask for it before the bucket."""
    monkeypatch.setattr(google_bucket, "RETRY_SECONDS", 0.9)
    monkeypatch.setattr(google_bucket, "SOCKET_SECONDS", 0.4)


def error_of(call, *arguments, error=BucketError):
    """Return the message of the error that a call must raise, which must be one printable line."""
    with pytest.raises(error) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 700
    return message


def all_operations(bucket, name="models/new.yaml"):
    """Something of each kind that a run does; fetching last, which the others must not have to wait for."""
    blobs = bucket.list("dataset")
    bucket.create(name, b"x: 1\n")
    assert [bucket.read(blob) for blob in blobs] == [IN_THE_BUCKET[blob.name] for blob in blobs]
    assert bucket.read(bucket.stat(name)) == b"x: 1\n"


def each_kind_of_request(bucket, blob):
    return (lambda: bucket.list(""), lambda: bucket.read(blob), lambda: bucket.create("x", b"x"))


def refusal(name):
    """A refusal of Google's server, as the proxy plays it."""
    return CASES[name]["error"]["code"], json.dumps(CASES[name]).encode()


def test_a_bucket_lists_looks_up_and_reads(bucket):
    names = [blob.name for blob in bucket.list("dataset")]
    assert names == sorted(name for name in IN_THE_BUCKET if name.startswith("dataset/"))
    assert bucket.list("dataset/nothing") == bucket.list("dataset/config.yaml") == []
    assert bucket.folders("") == ["dataset", "dataset-2"] and bucket.folders("/dataset/train/") == ["images", "masks"]
    assert bucket.folders("nothing") == bucket.folders("dataset/train/images") == []
    blobs = bucket.list("")
    assert {blob.name: blob.size for blob in blobs} == {name: len(data) for name, data in IN_THE_BUCKET.items()}
    assert all(bucket.url(blob.name).isprintable() for blob in blobs)
    with ThreadPoolExecutor(bucket.threads) as pool:
        assert list(pool.map(bucket.read, blobs * 5)) == [IN_THE_BUCKET[blob.name] for blob in blobs] * 5
        assert list(pool.map(bucket.stat, [blob.name for blob in blobs])) == blobs
    assert all(bucket.fetch(blob).read_bytes() == IN_THE_BUCKET[blob.name] for blob in blobs)
    for name in ("nothing", "dataset", "dataset/config.yaml/x"):
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


def test_a_browser_shows_a_figure_as_one(gs, server, bucket_name):
    gs.create("x.png", b"x")
    with urllib.request.urlopen(f"{server}/storage/v1/b/{bucket_name}/o/x.png") as answer:
        assert json.load(answer)["contentType"] == "image/png"


def test_a_version_changes_with_the_content(bucket, server, bucket_name, tmp_path):
    before = bucket.stat("dataset/config.yaml")
    fake_gcs.put_object(server, bucket_name, "dataset/config.yaml", b"dataset_config: []\n")
    if (tmp_path / "bucket").exists():
        (tmp_path / "bucket" / "dataset/config.yaml").write_bytes(b"dataset_config: []\n")
    after = bucket.stat("dataset/config.yaml")
    assert after.size == before.size and after.version != before.version
    assert bucket.read(after) == b"dataset_config: []\n"
    for call in (bucket.read, bucket.fetch):
        assert "changed in the bucket during the run" in error_of(call, before)


def test_a_listing_of_many_pages_is_whole(monkeypatch, tmp_path):
    names = [f"split/{folder}/{i:05d}.png" for folder in ("images", "masks/class_0") for i in range(2500)]
    with listing_stub(names) as (url, page_sizes):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        blobs = open_bucket("gs://sandbox", tmp_path / "cache").list("split")
    assert [blob.name for blob in blobs] == names
    assert page_sizes.count(1000) == 4 and sum(page_sizes) == 5000


@pytest.mark.parametrize(
    "name", ["x/../../etc/passwd", "..", "x/./y", "/etc/passwd", "x/\x1b]0;\x07", "a\nb", "\udcff"]
)
def test_unsafe_names_are_refused_and_shown_escaped(directory, name, monkeypatch, tmp_path):
    with listing_stub(["x/fine.png", name]) as (url, _):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        gs = open_bucket("gs://sandbox", tmp_path / "cache")
        for call in (gs.list, gs.stat, directory.stat, lambda name: directory.create(name, b"x")):
            message = error_of(call, "" if call == gs.list else name)
            assert repr(name) in message and "is refused as a name" in message


def test_what_is_skipped_may_be_whatever_it_is(gs, directory, server, bucket_name, tmp_path):
    """Names are told as they are below the folder that is listed. What is not skipped is checked."""
    for name in ("Icon\r", "train/images/.packed", "train/.closed/x.png"):
        fake_gcs.put_object(server, bucket_name, f"dataset/{name}", b"", content_encoding="gzip")
        path = tmp_path / "bucket/dataset" / name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to("nowhere")
    fake_gcs.put_object(server, bucket_name, "dataset/placeholder/", b"")  # as the console makes a "folder"
    skipped = {"Icon\r", "train/images/.packed", "train/.closed"}
    expected = sorted(name for name in IN_THE_BUCKET if name.startswith("dataset/"))
    for bucket in (gs, directory):
        assert [blob.name for blob in bucket.list("dataset", skip=skipped.__contains__)] == expected
        assert "Icon\\r" in error_of(bucket.list, "dataset")
    assert "cannot be listed (File name too long)" in error_of(directory.list, 256 * "x")
    assert ".packed: is stored gzip-encoded" in error_of(gs.list, "dataset/train/images")


@pytest.mark.parametrize("name", ["wrong\\images\\a.png", "sub/wrong\\images\\a.png", "sub\\wrong\\config.yaml"])
def test_objects_uploaded_from_windows_are_named(gs, server, bucket_name, name):
    fake_gcs.put_object(server, bucket_name, name, b"x")
    parts = name.split("\\")
    call = gs.stat if name.endswith("yaml") else gs.list
    assert name.replace("\\", "\\\\") in repr(error_of(call, "/".join(parts if call == gs.stat else parts[:-2])))


def test_a_malformed_address_is_told(tmp_path):
    for address in ("gs://", "gs:///x", "gs://UPPER", "gs://..", "gs://a b/c", "gs://sandbox/../x", "gs://a//b"):
        assert error_of(open_bucket, address, tmp_path).startswith(f"{address}: ")
    for address in ("", "s3://me:secret@x", "https://me:secret@storage.googleapis.com/x", "gs://me:secret@x"):
        message = error_of(open_bucket, address, tmp_path)
        assert "write gs://name" in message and "secret" not in message


def test_a_later_run_fetches_what_has_changed_or_is_damaged_and_nothing_else(gs, proxy, server, bucket_name, tmp_path):
    gs.on_bytes = (at_first := []).append
    paths = {blob.name: gs.fetch(blob) for blob in gs.list("")}
    assert sum(at_first) == sum(map(len, IN_THE_BUCKET.values())) and max(at_first) < 200_000  # in parts
    assert len(set(paths.values())) == len(IN_THE_BUCKET) == len(os.listdir(tmp_path / "cache"))
    assert gs.bytes_to_fetch(gs.list("")) == 0
    fake_gcs.put_object(server, bucket_name, "model.hdf5", b"retrained")
    paths["dataset/config.yaml"].write_bytes(b"dataset_config: {]\n")
    proxy.requests.clear()
    told, later = [], open_bucket(f"gs://{bucket_name}", tmp_path / "cache")
    later.on_bytes = told.append
    assert {blob.name: later.read(blob) for blob in later.list("")} == {**IN_THE_BUCKET, "model.hdf5": b"retrained"}
    assert paths["model.hdf5"].read_bytes() == IN_THE_BUCKET["model.hdf5"]  # the earlier run may still be at it
    fetched = [request.path for request in proxy.requests if request.operation != "list"]
    assert len(fetched) == 2 and "config.yaml?" in fetched[0] and "/model.hdf5?" in fetched[1]
    assert sum(told) == len(IN_THE_BUCKET["dataset/config.yaml"] + b"retrained")


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(gs, directory, tmp_path):
    """The kernel lets no file grow beyond 100 kB: the nearest to a full disk that needs no mount."""
    blob, limits = gs.stat("model.hdf5"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        first, second = error_of(gs.fetch, blob), error_of(directory.create, "full/x.yaml", bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path / "cache") in first and "make room" in first and "File too large" in first
    assert "full/x.yaml: cannot be written" in second and "File too large" in second
    assert os.listdir(tmp_path / "cache") == os.listdir(tmp_path / "bucket/full") == []


def test_partial_files_of_killed_runs_are_swept_from_every_folder(tmp_path):
    old = "objects/ab.12.partial", "results/2026.partial/x.yaml", "x.partial"
    kept = "objects/ab", "counts/ab.partial.npz", "results/2026/x.yaml", "objects/cd.34.partial"
    for path in (tmp_path / name for name in old + kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    for path in {*tmp_path.rglob("*")} - {tmp_path / kept[-1]}:
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    sweep(tmp_path)
    sweep(tmp_path / "nothing")
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == set(kept)


def test_everything_works_on_a_bad_network(bucket_name, server, tmp_path, monkeypatch, capsys):
    """Every kind of fault, on a third of the requests; and each was met, and one line tells of it."""
    many, told = [random.Random(number).randbytes(1000 + 5000 * number) for number in range(40)], []
    for number, content in enumerate(many):
        fake_gcs.put_object(server, bucket_name, f"many/{number:02d}", content)
    with ChaosProxy(server, rate=0.33, delay=0.1, seed=32) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        bucket = open_bucket(f"gs://{bucket_name}", tmp_path / "cache")
        bucket.on_bytes = told.append
        with ThreadPoolExecutor(bucket.threads) as pool:
            assert list(pool.map(bucket.read, bucket.list("many"))) == many
            results = {f"models/m/{number}.yaml": str(number).encode() * 100 for number in range(30)}
            list(pool.map(bucket.create, results, results.values()))
        assert {request.fault for request in proxy.requests} == {None, *proxy.faults}
        assert "other" not in {request.operation for request in proxy.requests}
    assert sum(told) >= sum(map(len, many))
    (line,) = capsys.readouterr().err.splitlines()
    assert f"gs://{bucket_name}" in line and "trying again for 120 s" in line
    assert [name for name in fake_gcs.list_objects(server, bucket_name) if name.startswith("models")] == sorted(results)
    assert all(fake_gcs.get_object(server, bucket_name, name) == content for name, content in results.items())


def test_an_upload_that_nobody_reads_is_given_up(brief, monkeypatch, tmp_path):
    """The first attempt takes longer than the patience, so there is no second."""
    monkeypatch.setattr(google_bucket, "UPLOAD_SPEED", 2e7)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # it takes connections, and never reads
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{listener.getsockname()[1]}")
        message = error_of(open_bucket("gs://sandbox", tmp_path).create, "x.png", bytes(20_000_000))
    assert "gs://sandbox/x.png" in message and "timed out" in message and "gave up after" in message


def test_listings_without_checksums(proxy, gs, server, bucket_name):
    """As of buckets with an encryption key of their own: the object is asked, only where it is to be fetched."""
    (example,) = CASES["list_of_a_bucket_with_its_own_key"]["items"]

    def as_with_a_key(operation, answer):
        items = answer.get("items", []) if operation == "list" else []
        return answer | {
            "items": [example | {key: item[key] for key in ("name", "size", "generation")} for item in items]
        }

    proxy.rewrite = as_with_a_key
    blobs = gs.list("dataset/train/images") + [gs.stat("model.hdf5")._replace(checksum="")]
    for _ in "network", "cache":
        proxy.requests.clear()
        assert all(gs.read(blob) == IN_THE_BUCKET[blob.name] for blob in blobs)
        assert sum("alt=media" not in request.path for request in proxy.requests) == len(blobs)
    fake_gcs.put_object(server, bucket_name, blobs[0].name, b"dataset_config: []\n")
    assert "changed in the bucket during the run" in error_of(gs.fetch, blobs[0])


def test_requester_pays(proxy, gs, bucket_name, monkeypatch, tmp_path):
    def play(method, path, headers):
        if parse_qs(urlsplit(path).query).get("userProject") != ["our-project"]:
            return refusal("400_requester_pays")

    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "our-project")
    blob = gs.stat("model.hdf5")
    all_operations(gs, "unasked.yaml")  # nobody is charged unasked
    assert not any("userProject" in request.path for request in proxy.requests)
    proxy.play = play
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT")
    for call in each_kind_of_request(gs, blob):
        message = error_of(call)
        assert "requester pays" in message and "GOOGLE_CLOUD_PROJECT" in message
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "our-project")
    assert gs.read(blob) == IN_THE_BUCKET["model.hdf5"]
    all_operations(gs)


def other_refusal(message):
    return 403, json.dumps({"error": {"code": 403, "message": message, "errors": [{"message": message}]}}).encode()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (refusal("403_billing"), ["The billing account", "matter of billing"]),
        (refusal("403_policy"), ["prohibited", "administrator"]),
        (other_refusal("Permission denied on Cloud KMS key. Please ensure ..."), ["denied on", "encrypts"]),
        (other_refusal("x does not have serviceusage.services.use access to the project"), ["x does not", "project"]),
        ((403, b"<!DOCTYPE html><html>Blocked by ACME</html>"), ["web page", "web filter"]),
        ((200, b"<html>Please log in</html>"), ["web page", "web filter"]),
    ],
)
def test_refusals_that_are_not_about_the_two_roles(proxy, gs, answer, words, capsys):
    blob = gs.stat("model.hdf5")
    proxy.play = lambda *request: answer
    for call in each_kind_of_request(gs, blob):
        proxy.requests.clear()
        message = error_of(call)
        assert all(word in message for word in words), message
        assert "roles/storage" not in message and len(proxy.requests) <= 2
    assert capsys.readouterr().err == ""  # no word of trying again


@pytest.mark.parametrize(("missing", "role"), [("list", "Viewer"), ("get", "Viewer"), ("create", "Creator")])
def test_a_missing_permission_is_named_with_its_role(proxy, gs, missing, role):
    blob = gs.stat("model.hdf5")
    proxy.permissions = {"get", "list", "create"} - {missing}
    proxy.requests.clear()
    calls = {"list": lambda: gs.list(""), "get": lambda: gs.stat(blob.name), "create": lambda: gs.create("x", b"x")}
    message = error_of(calls[missing])
    assert f"storage.objects.{missing} " in message and f"roles/storage.object{role} " in message and "gs://" in message
    assert "someone@example.com" in message and len(proxy.requests) <= 2


@pytest.fixture
def behind(monkeypatch):
    """Set the environment of a network: `behind(storage, HTTP_PROXY=...)`; only the proxy knows the storage's name."""

    def set_environment(storage, **variables):
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.lower(), raising=False)
        for name, value in {"STORAGE_EMULATOR_HOST": storage, **variables}.items():
            monkeypatch.setenv(name, str(value))

    return set_environment


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
def test_behind_an_http_proxy_that_wants_a_password(proxy, bucket_name, behind, tmp_path, variable):
    def play(method, path, headers):
        if headers["Proxy-Authorization"] != "Basic " + base64.b64encode(b"me:s e").decode():
            return 407, b""

    proxy.play = play
    address = proxy.url.removeprefix("http://")
    behind("http://storage.example.test", **{variable: f"http://me:s%20e@{address}"})
    all_operations(open_bucket(f"gs://{bucket_name}", tmp_path))
    behind("http://storage.example.test", **{variable: f"http://me:wr%20ong@{address}"})
    message = error_of(open_bucket(f"gs://{bucket_name}", tmp_path).list, "")
    assert "407" in message and "user:password" in message and "ong" not in message and "gave up" not in message


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A PEM file with a key and a certificate, which is its own authority, for the hosts of the tests."""
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    hosts = "subjectAltName=DNS:storage.example.test"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=storage.example.test -keyout /dev/stdout -addext"
    path.write_bytes(subprocess.run([*make.split(), hosts], check=True, capture_output=True).stdout)
    return path


@pytest.mark.parametrize("bundle", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_behind_an_https_proxy_with_an_authority_of_its_own(server, bucket_name, certificate, behind, tmp_path, bundle):
    place, blob = "https://storage.example.test", Blob("model.hdf5", 600_000, 1, "x")
    with ChaosProxy(server, certificate=certificate) as storage, ChaosProxy(storage.url) as proxy:
        behind(place, HTTPS_PROXY=proxy.url)
        bucket = open_bucket(f"gs://{bucket_name}", tmp_path)
        for call in each_kind_of_request(bucket, blob):
            proxy.requests.clear()
            message = error_of(call)
            assert "CERTIFICATE_VERIFY_FAILED" in message and "REQUESTS_CA_BUNDLE" in message
            assert len(proxy.requests) == 1  # waiting does not help
        behind(place, HTTPS_PROXY=proxy.url, **{bundle: certificate})
        all_operations(open_bucket(f"gs://{bucket_name}", tmp_path / "cache"))
        assert {request.operation for request in storage.requests} == {"list", "get", "create"}
        assert {request.path for request in proxy.requests} == {"storage.example.test:443"}
        proxy.play = lambda *request: (407, b"")
        behind(place, HTTPS_PROXY=proxy.url.replace("//", "//me:p4ss@"))
        for call in each_kind_of_request(open_bucket(f"gs://{bucket_name}", tmp_path), blob):
            message = error_of(call)
            assert "407" in message and "user:password" in message and "p4ss" not in message


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *((name, "/nowhere/ca.pem") for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")),
        *(("HTTPS_PROXY", f"http://me:p4ss{rest}") for rest in ("@host:port", "/wd@host:1", "@host:1/path", "")),
        ("ALL_PROXY", "socks5://me:p4ss@host:1"),
    ],
)
def test_certificates_and_proxies_that_cannot_be_used_are_told_before_any_request(behind, tmp_path, variable, value):
    behind("https://storage.example.test", **{variable: value})
    message = error_of(open_bucket, "gs://sandbox", tmp_path)
    assert variable in message and "p4ss" not in message


def test_a_missing_bucket_is_told_and_an_emulator_that_is_left_over(server, monkeypatch, tmp_path):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.replace("//", "//me:secret@"))
    message = error_of(open_bucket("gs://no-such-bucket", tmp_path).list, "x")
    assert "no such bucket" in message and "secret" not in message
    assert f"(at {server}, which STORAGE_EMULATOR_HOST names)" in message


def test_missing_credentials_are_told_and_never_shown(monkeypatch, tmp_path):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    secret = json.dumps({"type": "authorized_user", "refresh_token": "s3cr3t", "private_key": "s3cr3t"})
    path = tmp_path / "key.json"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    for content in ("{", '{"type": "odd"}', "[]", secret):
        path.write_text(content)
        message = error_of(open_bucket, "gs://sandbox", tmp_path)
        assert "no Google credentials" in message and str(path) in message and "s3cr3t" not in message
    for value in (secret, base64.b64encode(secret.encode()).decode()):
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", value)
        message = error_of(open_bucket, "gs://sandbox", tmp_path)
        assert "GOOGLE_APPLICATION_CREDENTIALS is not the path of a file" in message and value[:9] not in message


@pytest.fixture
def as_service_account(proxy, bucket_name, certificate, monkeypatch, tmp_path):
    """Open the bucket with the key file of a service account, and the real server in the place of Google's.

    There is also a password for other programs, which must not be sent in the place of the token.
    """
    (tmp_path / ".netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))

    def open_as(token_uri):
        account = {"type": "service_account", "client_email": "someone@example.com", "token_uri": token_uri}
        account |= {"private_key": certificate.read_text().partition("-----BEGIN CERT")[0], "project_id": "p"}
        (tmp_path / "key.json").write_text(json.dumps(account))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
        monkeypatch.setenv("API_ENDPOINT_OVERRIDE", proxy.url)
        monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
        return open_bucket(f"gs://{bucket_name}", tmp_path / "cache")

    return open_as


@pytest.mark.parametrize("operation_", ["list", "get", "create", "content"])
def test_a_token_that_is_refused_before_its_time_is_renewed(as_service_account, proxy, operation_):
    tokens = (f"token-{number}" for number in range(100))
    with fake_gcs.served(lambda path: (200, {"access_token": next(tokens), "expires_in": 3600})) as url:
        bucket, revoked = as_service_account(url), set()

        def play(method, path, headers):
            if operation_ == "content" and "alt=media" in path or operation(method, path) == operation_:
                revoked.add("Bearer token-0")
            if headers["Authorization"] in revoked or not headers["Authorization"].startswith("Bearer"):
                return refusal("401_token_refused_once")

        proxy.play = play
        all_operations(bucket)
        assert revoked and next(tokens) in ("token-2", "token-3")  # as many as were needed
        proxy.token = "another"
        message = error_of(bucket.list, "")
        assert "401: Invalid Credentials" in message and "token-" not in message and "key.json" in message


def test_credentials_that_give_no_token_are_told(as_service_account, brief, capfd):
    with answering(400, {"error": "invalid_grant", "error_description": "Account is gone"}) as url:
        bucket = as_service_account(url)
        message = error_of(bucket.list, "")
        assert "no access token" in message and "invalid_grant" in message and "clock" in message
        assert "gave up" not in message  # there is no use in it
    message = error_of(bucket.list, "")  # the token server is down: there was use in it
    assert "no access token" in message and "gave up" in message
    (line,) = capfd.readouterr().err.splitlines()
    assert "trying again for 0.9 s" in line


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_result_is_published_without_hard_links(directory, tmp_path, monkeypatch, number):
    """As on exFAT, gcsfuse and shared folders. Never over another's; all may read it."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    directory.create("models/m/x.yaml", b"x: 1\n")
    directory.create("models/m/x.yaml", b"x: 1\n")
    error_of(directory.create, "models/m/x.yaml", b"x: 2\n", error=FileExistsError)
    assert directory.read(directory.stat("models/m/x.yaml")) == b"x: 1\n"
    assert os.listdir(tmp_path / "bucket/models/m") == ["x.yaml"]
    os.umask(mask := os.umask(0))
    assert (tmp_path / "bucket/models/m/x.yaml").stat().st_mode & 0o777 == 0o666 & ~mask
