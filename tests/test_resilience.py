"""Whole runs that are killed, meet a bad network or a bad disk, or run beside each other."""

import base64
import contextlib
import ctypes
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from chaos_proxy import ChaosProxy
from helpers import (
    MODEL,
    SCRIPT,
    SPLIT,
    arguments,
    assert_one_error_line,
    blobs_and_masks,
    results,
    run_tool,
    thresholds,
    upload,
    write_split,
)
from fake_gcs import fake_gcs_server, get_object, list_objects, put_object
from PIL import Image
from test_gcp_utils import answering

import train_segmentation_model_prediction_thresholds as script
from counts import Counts
from gcp_utils import open_bucket

IMAGES = 120


def start(*given, cwd, script=SCRIPT, **options):
    environment = {**os.environ, **{name: str(value) for name, value in options.pop("environment", {}).items()}}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([sys.executable, script, *given], cwd=cwd, env=environment, **options)


def finish(process):
    """Wait for a process; returns subprocess.CompletedProcess."""
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_until(condition, process):
    """Wait; returns at once when the process ends."""
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.003)


def shortened(path, **constants):
    """Change constants at the top of a copied module."""
    text = path.read_text()
    for name, value in constants.items():
        text, changed = re.subn(rf"(?m)^{name} = \S+", f"{name} = {value}", text)
        assert changed == 1
    path.write_text(text)


class GoogleBucket:
    """The tiny bucket in a real server, behind a proxy."""

    def __init__(self, server, proxy, template, name="bkt"):
        self.server, self.proxy, self.name, self.address = server, proxy, name, f"gs://{name}"
        self.environment = {"STORAGE_EMULATOR_HOST": proxy.url}
        upload(server, template, name)
        self.given = set(list_objects(server, name))

    def contents(self):
        new = set(list_objects(self.server, self.name)) - self.given
        return {name: get_object(self.server, self.name, name) for name in new}

    def replace(self, name, data):
        put_object(self.server, self.name, name, data)

    def fetched(self):
        paths = (re.search(r"/o/([^?]*)\?.*alt=media", request.path) for request in list(self.proxy.requests))
        return [unquote(path[1]) for path in paths if path]

    def created(self):
        return self.proxy.count("create")


class DirectoryBucket:
    environment = {}

    def __init__(self, directory):
        self.directory, self.address = directory, str(directory)
        self.given = set(self._names())

    def _names(self):
        return [path.relative_to(self.directory).as_posix() for path in self.directory.rglob("*") if path.is_file()]

    def contents(self):
        return {name: (self.directory / name).read_bytes() for name in set(self._names()) - self.given}

    def replace(self, name, data):
        (self.directory / name).write_bytes(data)

    def created(self):
        return len(set(self._names()) - self.given)


def whole_results(bucket):
    """Check that all that is new in a bucket is whole; returns the content of the YAML files, oldest first."""
    contents = bucket.contents()
    for name, data in contents.items():
        assert re.fullmatch(rf"{MODEL}/model_thresholds_\d{{8}}T\d{{6}}Z(\.yaml|\.png|_slices\.png)", name)
        if name.endswith(".png"):
            image = Image.open(io.BytesIO(data))
            image.verify()
    found = []
    for name in sorted(contents):
        if name.endswith(".yaml"):
            assert {name.replace(".yaml", ".png"), name.replace(".yaml", "_slices.png")} < set(contents)
            found.append(yaml.safe_load(contents[name]))
            assert list(found[-1]) == ["final_trained_prediction_thresholds", "metadata", "metadata_system"]
            assert set(found[-1]["metadata_system"]) == {"System_info", "Lib_versions_info"}
    return found


@pytest.fixture(scope="session")
def many_images(tmp_path_factory, tiny_bucket_template):
    """The tiny bucket with more, smaller images, and the thresholds of an undisturbed run."""
    folder = tmp_path_factory.mktemp("many")
    shutil.copytree(tiny_bucket_template, folder / "bucket")
    shutil.rmtree(folder / "bucket" / SPLIT)
    write_split(folder / "bucket" / SPLIT, *blobs_and_masks(IMAGES, 32, 64, 2))
    (folder / "bucket/datasets/dataset-tiny/config.yaml").write_text("dataset_config: {target_size: [64, 32]}")
    template = Path(shutil.copytree(folder / "bucket", folder / "template"))
    process = run_tool(*arguments("bucket", batch_size=1), cwd=folder)
    assert process.returncode == 0, process.stderr
    return template, thresholds(results(folder / "bucket")[0])


@pytest.fixture(scope="module")
def server():
    with fake_gcs_server() as url:
        yield url


@pytest.fixture
def proxy(server):
    with ChaosProxy(server) as proxy:
        yield proxy


@pytest.fixture(params=["gs", "directory"])
def make_bucket(request, tmp_path):
    """Fill a bucket with a template."""

    def make(template):
        if request.param == "directory":
            return DirectoryBucket(Path(shutil.copytree(template, tmp_path / "bucket")))
        name = re.sub("[^a-z]", "", request.node.name)
        return GoogleBucket(request.getfixturevalue("server"), request.getfixturevalue("proxy"), template, name)

    return make


# ---------------------------------------------------------------------------------------------------------------
# Killed and interrupted


def test_runs_killed_at_any_moment_lose_nothing(make_bucket, many_images, copied_script, tmp_path, request):
    template, expected = many_images
    bucket = make_bucket(template)
    moments = random.Random(request.node.name)
    work = tmp_path / "work"
    work.mkdir()
    shortened(copied_script, CHECKPOINT_SECONDS=0.05)
    command = arguments(bucket.address, batch_size=1)
    cached = open_bucket_of(bucket, work)

    def begin():
        return start(*command, cwd=work, script=copied_script, environment=bucket.environment)

    def checkpoint():
        (counts,) = [Counts.load(path) for path in (work / "tmp/counts").glob("*.partial.npz")] or [None]
        return counts.images if counts else 0

    def check(process, here, counted):
        """Nothing in the bucket is half done, and nothing is done twice."""
        process = finish(process)
        assert "Traceback" not in process.stderr
        if here is not None:
            assert not here & set(bucket.fetched())
            del bucket.proxy.requests[:]
        if "Counting" in process.stdout and counted:
            assert f"Going on after {counted} of {IMAGES}" in process.stdout
        for result in whole_results(bucket):
            assert thresholds(result) == expected
        return process

    resumed = []
    for attempt in range(7):
        here, counted = cached(), checkpoint()
        resumed.append(counted)
        process = begin()
        if attempt > 3:
            wait_until(lambda counted=counted: checkpoint() > counted, process)
            time.sleep(moments.uniform(0, 0.1))
        else:
            time.sleep(moments.uniform(0.1, 4))
        process.kill()
        check(process, here, counted)
    assert 0 < resumed[-1] < checkpoint() <= IMAGES
    assert not whole_results(bucket)
    process = check(begin(), cached(), checkpoint())
    assert process.returncode == 0, process.stderr
    assert len(whole_results(bucket)) == 1

    # From here on the counts are there, and runs are killed around their uploads.
    if hasattr(bucket, "proxy"):
        bucket.proxy.latency = 0.05
    for attempt in range(12):
        before = bucket.created()
        process = begin()
        if attempt % 2:
            wait_until(lambda before=before, more=attempt // 2 % 3 + 1: bucket.created() >= before + more, process)
            time.sleep(moments.uniform(0, 0.06))
        else:
            time.sleep(moments.uniform(0, 1.5))
        process.kill()
        assert "Counting" not in check(process, None, 0).stdout
    done = len(whole_results(bucket))
    process = check(begin(), None, 0)
    assert process.returncode == 0, process.stderr
    assert len(whole_results(bucket)) == done + 1


def open_bucket_of(bucket, work):
    """A function that tells which objects need not be fetched any more; None for a directory."""
    if not hasattr(bucket, "proxy"):
        return lambda: None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", bucket.server)
        opened = open_bucket(bucket.address, work / "tmp/objects")
        blobs = opened.list("")
    return lambda: {blob.name for blob in blobs if opened.is_here(blob)}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruptions_at_any_moment_are_one_line(many_images, tmp_path, copied_script, number, code):
    bucket = DirectoryBucket(Path(shutil.copytree(many_images[0], tmp_path / "bucket")))
    moments = random.Random(code)
    shortened(copied_script, CHECKPOINT_SECONDS=0.05)
    told = 0
    for attempt in range(7):
        process = start(*arguments("bucket", batch_size=1), cwd=tmp_path, script=copied_script)
        if attempt:
            process.stdout.readline()  # it is up
            time.sleep(moments.uniform(0, 4 if attempt < 5 else 0.2))
        else:
            time.sleep(0.15)  # in the middle of the imports
        for _ in range(1 + 2 * (attempt % 2)):  # hasty people press Ctrl-C more than once
            process.send_signal(number)
            time.sleep(0.01)
        process = finish(process)
        assert "Traceback" not in process.stderr
        if process.returncode == code:
            told += 1
            assert_one_error_line(process, code, "interrupted; what was fetched and counted is kept in tmp")
        else:  # it was done, or had not begun
            assert process.returncode in (0, -number), process.stderr
        for result in whole_results(bucket):
            assert thresholds(result) == many_images[1]
    assert told >= 3


def test_an_interruption_amid_a_destructor_is_not_lost(tmp_path):
    program = """
import os, signal, sys, time
sys.path.insert(0, sys.argv.pop(1))
import train_segmentation_model_prediction_thresholds as script

class Doomed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

def run(*_):
    Doomed()
    time.sleep(20)

script.run = run
os._exit(script.main())
"""
    process = subprocess.run(
        [sys.executable, "-c", program, SCRIPT.parent, *arguments("bucket")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert_one_error_line(process, 143, "interrupted")


# ---------------------------------------------------------------------------------------------------------------
# The network


def test_a_bad_network_changes_no_result(tiny_bucket_template, counted_template, server, tmp_path):
    """Every kind of fault, on 30 % of the requests, and no permission but those that the README names."""
    expected = thresholds(results(counted_template[0] / "bucket")[0])
    with ChaosProxy(server, 0.3, delay=0.1, seed=3, permissions=("get", "list", "create")) as proxy:
        bucket = GoogleBucket(server, proxy, tiny_bucket_template, "bad-network")
        for number in range(1, 6):
            process = run_tool(*arguments("gs://bad-network", batch_size=4), cwd=tmp_path, **bucket.environment)
            assert process.returncode == 0, process.stderr
            assert all(line.startswith("warning: ") for line in process.stderr.splitlines())
            found = whole_results(bucket)
            assert len(found) == number
            assert len(bucket.contents()) == 3 * number
            assert thresholds(found[-1]) == expected
        assert {request.fault for request in proxy.requests} == {None, *proxy.faults}
        assert {request.operation for request in proxy.requests} == {"get", "list", "create"}


@pytest.mark.parametrize(
    ("fault", "after"), [("503", 0), ("503", 20), ("reset", 5), ("hang", 0), ("hang", 10), ("wrong", 15)]
)
def test_a_server_that_stays_down_is_told_in_time(
    tiny_bucket_template, server, proxy, copied_script, tmp_path, fault, after
):
    bucket = GoogleBucket(server, proxy, tiny_bucket_template, f"down-{fault}-{after}")
    shortened(copied_script.with_name("gcp_utils.py"), RETRY_SECONDS=2, SOCKET_SECONDS=1)
    proxy.faults = (fault,)
    process = start(*arguments(bucket.address), cwd=tmp_path, script=copied_script, environment=bucket.environment)
    wait_until(lambda: len(proxy.requests) >= after, process)
    proxy.rate = 1
    down = time.monotonic()
    process = finish(process)
    assert time.monotonic() - down < 2 + 2 * 1 + 6  # an attempt before and one after, and the start of the process
    assert_one_error_line(process, 4, f"gs://down-{fault}-{after}", "gave up after", "check the network")
    assert not bucket.contents()


def test_a_server_that_goes_away_before_the_upload_costs_no_result(
    tiny_bucket_template, no_tensorflow, server, proxy, copied_script, tmp_path
):
    bucket = GoogleBucket(server, proxy, tiny_bucket_template, "goes-away")
    shortened(copied_script.with_name("gcp_utils.py"), RETRY_SECONDS=1, SOCKET_SECONDS=1)
    proxy.draw = lambda method, path, draw=proxy.draw: "503" if method == "POST" else draw(method, path)
    process = run_tool(*arguments(bucket.address), cwd=tmp_path, script=copied_script, **bucket.environment)
    assert_one_error_line(process, 4, "gave up after", "kept in tmp/results/", "gcloud storage cp --no-clobber")
    assert not bucket.contents()
    del proxy.draw
    process = run_tool(*arguments(bucket.address), cwd=tmp_path, PYTHONPATH=no_tensorflow, **bucket.environment)
    assert process.returncode == 0, process.stderr
    assert len(whole_results(bucket)) == 1


def test_credentials_are_nowhere(tiny_bucket_template, server, proxy, tmp_path, monkeypatch, capfd):
    """The key of a service account and the token that it gets, against all that a run writes."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    bucket = GoogleBucket(server, proxy, tiny_bucket_template, "with-credentials")
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
        script.run(script.parse_arguments(arguments("gs://with-credentials")))
        proxy.token = "another-token"
        with pytest.raises(script.BucketError) as caught:
            script.run(script.parse_arguments(arguments("gs://with-credentials")))
    script.fail(4, caught.value)
    written = [path.read_bytes() for path in work.rglob("*") if path.is_file()]
    written += bucket.contents().values()
    written += [text.encode() for text in capfd.readouterr()]
    assert len(whole_results(bucket)) == 1 and len(written) > 30
    secrets = [b"a-secret-token", *key.splitlines()[1:3], base64.b64decode(b"".join(key.splitlines()[1:-1]))[40:80]]
    for secret in [*secrets, b"PRIVATE KEY", b"Bearer"]:
        assert not any(secret in content for content in written)


# ---------------------------------------------------------------------------------------------------------------
# Beside each other, and changes in the bucket


def test_runs_from_nothing_at_once_share_a_folder(make_bucket, many_images, copied_script, tmp_path):
    template, expected = many_images
    bucket = make_bucket(template)
    shortened(copied_script, CHECKPOINT_SECONDS=0.05)
    work = tmp_path / "work"
    work.mkdir()
    command = arguments(bucket.address, batch_size=1)
    metrics = ["iou_score", "iou_score", "f1_score"]
    running = [
        start(*command, "--optimizing-class-metric", metric, cwd=work, script=copied_script,
              environment=bucket.environment)
        for metric in metrics
    ]  # fmt: skip
    for process in running:
        process = finish(process)
        assert process.returncode == 0, process.stderr
        assert all(line.startswith("warning: ") for line in process.stderr.splitlines())
    found = whole_results(bucket)
    configurations = [result["metadata"]["thresholds_training_configuration"] for result in found]
    assert sorted(configuration["opt_class_metric"] for configuration in configurations) == sorted(metrics)
    assert all(thresholds(result) == expected for result in found)  # IoU and F1 have the same optimum
    assert len({result["metadata"]["run_id"] for result in found}) == 3
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
    expected = thresholds(results(counted_template[0] / "bucket")[0])
    bucket = DirectoryBucket(tiny_bucket)
    (tmp_path / "work").mkdir(0o555)
    process = run_as_others_do(*arguments("../bucket", batch_size=4), cwd=tmp_path / "work")
    assert_warnings(process, "tmp/counts (Permission denied)", "tmp/results (Permission denied)")
    (result,) = whole_results(bucket)
    assert thresholds(result) == expected
    assert not list((tmp_path / "work").iterdir())


def test_a_read_only_cache_is_named(tiny_bucket_template, server, proxy, tmp_path):
    bucket = GoogleBucket(server, proxy, tiny_bucket_template, "read-only-cache")
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
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
    (result,) = whole_results_beside(tiny_bucket)
    assert thresholds(result) == thresholds(results(counted_template[0] / "bucket")[0])


def whole_results_beside(directory):
    bucket = DirectoryBucket(directory)
    bucket.given = {name for name in bucket.given if "model_thresholds_" not in name}
    return whole_results(bucket)


def test_a_disk_that_is_full_when_the_result_is_staged_costs_no_result(counted, no_tensorflow):
    with full_disk(counted / "tmp/results", 100) as reason:
        process = run_tool(*arguments("bucket"), cwd=counted, PYTHONPATH=no_tensorflow)
        assert_warnings(process, f"no copy of the result can be kept in tmp/results ({reason})")
        assert not list(counted.glob("tmp/results/*"))
    assert len(whole_results_beside(counted / "bucket")) == 2


def test_a_disk_that_is_full_when_files_are_fetched_is_named(tiny_bucket_template, server, proxy, tmp_path):
    bucket = GoogleBucket(server, proxy, tiny_bucket_template, "full-disk")
    with full_disk(tmp_path / "tmp/objects", 500) as reason:
        process = run_tool(*arguments(bucket.address), cwd=tmp_path, **bucket.environment)
    assert_one_error_line(process, 4, "tmp/objects", "make room", reason)
    assert not bucket.contents()
    process = run_tool(*arguments(bucket.address), cwd=tmp_path / "tmp", **bucket.environment)
    assert process.returncode == 0, process.stderr
    assert len(whole_results(bucket)) == 1


@pytest.mark.parametrize("streams", [("stdout",), ("stdout", "stderr")])
def test_a_screen_that_goes_away_costs_no_result(counted, no_tensorflow, streams):
    """As with `| head -1`, and with `|& head -1`."""
    process = start(*arguments("bucket"), cwd=counted, environment={"PYTHONPATH": no_tensorflow})
    assert "11 images" in process.stdout.readline()
    for name in streams:
        getattr(process, name).close()
    assert process.wait(60) == 0
    assert "stderr" in streams or all(line.startswith("warning: ") for line in process.stderr)
    assert len(whole_results_beside(counted / "bucket")) == 2


def test_an_error_that_nobody_can_read_keeps_its_exit_code(tmp_path):
    process = start(*arguments("nowhere"), cwd=tmp_path)
    process.stderr.close()
    assert process.wait(60) == 4


def test_the_exit_codes_are_documented(tmp_path):
    text = " ".join(run_tool("--help", cwd=tmp_path, COLUMNS=100).stdout.split())
    codes = "0 done, 2 usage, 3 input, 4 bucket, 5 not converged, 6 another worker is missing, 130 and 143 interrupted"
    assert codes in text
