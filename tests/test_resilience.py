"""Whole runs that are killed, meet a bad network or a bad disk, or run beside each other."""

import base64
import contextlib
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chaos_proxy import ChaosProxy
from fake_gcs import answering
from helpers import (
    MODEL,
    SCRIPT,
    SPLIT,
    DirectoryBucket,
    GoogleBucket,
    arguments,
    assert_one_error_line,
    blobs_and_masks,
    finish,
    results,
    run_here,
    run_tool,
    shortened,
    start,
    thresholds,
    wait_until,
    whole_results,
    write_split,
)

import network
from counts import Counts
from errors import BUCKET, DONE, INPUT, USAGE
from gcp_utils import open_bucket

IMAGES = 120  # of the fixture many_images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gigabytes", "code", "words"),
    [
        (2, USAGE, "TensorFlow crashes with less"),
        (2.7, INPUT, "no batch of 64 images of 512 x 512 pixels fits into memory"),
        (3.6, DONE, "a batch of 64 images does not fit into memory: continuing with"),
        (5, DONE, "a batch of 64 images does not fit into memory: continuing with"),
    ],
)
def test_a_limit_of_the_address_space_crashes_no_run(sandbox, tmp_path, gigabytes, code, words):
    """As `ulimit -v` sets it. TensorFlow itself dies by a signal when it comes to the limit."""
    bucket = tmp_path / "bucket"
    shutil.copytree(sandbox / "models", bucket / "models", ignore=shutil.ignore_patterns("model_thresholds_*"))
    write_split(bucket / "datasets/dataset-large/validation", *blobs_and_masks(66, 512, 512, 3))
    (bucket / "datasets/dataset-large/config.yaml").write_text("dataset_config: {target_size: [512, 512]}")
    (model,) = (bucket / "models").iterdir()
    process = start(
        *arguments(bucket, "dataset-large/validation", model.name, batch_size=64),
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 1e9),) * 2),
    )
    process = finish(process)
    assert process.returncode == code, process.stderr
    assert words in process.stderr
    if code != DONE:
        assert_one_error_line(process, code, words)
    assert len(results(bucket, model.name)) == (code == DONE)


# ---------------------------------------------------------------------------------------------------------------
# Killed and interrupted


@pytest.mark.parametrize(
    ("passes", "uploads"), [(3, 4), pytest.param(12, 12, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_runs_killed_at_any_moment_lose_nothing(proxy, many_images, copied_script, tmp_path, passes, uploads):
    """A third of the kills comes at any moment, the others during the pass, or around the uploads."""
    template, expected = many_images
    bucket = GoogleBucket(proxy, template, f"killed-{passes}")
    moments = random.Random(passes)
    work = tmp_path / "work"
    work.mkdir()
    shortened(copied_script, CHECKPOINT_SECONDS=0.01)
    command = arguments(bucket.address, batch_size=1)
    cached = what_is_cached(bucket, work)

    def begin():
        return start(*command, cwd=work, script=copied_script, environment=bucket.environment)

    def checkpoint():
        (counts,) = [Counts.load(path) for path in (work / "tmp/counts").glob("*.partial.npz")] or [None]
        return counts.images if counts else 0

    def check(process, here, counted):
        """Nothing in the bucket is half done, and nothing is done twice."""
        process = finish(process)
        bucket.proxy.settle()
        assert "Traceback" not in process.stderr
        if here is not None:
            assert not here & set(bucket.fetched())
            del bucket.proxy.requests[:]
        if "Counting" in process.stdout and counted:
            assert f"Continuing after {counted} of {IMAGES}" in process.stdout
        for result in whole_results(bucket):
            assert thresholds(result) == expected
        return process

    for attempt in range(passes):
        here, counted = cached(), checkpoint()
        process = begin()
        if attempt % 3 == 0:
            time.sleep(moments.uniform(0.1, 4))
        else:
            wait_until(lambda counted=counted: checkpoint() > counted, process)
        process.kill()
        check(process, here, counted)
        if attempt % 3:
            assert counted < checkpoint() <= IMAGES
    assert not whole_results(bucket)
    process = check(begin(), cached(), checkpoint())
    assert process.returncode == 0, process.stderr
    assert len(whole_results(bucket)) == 1

    # From here on the counts are there, and runs are killed around their uploads.
    bucket.proxy.latency = 0.05
    for attempt in range(uploads):
        process = begin()
        before = bucket.proxy.count("create")
        if attempt % 3:
            more = attempt % 4 + 1
            wait_until(lambda before=before, more=more: bucket.proxy.count("create") >= before + more, process)
            time.sleep(moments.uniform(0, 0.06))
        else:
            time.sleep(moments.uniform(0, 1.5))
        process.kill()
        assert "Counting" not in check(process, None, 0).stdout
    done = len(whole_results(bucket))
    process = check(begin(), None, 0)
    assert process.returncode == 0, process.stderr
    assert len(whole_results(bucket)) == done + 1


def what_is_cached(bucket, work):
    """A function that tells which objects need not be fetched any more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", bucket.server)
        opened = open_bucket(bucket.address, work / "tmp/objects")
        blobs = opened.list("")
    return lambda: {blob.name for blob in blobs if opened.is_here(blob)}


@pytest.mark.parametrize(
    ("number", "attempts"),
    [
        (signal.SIGTERM, 2),
        pytest.param(signal.SIGINT, 8, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 8, marks=pytest.mark.slow),
    ],
)
def test_interruptions_at_any_moment_are_one_line(many_images, tmp_path, copied_script, number, attempts):
    bucket = DirectoryBucket(Path(shutil.copytree(many_images[0], tmp_path / "bucket")))
    moments = random.Random(number)
    shortened(copied_script, CHECKPOINT_SECONDS=0.05)
    told = 0
    for attempt in range(attempts):
        process = start(*arguments("bucket", batch_size=1), cwd=tmp_path, script=copied_script)
        process.stdout.readline()  # it is up
        time.sleep(moments.uniform(0, 4) * (attempt > 0))
        for _ in range(1 + 2 * (attempt % 2)):  # hasty people press Ctrl-C more than once
            process.send_signal(number)
            time.sleep(0.01)
        process = finish(process)
        if process.returncode != 0:  # it was not done
            told += 1
            assert_one_error_line(process, 128 + number, "interrupted; what was fetched and counted is kept in tmp")
        for result in whole_results(bucket):
            assert thresholds(result) == many_images[1]
    assert told


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
            assert process.returncode == 0, process.stderr
            assert all(line.startswith("warning: ") for line in process.stderr.splitlines())
            found = whole_results(bucket)
            assert len(found) == number
            assert thresholds(found[-1]) == expected
        met = {request.fault for request in proxy.requests}
        assert met == {None, *proxy.faults} if runs > 1 else len(met) > 4
        assert {request.operation for request in proxy.requests} == {"get", "list", "create"}


@pytest.mark.parametrize(
    ("fault", "after"),
    [
        ("reset", 5),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("503", 20), ("hang", 0), ("hang", 10), ("wrong", 15))
        ),
    ],
)
def test_a_server_that_stays_down_ends_the_run(tiny_bucket_template, proxy, copied_script, tmp_path, fault, after):
    bucket = GoogleBucket(proxy, tiny_bucket_template, f"down-{fault}-{after}")
    shortened(copied_script.with_name("gcp_utils.py"), RETRY_SECONDS=2, SOCKET_SECONDS=1)
    proxy.faults = (fault,)
    process = start(*arguments(bucket.address), cwd=tmp_path, script=copied_script, environment=bucket.environment)
    wait_until(lambda: len(proxy.requests) >= after, process)
    proxy.rate = 1
    assert_one_error_line(finish(process), 4, bucket.address, "gave up after", "check the network")
    assert not bucket.contents()


def test_credentials_are_nowhere(tiny_bucket_template, proxy, tmp_path, monkeypatch, capfd):
    """The key of a service account and the token that it gets, against all that a run writes."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    bucket = GoogleBucket(proxy, tiny_bucket_template, "with-credentials")
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))

    monkeypatch.setenv("API_ENDPOINT_OVERRIDE", proxy.url)
    proxy.token = "a-secret-token"
    with answering(200, {"access_token": proxy.token, "expires_in": 3600, "token_type": "Bearer"}) as url:
        account = {"type": "service_account", "client_email": "someone@example.com", "private_key": key.decode()}
        (tmp_path / "key.json").write_text(json.dumps({**account, "token_uri": url, "project_id": "p"}))
        run_here(monkeypatch, *arguments(bucket.address))
        proxy.token = "another-token"
        run_here(monkeypatch, *arguments(bucket.address), code=BUCKET)
    written = [path.read_bytes() for path in work.rglob("*") if path.is_file()]
    written += bucket.contents().values()
    written += [text.encode() for text in capfd.readouterr()]
    assert len(whole_results(bucket)) == 1 and len(written) > 30
    secrets = [b"a-secret-token", *key.splitlines()[1:3], base64.b64decode(b"".join(key.splitlines()[1:-1]))[40:80]]
    for secret in [*secrets, b"PRIVATE KEY", b"Bearer"]:
        assert not any(secret in content for content in written)


# ---------------------------------------------------------------------------------------------------------------
# Beside each other, and changes in the bucket


def test_runs_from_nothing_at_once_share_a_folder(proxy, many_images, copied_script, tmp_path):
    template, expected = many_images
    bucket = GoogleBucket(proxy, template, "share-a-folder")
    shortened(copied_script, CHECKPOINT_SECONDS=0.05)
    work = tmp_path / "work"
    work.mkdir()
    command = arguments(bucket.address, batch_size=1)
    metrics = ["iou_score", "f1_score"]
    running = [
        start(
            *(*command, "--optimizing-class-metric", metric),
            cwd=work,
            script=copied_script,
            environment=bucket.environment,
        )
        for metric in metrics
    ]
    for process in running:
        process = finish(process)
        assert process.returncode == 0, process.stderr
        assert all(line.startswith("warning: ") for line in process.stderr.splitlines())
    found = whole_results(bucket)
    configurations = [result["metadata"]["thresholds_training_configuration"] for result in found]
    assert sorted(configuration["opt_class_metric"] for configuration in configurations) == sorted(metrics)
    assert all(thresholds(result) == expected for result in found)  # IoU and F1 have the same optimum
    assert len({result["metadata"]["run_id"] for result in found}) == len(metrics)
    assert not list((work / "tmp/results").iterdir())
    assert len(list((work / "tmp/counts").glob("*[0-9a-f].npz"))) == 1


@pytest.mark.parametrize("what", ["an image", "the weights"])
def test_a_change_in_the_bucket_during_the_run_is_an_error(make_bucket, tiny_bucket_template, tmp_path, what):
    bucket = make_bucket(tiny_bucket_template)
    name = {"an image": f"{SPLIT}/images/slice_0010.png", "the weights": f"{MODEL}/model.hdf5"}[what]
    data = (tiny_bucket_template / name).read_bytes()
    if hasattr(bucket, "proxy"):  # right after the listing
        changed = []

        def draw(method, path, draw=bucket.proxy.draw):
            if "alt=media" in path and ("model.hdf5" in path or "images" in path) and not changed:
                changed.append(path)
                bucket.replace(name, data)
            return draw(method, path)

        bucket.proxy.draw = draw
    work = tmp_path / "work"
    work.mkdir()
    process = start(*arguments(bucket.address), cwd=work, environment=bucket.environment)
    if not hasattr(bucket, "proxy"):
        process.stdout.readline()
        bucket.replace(name, data[:-1] + b"\0")
    assert_one_error_line(finish(process), 4, name, "changed in the bucket during the run; run again")
    assert not bucket.contents()
    assert not list(work.glob("tmp/counts/*"))


def test_weights_that_change_while_they_are_read_are_an_error(tiny_bucket, tmp_path, monkeypatch, capsys):
    def build(*given, build=network.build_network):
        built = build(*given)
        weights = tiny_bucket / MODEL / "model.hdf5"
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
        return built

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(network, "build_network", build)
    run_here(monkeypatch, *arguments("bucket"), code=BUCKET)
    assert "model.hdf5: changed in the bucket" in capsys.readouterr().err
    assert not list(tmp_path.glob("tmp/counts/*"))


# ---------------------------------------------------------------------------------------------------------------
# The disk and the screen


def obey_permissions():
    """Give up, as root, what lets root pass over them; a process that runs this before its program keeps it so."""
    if os.geteuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0  # PR_CAPBSET_DROP


def run_as_others_do(*given, cwd, **environment):
    return finish(start(*given, cwd=cwd, environment=environment, preexec_fn=obey_permissions))


def assert_warnings(process, *words):
    """The process ended well, with a warning for each of the words."""
    assert process.returncode == 0, process.stderr
    warnings = [line for line in process.stderr.splitlines() if " class" not in line.split(":")[1]]
    assert len(warnings) == len(words), process.stderr
    for line, word in zip(warnings, words, strict=True):
        assert line.startswith("warning: ") and word in line


def test_a_read_only_folder_is_no_reason_to_lose_a_result(tiny_bucket, counted_template, tmp_path):
    """Nothing can be kept in ./tmp; a directory bucket needs nothing there."""
    expected = thresholds(results(counted_template / "bucket")[0])
    bucket = DirectoryBucket(tiny_bucket)
    (tmp_path / "work").mkdir(0o555)
    process = run_as_others_do(*arguments("../bucket", batch_size=4), cwd=tmp_path / "work")
    assert_warnings(process, "tmp/counts (Permission denied)", "tmp/results (Permission denied)")
    (result,) = whole_results(bucket)
    assert thresholds(result) == expected
    assert not list((tmp_path / "work").iterdir())


def test_a_read_only_cache_is_named(tiny_bucket_template, proxy, tmp_path):
    bucket = GoogleBucket(proxy, tiny_bucket_template, "read-only-cache")
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp/objects").mkdir(0o555)
    process = run_as_others_do(*arguments(bucket.address), cwd=tmp_path, **bucket.environment)
    assert_one_error_line(process, 4, "tmp/objects", "Permission denied", "make the folder writable")
    assert not bucket.contents()


def test_a_read_only_bucket_leaves_the_result_here(counted):
    kept_before = len(results(counted / "bucket"))
    (counted / "bucket" / MODEL).chmod(0o555)
    process = run_as_others_do(*arguments("bucket"), cwd=counted)
    assert_one_error_line(process, 4, f"bucket/{MODEL}/model_thresholds_", "Permission denied", "kept in tmp/results/")
    assert len(results(counted / "bucket")) == kept_before
    (counted / "bucket" / MODEL).chmod(0o777)
    subprocess.run(process.stderr.partition("upload it with: ")[2], shell=True, cwd=counted, check=True)
    assert len(results(counted / "bucket")) == kept_before + 1


@contextlib.contextmanager
def full_disk(folder, kilobytes):
    """A small disk at a folder; where that may not be had, something in the folder's place that cannot be one."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    if not mounted:
        folder.rmdir()
        folder.write_text("in the way")
    try:
        yield "No space left on device" if mounted else "Not a directory"
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full_when_counts_are_kept_costs_no_result(tiny_bucket, counted_template, tmp_path):
    with full_disk(tmp_path / "tmp/counts", 100) as reason:
        process = run_tool(*arguments("bucket", batch_size=4), cwd=tmp_path)
        assert_warnings(process, f"the counts of 11 images cannot be kept in tmp/counts ({reason})")
        assert not list(tmp_path.glob("tmp/counts/*"))
    (result,) = whole_results(DirectoryBucket(tiny_bucket))
    assert thresholds(result) == thresholds(results(counted_template / "bucket")[0])


def test_a_disk_that_is_full_when_the_result_is_staged_costs_no_result(counted, no_tensorflow):
    with full_disk(counted / "tmp/results", 100) as reason:
        process = run_tool(*arguments("bucket"), cwd=counted, PYTHONPATH=no_tensorflow)
        assert_warnings(process, f"no copy of the result can be kept in tmp/results ({reason})")
        assert not list(counted.glob("tmp/results/*"))
    assert len(whole_results(DirectoryBucket(counted / "bucket"))) == 2


def test_a_disk_that_is_full_when_files_are_fetched_is_named(tiny_bucket_template, proxy, tmp_path):
    bucket = GoogleBucket(proxy, tiny_bucket_template, "full-disk")
    with full_disk(tmp_path / "tmp/objects", 500):
        process = run_tool(*arguments(bucket.address), cwd=tmp_path, **bucket.environment)
    assert_one_error_line(process, 4, "tmp/objects", "make room")
    assert not bucket.contents()
    process = run_tool(*arguments(bucket.address), cwd=tmp_path / "tmp", **bucket.environment)
    assert process.returncode == 0, process.stderr
    assert len(whole_results(bucket)) == 1


def test_screens_that_go_away_cost_no_result(counted, no_tensorflow):
    """As with `|& head -1`."""
    process = start(*arguments("bucket"), cwd=counted, environment={"PYTHONPATH": no_tensorflow})
    assert "11 images" in process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(300) == 0
    assert len(whole_results(DirectoryBucket(counted / "bucket"))) == 2


def test_a_closed_stdout_costs_no_result(counted, no_tensorflow):
    command = f'exec "{sys.executable}" "{SCRIPT}" {" ".join(arguments("bucket"))} >&-'
    process = subprocess.run(
        command,
        shell=True,
        cwd=counted,
        env={**os.environ, "PYTHONPATH": no_tensorflow},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert len(whole_results(DirectoryBucket(counted / "bucket"))) == 2


def test_an_error_that_nobody_can_read_keeps_its_exit_code(tmp_path):
    process = start(*arguments("nowhere"), cwd=tmp_path)
    process.stderr.close()
    assert process.wait(300) == 4
