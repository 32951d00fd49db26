"""The GPU VM's set-up and a job, in a real Ubuntu or Debian that debootstrap makes, over SSH and with power cuts.

Only the GPU is faked: the driver's answer, NVIDIA's libraries (empty wheels with the names and versions of
requirements-gpu.txt) and check_gpu.py. And systemd, which test_vm_cluster.py has.
"""

import contextlib
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
from helpers import MODEL, arguments, upload, wait_until
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


def fetch_wheels(folder, python_version):
    """Download the wheels of requirements.txt with this host's pip, and make empty ones of requirements-gpu.txt."""
    done(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", *PLATFORMS),
        *("--python-version", python_version, "-r", ROOT / "requirements.txt", "-d", folder),
    )
    for name, version in pins("requirements-gpu.txt").items():
        stem = f"{name.replace('-', '_')}-{version}"
        if name == "tensorflow":
            continue
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{stem}.dist-info/RECORD", "")


def write(path, text, mode=0o644):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def make_system(root, wheels, suite, python, mirror, keyring, components):
    """Make a plain system with Python, sudo and an SSH server, as the VM's image has them, and the fakes."""
    write(root / "etc/dpkg/dpkg.cfg.d/unsafe-io", "force-unsafe-io\n")  # faster, and its disk is memory
    with ThreadPoolExecutor() as pool:
        fetched = pool.submit(fetch_wheels, wheels, python)
        done(
            *("debootstrap", "--variant=minbase", f"--components={components}", f"--keyring={keyring}"),
            *("--include=openssh-server,sudo,python3", suite, root, mirror),
        )
        fetched.result()
    wheels.rename(root / "opt/wheels")
    # no-compile: Python compiles only what it imports, which is far less than pip compiles.
    write(root / "etc/pip.conf", "[global]\nno-index = true\nfind-links = /opt/wheels\n[install]\nno-compile = true\n")
    write(root / "etc/hosts", f"127.0.0.1 localhost {socket.gethostname()}\n")
    # The driver fails at its first call, as on a VM where it is still starting. cloud-init reports faults.
    driver = "[ -e /tmp/driver ] || { touch /tmp/driver; exit 9; }\necho 'GPU 0: none (UUID: none)'"
    for name, says in {"nvidia-smi": driver, "cloud-init": "exit 2", "systemctl": ":", "loginctl": ":"}.items():
        write(root / "usr/local/bin" / name, f"#!/bin/sh\n{says}\n", 0o755)


def add_user(root, key):
    """Let the user jane log in with a new key, and use sudo."""
    done("chroot", root, "useradd", "--create-home", "--shell", "/bin/bash", "jane")
    write(root / "etc/sudoers.d/jane", "jane ALL=(ALL) NOPASSWD: ALL\n")
    done("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    write(root / "home/jane/.ssh/authorized_keys", Path(f"{key}.pub").read_text())
    done("chroot", root, "chown", "-R", "jane:", "/home/jane/.ssh")


def listens(address):
    with contextlib.suppress(OSError):
        socket.create_connection((address, 22), timeout=1).close()
        return True


@contextlib.contextmanager
def ssh_server(root):
    """Serve SSH in the system; yields the address."""
    address = ".".join(["127", *(str(random.randint(2, 250)) for _ in range(3))])
    # In namespaces, so that its mounts and processes end with it; it ends even if pytest is killed.
    namespaces = ["setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"]
    inside = (
        "mount -t proc proc $0/proc && mount -t devpts -o newinstance,ptmxmode=0666 devpts $0/dev/pts"
        " && mkdir -p $0/run/sshd && exec chroot $0 /usr/sbin/sshd -D -o ListenAddress=$1 -o Port=22"
    )
    server = subprocess.Popen([*namespaces, "sh", "-c", inside, root, address])
    try:
        wait_until(lambda: listens(address), server)
        yield address
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def machine():
    needs("debootstrap", "unshare", "setpriv", "chroot", "ssh", "ssh-keygen")
    if (refused := command("unshare", "--mount", "--pid", "--fork", "true")).returncode != 0:
        pytest.skip(f"no namespaces for such a system: {refused.stderr.strip()}")
    possible = [system for system in SYSTEMS if system[3].exists()]
    if not possible:
        pytest.skip("no keyring of Ubuntu or Debian to check a system's signature")
    suite, _, mirror, _, _ = possible[0]
    try:
        urllib.request.urlopen(f"{mirror}/dists/{suite}/Release", timeout=20).close()
    except OSError as error:
        pytest.skip(f"{mirror} is out of reach: {error}")
    scratch = Path(tempfile.mkdtemp(prefix="vm-", dir="/var/tmp"))
    command("mount", "-t", "tmpfs", "vm", scratch)  # some 4 GB in memory, which is faster; if refused, on the disk
    try:
        make_system(scratch / "root", scratch / "wheels", *possible[0])
        add_user(scratch / "root", scratch / "key")
        with ssh_server(scratch / "root") as address:
            yield Machine(scratch / "root", address, scratch / "key")
    finally:
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
    assert "--optimizing-class-metric" in done(*machine.ssh_words(), HELP)
    assert "--optimizing-class-metric" in machine.login(HELP)


def test_command_works_in_tmux(ready_machine):
    machine, _ = ready_machine
    machine.login(f"tmux new-session -d -s t; tmux send-keys -t t '{HELP} > ~/said; touch ~/done' Enter")
    said = machine.ssh("for i in $(seq 60); do [ -e done ] && break; sleep 1; done; cat said; tmux kill-server")
    assert "--optimizing-class-metric" in said.stdout, said.stderr


def test_a_job_runs_to_its_end(ready_machine, tiny_bucket):
    machine, _ = ready_machine
    with fake_gcs_server() as url:
        upload(url, tiny_bucket, "bucket")
        typed = " ".join(["python3 train_segmentation_model_prediction_thresholds.py", *arguments("gs://bucket")])
        done(*machine.ssh_words(), f"cd {CODE} && STORAGE_EMULATOR_HOST={url} {typed}")
        assert any(name.startswith(f"{MODEL}/model_thresholds_") for name in list_objects(url, "bucket"))


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
