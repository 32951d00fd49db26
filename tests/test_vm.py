"""The GPU VM's set-up, and a job that is continued after a stop, in a real Ubuntu or Debian that debootstrap makes.

Over SSH, and with power cuts. Only the GPU is faked: the driver's answer, NVIDIA's libraries (empty wheels with the
names and versions of requirements-gpu.txt) and check_gpu.py.
"""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_gcs import fake_gcs_server, list_objects
from helpers import MODEL, arguments, upload
from test_terraform import (
    NOT_CODE,
    PLATFORMS,
    ROOT,
    command,
    commit_everything,
    done,
    needs,
    pins,
    terraform,
    terraform_init,
)

pytestmark = pytest.mark.slow

CODE = "necstlab-damage-segmentation"  # on the VM
FETCHED = f"home/jane/{CODE}/tmp/objects"
ENVIRONMENT = "home/jane/.local/share/necstlab-environment"
# The VM's system if this host can check its signature, otherwise a similar one; each with its Python.
KEYRINGS = Path("/usr/share/keyrings")
SYSTEMS = [
    ("noble", "3.12", "http://archive.ubuntu.com/ubuntu", KEYRINGS / "ubuntu-archive-keyring.gpg", "main,universe"),
    ("trixie", "3.13", "http://deb.debian.org/debian", KEYRINGS / "debian-archive-keyring.gpg", "main"),
]


class Machine:
    """A running system with an SSH server on a loopback address."""

    def __init__(self, root, address, key):
        self.root, self.address, self.key = root, address, key

    def ssh_words(self, *options):
        quiet = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes"]
        return ["ssh", "-F", "none", "-i", self.key, *options, *(f"-o{o}" for o in quiet), f"jane@{self.address}"]

    def ssh(self, typed, **options):
        return command(*self.ssh_words(), typed, **options)

    def login(self, typed):
        """The output of a command that is typed into the shell that `ssh <vm>` opens, with a terminal."""
        return done(*self.ssh_words("-tt"), input=f"{typed}\nexit\n", timeout=120)


def make_system(root, suite, mirror, keyring, components):
    """Make a plain system with Python, sudo and an SSH server, as the VM's image has them."""
    settings = root / "etc" / "dpkg" / "dpkg.cfg.d"
    settings.mkdir(parents=True)
    (settings / "unsafe-io").write_text("force-unsafe-io\n")  # faster, and its disk is memory
    done(
        *("debootstrap", "--variant=minbase", f"--components={components}", f"--keyring={keyring}"),
        *("--include=openssh-server,sudo,python3", suite, root, mirror),
    )


def stub_cuda_wheels(folder):
    """Make empty wheels for the packages of requirements-gpu.txt."""
    for name, version in pins("requirements-gpu.txt").items():
        if name == "tensorflow":
            continue
        stem = f"{name.replace('-', '_')}-{version}"
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{stem}.dist-info/RECORD", "")


def fetch_wheels(folder, python_version):
    """Download the wheels of requirements.txt, for the system's Python, with this host's pip and its cache."""
    done(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", *PLATFORMS),
        *("--python-version", python_version, "-r", ROOT / "requirements.txt", "-d", folder),
    )
    stub_cuda_wheels(folder)


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture(scope="module")
def machine():
    needs("debootstrap", "unshare", "setpriv", "chroot", "ssh", "ssh-keygen")
    if os.geteuid() != 0:
        pytest.skip("only root can make such a system")
    if (refused := command("unshare", "--mount", "--pid", "--fork", "true")).returncode != 0:
        pytest.skip(f"no namespaces for such a system: {refused.stderr.strip()}")
    possible = [system for system in SYSTEMS if system[3].exists()]
    if not possible:
        pytest.skip("no keyring of Ubuntu or Debian to check a system's signature")
    suite, python, mirror, keyring, components = possible[0]
    try:
        urllib.request.urlopen(f"{mirror}/dists/{suite}/Release", timeout=20).close()
    except OSError as error:
        pytest.skip(f"{mirror} is out of reach: {error}")
    scratch = Path(tempfile.mkdtemp(prefix="vm-", dir="/var/tmp"))
    command("mount", "-t", "tmpfs", "vm", scratch)  # some 4 GB in memory, which is faster; if refused, on the disk
    server = None
    try:
        root, key = scratch / "root", scratch / "key"
        with ThreadPoolExecutor() as pool:
            fetched = pool.submit(fetch_wheels, scratch / "wheels", python)
            make_system(root, suite, mirror, keyring, components)
            fetched.result()
        (scratch / "wheels").rename(root / "opt/wheels")
        # no-compile: Python compiles only what it imports, which is far less than pip compiles.
        pip = "[global]\nno-index = true\nfind-links = /opt/wheels\n[install]\nno-compile = true\n"
        (root / "etc/pip.conf").write_text(pip)

        # The driver fails at its first call, as on a VM where it is still starting. cloud-init reports faults.
        program(
            root / "usr/local/bin/nvidia-smi",
            "#!/bin/sh\n[ -e /tmp/driver ] || { touch /tmp/driver; exit 9; }\necho 'GPU 0: none (UUID: none)'\n",
        )
        program(root / "usr/local/bin/cloud-init", "#!/bin/sh\nexit 2\n")
        for name in ("systemctl", "loginctl"):  # test_vm_cluster.py has a real systemd
            program(root / "usr/local/bin" / name, "#!/bin/sh\n")

        (root / "etc/hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n")
        done("chroot", root, "useradd", "--create-home", "--shell", "/bin/bash", "jane")
        (root / "etc/sudoers.d/jane").write_text("jane ALL=(ALL) NOPASSWD: ALL\n")
        done("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
        (root / "home/jane/.ssh").mkdir()
        shutil.copy(f"{key}.pub", root / "home/jane/.ssh/authorized_keys")
        done("chroot", root, "chown", "-R", "jane:", "/home/jane/.ssh")

        # In namespaces, so that its mounts and processes end with the server.
        address = ".".join(["127", *(str(random.randint(2, 250)) for _ in range(3))])
        inside = (
            "mount -t proc proc $0/proc && mount -t devpts -o newinstance,ptmxmode=0666 devpts $0/dev/pts"
            " && mkdir -p $0/run/sshd && exec chroot $0 /usr/sbin/sshd -D -e -o ListenAddress=$1 -o Port=22"
        )
        with open(scratch / "sshd.log", "w") as log:
            server = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig=KILL"),  # it ends even if pytest is killed
                    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", inside, root, address),
                ],
                stderr=log,
            )
        end = time.monotonic() + 30
        while True:
            try:
                socket.create_connection((address, 22), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < end and server.poll() is None, (scratch / "sshd.log").read_text()
                time.sleep(0.2)
        yield Machine(root, address, key)
    finally:
        if server is not None:
            server.kill()
            server.wait()
        command("umount", "--lazy", scratch)
        shutil.rmtree(scratch)


def checkout_with_check_gpu(folder, source):
    """Make a checkout of this code with another check_gpu.py; returns its commit."""
    shutil.copytree(ROOT, folder, ignore=NOT_CODE)
    commit = commit_everything(folder)
    (folder / "terraform" / "check_gpu.py").write_text(source)
    return commit


SET_UP = f"bash {CODE}/terraform/set_up_vm.sh"


def cut_power_when(machine, appears, typed):
    """Run a command on the machine until a file appears. Then kill all processes, and empty /tmp as a boot does."""
    with subprocess.Popen([*machine.ssh_words(), typed], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
        while not any(machine.root.glob(appears)):
            assert running.poll() is None, f"it ended before {appears} was there: {running.stdout.read().decode()}"
            time.sleep(0.01)
        machine.ssh("sudo sh -c 'kill -KILL -1'")  # the shell's kill: no other is installed
        assert running.wait(timeout=60) == 255, f"it ended before its connection: {running.stdout.read().decode()}"
    for path in (machine.root / "tmp").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def ready_machine(machine, tmp_path_factory):
    """The machine after two set-ups with power cuts and one without, and the last one's result."""
    folder = tmp_path_factory.mktemp("sent")
    checkout_with_check_gpu(folder / "code", "import tensorflow; print('faked GPU')\n")
    done("bash", folder / "code" / "terraform" / "pack_code.sh", folder / "code.tar.gz")
    with open(folder / "code.tar.gz", "rb") as tarball:
        done(*machine.ssh_words(), f"mkdir {CODE} && tar -xz -C {CODE}", stdin=tarball)
    cut_power_when(machine, "var/lib/dpkg/info/nano.list", SET_UP)
    packages = f"{ENVIRONMENT}/lib/python3*/site-packages"
    cut_power_when(machine, f"{packages}/six-*.dist-info/RECORD", SET_UP)
    (six,) = machine.root.glob(f"{packages}/six.py")
    six.write_text("")  # as a file that had not reached the disk
    status = machine.root / "var/lib/dpkg/status"  # as dpkg leaves it when it is killed while it installs a package
    half = re.sub(r"(Package: nano\nStatus: ).*", r"\1install reinstreq half-installed", status.read_text())
    assert half != status.read_text()
    status.write_text(half)
    return machine, machine.ssh(SET_UP, timeout=500)


HELP = f"cd {CODE} && python3 train_segmentation_model_prediction_thresholds.py --help"


def test_set_up_ends_with_success(ready_machine):
    _, said = ready_machine
    assert said.returncode == 0, said.stdout + said.stderr
    assert said.stdout.splitlines()[-2:] == ["faked GPU", "== The VM is ready"]


def test_command_works_as_the_document_types_it(ready_machine):
    machine, _ = ready_machine
    over_ssh = machine.ssh(HELP)
    assert over_ssh.returncode == 0, over_ssh.stderr
    assert "--optimizing-class-metric" in over_ssh.stdout
    assert "--optimizing-class-metric" in machine.login(HELP)


def test_command_works_in_tmux(ready_machine):
    machine, _ = ready_machine
    machine.login(f"tmux new-session -d -s t; tmux send-keys -t t '{HELP} > ~/said; echo $? > ~/status' Enter")
    waited = machine.ssh("for i in $(seq 60); do [ -s status ] && break; sleep 1; done; cat said; exit $(cat status)")
    machine.ssh("tmux kill-server")
    assert waited.returncode == 0, waited.stdout + waited.stderr
    assert "--optimizing-class-metric" in waited.stdout


def test_the_same_command_continues_a_job_after_a_stop(ready_machine, tiny_bucket):
    machine, _ = ready_machine
    with fake_gcs_server() as url:
        upload(url, tiny_bucket, "bucket")
        program = "python3 train_segmentation_model_prediction_thresholds.py"
        job = f"cd {CODE} && STORAGE_EMULATOR_HOST={url} {program} {' '.join(arguments('gs://bucket'))}"
        cut_power_when(machine, f"{FETCHED}/[0-9a-f]*", job)
        kept = {path: path.stat() for path in machine.root.glob(f"{FETCHED}/[0-9a-f]*")}
        again = machine.ssh(job)
        assert again.returncode == 0, again.stderr
        assert any(name.startswith(f"{MODEL}/model_thresholds_") for name in list_objects(url, "bucket"))
    for path, before in kept.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "fetched again"
    assert machine.ssh(f"cd {CODE} && python3 terraform/check_gpu.py").stdout == "faked GPU\n"


# terraform apply with its provisioners, for a mocked VM that has the machine's address

APPLY = """
mock_provider "google" {{
  mock_resource "google_compute_instance" {{
    defaults = {{ network_interface = {{ access_config = {{ nat_ip = "{address}" }} }} }}
  }}
}}

run "apply" {{
  variables {{
    project_name         = "damage-123456"
    user_name            = "jane"
    gcp_bucket           = "gs://damage-data"
    ssh_source_ranges    = ["203.0.113.7/32"]
    ssh_private_key_file = "{key}"
    cluster              = true
  }}
  assert {{
    condition     = output.ssh == {{ damage-123456-jane = "ssh -i {key} jane@{address}" }}
    error_message = jsonencode(output.ssh)
  }}
}}
"""


def apply(machine, folder, check_gpu_source):
    commit = checkout_with_check_gpu(folder, check_gpu_source)
    terraform_init(folder / "terraform")
    (folder / "terraform/tests/apply.tftest.hcl").write_text(APPLY.format(address=machine.address, key=machine.key))
    machine.ssh(f"rm -rf {CODE}")
    return commit, terraform(folder / "terraform", "test", "-no-color", "-filter=tests/apply.tftest.hcl")


def test_apply_copies_the_code_sets_up_the_vm_and_lets_it_join_the_cluster(ready_machine, tmp_path):
    needs("terraform")
    machine, _ = ready_machine
    commit, result = apply(machine, tmp_path / "code", "import tensorflow\n")
    assert result.returncode == 0, result.stdout + result.stderr
    assert done(*machine.ssh_words(), f"cat {CODE}/.git_hash").strip() == f"{commit}-dirty"
    assert machine.ssh("grep -c necstlab-environment .profile .bashrc").stdout.split() == [".profile:1", ".bashrc:1"]
    modes = "600 ca.pem\n600 vm.pem\n700 .\n"
    assert done(*machine.ssh_words(), "cd .config/necstlab-cluster; stat -c '%a %n' ca.pem vm.pem .") == modes
    # The VM stands for VM 0: what is typed there names the scheduler, and the command still works.
    assert "tls://10.0.0.10:8786" in machine.login("echo $DASK_SCHEDULER_ADDRESS")
    assert done(*machine.ssh_words(), "echo $DASK_SCHEDULER_ADDRESS") == "tls://10.0.0.10:8786\n"
    assert "--optimizing-class-metric" in done(*machine.ssh_words(), HELP)


def test_apply_fails_if_the_set_up_fails(ready_machine, tmp_path):
    needs("terraform")
    machine, _ = ready_machine
    _, result = apply(machine, tmp_path / "code", "raise SystemExit('error: no GPU today')\n")
    assert result.returncode != 0
    assert "remote-exec provisioner error" in result.stdout + result.stderr
