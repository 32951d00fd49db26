"""Whole runs that are killed, meet a bad network or a bad disk, or run beside each other."""

import base64
import ctypes
import json
import os
import random
import re
import resource
import time

import pytest
from chaos_proxy import ChaosProxy
from fake_gcs import answering, put_object
from helpers import (
    MODEL,
    SMALL_CHUNKS,
    SPLIT,
    GoogleBucket,
    arguments,
    assert_done,
    assert_one_error_line,
    fetched,
    finish,
    lines_of,
    results,
    run_here,
    run_tool,
    start,
    thresholds,
    wait_until,
    whole_results,
)

from counts import Checkpoint
from gcp_utils import open_bucket

# ---------------------------------------------------------------------------------------------------------------
# Killed


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_runs_killed_at_any_moment_lose_nothing(proxy, many_images, tmp_path, monkeypatch, kills):
    """Kills at any moment, during the pass, and, once the counts are there, around the uploads."""
    template, expected = many_images
    bucket, moments = GoogleBucket(proxy, template, f"killed-{kills}"), random.Random(kills)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.server)
    opened = open_bucket(bucket.address, tmp_path / "tmp/objects")
    blobs = opened.list("")

    def counts_on_disk():
        return [path.stat().st_ino for path in (tmp_path / "tmp/counts").glob("*.npz")]

    def images_kept():
        return sum(Checkpoint.load(path).counts.images for path in (tmp_path / "tmp/counts").glob("*.npz"))

    def run_until(is_time):
        """Start a run, kill it when it is time or let it end, and check that it repeats and spoils nothing."""
        here, counted = {blob.name for blob in blobs if not opened.bytes_to_fetch([blob])}, images_kept()
        proxy.requests.clear()
        command = arguments(bucket.address, batch_size=1)
        process = start(*command, cwd=tmp_path, settings=SMALL_CHUNKS, environment=bucket.environment)
        if is_time:
            is_time(process)
            process.kill()
        process = finish(process)
        proxy.settle()
        assert "Traceback" not in process.stderr
        assert not here & set(fetched(proxy))
        if counted and "Counting" in process.stdout:
            assert f"Continuing after {counted} of 120 images" in process.stdout
        assert counted <= images_kept()
        assert all(thresholds(result) == expected for result in whole_results(bucket))
        return process

    def at_any_moment(_):
        time.sleep(moments.uniform(0.1, 5))

    def when_more_is_counted(process):
        before = counts_on_disk()
        wait_until(lambda: counts_on_disk() != before, process)

    def when_a_file_is_uploaded(process):
        number = moments.randint(1, 5)
        wait_until(lambda: proxy.count("create") >= number, process)
        time.sleep(moments.uniform(0, 0.06))

    for i in range(kills):
        run_until((when_more_is_counted, at_any_moment)[i % 2])
    assert run_until(None).returncode == 0
    proxy.latency = 0.05
    for _ in range(kills):
        assert "Counting" not in run_until(when_a_file_is_uploaded).stdout
    done = len(whole_results(bucket))
    assert done >= 1
    assert run_until(None).returncode == 0
    assert len(whole_results(bucket)) == done + 1


# ---------------------------------------------------------------------------------------------------------------
# The network


@pytest.mark.parametrize("runs", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_bad_network_changes_no_result(tiny_bucket_template, counted_template, server, tmp_path, runs):
    """Every kind of fault, on 30 % of the requests, and no permission but those that the README names."""
    expected = thresholds(results(counted_template / "bucket")[0])
    with ChaosProxy(server, 0.3, delay=0.1, seed=7, permissions=("get", "list", "create")) as proxy:
        bucket = GoogleBucket(proxy, tiny_bucket_template, f"bad-network-{runs}")
        for number in range(1, runs + 1):
            process = run_tool(*arguments(bucket.address, batch_size=4), cwd=tmp_path, **bucket.environment)
            assert_done(process)
            found = whole_results(bucket)
            assert len(found) == number
            assert thresholds(found[-1]) == expected
        met = {request.fault for request in proxy.requests}
        assert met == {None, *proxy.faults} if runs > 1 else len(met) > 4
        assert {request.operation for request in proxy.requests} == {"get", "list", "create"}


def test_credentials_are_nowhere(tiny_bucket_template, proxy, tmp_path, monkeypatch):
    """The key of a service account and the token that it gets, against all that a run writes."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    bucket, work = GoogleBucket(proxy, tiny_bucket_template, "with-credentials"), tmp_path / "work"
    work.mkdir()
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    monkeypatch.setenv("API_ENDPOINT_OVERRIDE", proxy.url)
    proxy.token = "a-secret-token"
    with answering(200, {"access_token": proxy.token, "expires_in": 3600, "token_type": "Bearer"}) as url:
        account = {"type": "service_account", "client_email": "someone@example.com", "private_key": key.decode()}
        (tmp_path / "key.json").write_text(json.dumps({**account, "token_uri": url, "project_id": "p"}))
        processes = [run_here(*arguments(bucket.address), cwd=work)]
        proxy.token = "another-token"
        processes.append(run_here(*arguments(bucket.address), cwd=work))
    assert [process.returncode for process in processes] == [0, 4], processes
    written = [path.read_bytes() for path in work.rglob("*") if path.is_file()]
    written += bucket.contents().values()
    written += [text.encode() for process in processes for text in (process.stdout, process.stderr)]
    assert len(whole_results(bucket)) == 1 and len(written) > 30
    secrets = [b"a-secret-token", *key.splitlines()[1:3], base64.b64decode(b"".join(key.splitlines()[1:-1]))[40:80]]
    for secret in [*secrets, b"PRIVATE KEY", b"Bearer"]:
        assert not any(secret in content for content in written)


# ---------------------------------------------------------------------------------------------------------------
# Beside each other, and changes in the bucket


@pytest.mark.slow
def test_runs_from_nothing_at_once_share_a_folder(proxy, many_images, tmp_path):
    template, expected = many_images
    bucket = GoogleBucket(proxy, template, "share-a-folder")
    command = arguments(bucket.address, batch_size=1)
    running = [start(*command, cwd=tmp_path, settings=SMALL_CHUNKS, environment=bucket.environment) for _ in range(2)]
    for process in map(finish, running):
        assert_done(process)
    assert [thresholds(result) for result in whole_results(bucket)] == [expected] * 2
    assert not (tmp_path / "tmp/results").exists()
    assert len(list((tmp_path / "tmp/counts").iterdir())) == 1


@pytest.mark.parametrize("name", [f"{SPLIT}/images/slice_0010.png", f"{MODEL}/model.hdf5"])
def test_a_change_in_the_bucket_during_the_run_is_an_error(proxy, tiny_bucket_template, tmp_path, monkeypatch, name):
    bucket, changed = GoogleBucket(proxy, tiny_bucket_template, f"changes-{len(name)}"), []

    def change(_, answer):
        """Write the object anew as soon as the server has said of which generation it is."""
        if name in str(answer) and not changed:
            changed.append(name)
            put_object(bucket.server, bucket.name, name, (tiny_bucket_template / name).read_bytes())
        return answer

    proxy.rewrite = change
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    process = run_here(*arguments(bucket.address), cwd=tmp_path)
    assert_one_error_line(process, 4, name, "changed in the bucket during the run")
    assert not bucket.contents()
    assert not list(tmp_path.glob("tmp/counts/*"))


# ---------------------------------------------------------------------------------------------------------------
# The disk and the screen


def obey_permissions():
    """Give up, as root, what lets root pass over them; a process that runs this before its program keeps it so."""
    if os.geteuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0  # PR_CAPBSET_DROP


def allow_no_large_file():
    """The kernel lets no file grow beyond 1 MB: the nearest to a full disk that needs no mount. Counts are larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
    os.close(1)  # as some schedulers of jobs do


@pytest.mark.parametrize(
    ("mode", "disk", "words"),
    [
        (0o555, obey_permissions, "tmp/counts (Permission denied)"),
        (0o755, allow_no_large_file, "tmp/counts (File too large)"),
    ],
    ids=["read-only", "full"],
)
def test_a_bad_disk_costs_no_result(tiny_bucket, counted_template, tmp_path, mode, disk, words):
    """Counts cannot be kept in ./tmp; a directory bucket needs nothing there."""
    (tmp_path / "work").mkdir(mode)
    process = finish(start(*arguments("../bucket", batch_size=4), cwd=tmp_path / "work", preexec_fn=disk))
    assert_done(process)
    (warning,) = (line for line in lines_of(process) if " class" not in line.split(":")[1])
    assert words in warning
    (result,) = results(tiny_bucket)
    assert thresholds(result) == thresholds(results(counted_template / "bucket")[0])
    assert not [path for path in tmp_path.glob("work/tmp/**/*") if path.is_file()]


def test_a_screen_that_goes_away_costs_no_result(counted, no_tensorflow):
    """As with `|& head -1`."""
    process = start(*arguments("bucket"), cwd=counted, environment={"PYTHONPATH": no_tensorflow})
    assert re.search("11 images", process.stdout.readline())
    process.stdout.close()
    process.stderr.close()
    assert process.wait(300) == 0
    assert len(results(counted / "bucket")) == 2
