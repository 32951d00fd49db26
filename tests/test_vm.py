"""The GPU VM's set-up and a job, in a real Debian that debootstrap makes, over SSH and with a power cut.

Only what needs a GPU is faked: the driver's answer, requirements-gpu.txt and check_gpu.py. And systemd, which
test_vm_cluster.py has.
"""

import contextlib
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fake_gcs import fake_gcs_server, list_objects
from helpers import MODEL, arguments, finish, start_program, upload, wait_until
from test_terraform import (
    CODE,
    NAMESPACES,
    NOT_CODE,
    PLATFORMS,
    ROOT,
    command,
    commit_everything,
    done,
    needs,
    needs_namespaces,
    terraform,
    terraform_init,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ENVIRONMENT = "home/jane/.local/share/necstlab-environment"
HELP = f"cd {CODE} && python3 train_segmentation_model_prediction_thresholds.py --help"
SET_UP = f"bash {CODE}/terraform/set_up_vm.sh"


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


def write(path, text, mode=0o644):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def make_system(root):
    """Make a plain system with Python, sudo and an SSH server, as the VM's image has them, and what is faked."""
    write(root / "etc/dpkg/dpkg.cfg.d/unsafe-io", "force-unsafe-io\n")  # faster
    done(
        *("debootstrap", "--variant=minbase", "--force-check-gpg", "--include=openssh-server,sudo,python3"),
        *("trixie", root, "http://deb.debian.org/debian"),
    )
    # With this host's pip, whose settings may name another package index.
    done(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--python-version=3.13"),
        *(*PLATFORMS, "-r", ROOT / "requirements.txt", "-d", root / "opt/wheels"),
    )
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


@pytest.fixture(scope="module")
def machine():
    needs("debootstrap", "chroot", "ssh", "ssh-keygen")
    needs_namespaces()
    address = ".".join(["127", *(str(random.randint(2, 250)) for _ in range(3))])
    with tempfile.TemporaryDirectory(prefix="vm-", dir="/var/tmp") as scratch, contextlib.ExitStack() as stack:
        command("mount", "-t", "tmpfs", "vm", scratch)  # some 4 GB in memory, which is faster; if refused, on the disk
        stack.callback(command, "umount", "--lazy", scratch)
        machine = Machine(Path(scratch, "root"), address, Path(scratch, "key"))
        make_system(machine.root)
        add_user(machine.root, machine.key)
        inside = (
            "mount -t proc proc $0/proc && mount -t devpts -o newinstance,ptmxmode=0666 devpts $0/dev/pts"
            " && mkdir -p $0/run/sshd && exec chroot $0 /usr/sbin/sshd -D -o ListenAddress=$1 -o Port=22"
        )
        server = stack.enter_context(subprocess.Popen([*NAMESPACES, "sh", "-c", inside, machine.root, address]))
        stack.callback(server.kill)
        wait_until(lambda: machine.ssh("true").returncode == 0, server)
        yield machine


def checkout(folder, check_gpu):
    """Make a checkout of this code with another check_gpu.py and no packages for GPUs; returns its commit."""
    shutil.copytree(ROOT, folder, ignore=NOT_CODE)
    commit = commit_everything(folder)
    (folder / "terraform" / "check_gpu.py").write_text(check_gpu)
    (folder / "requirements-gpu.txt").write_text("")
    return commit


@pytest.fixture(scope="module")
def ready_machine(machine, tmp_path_factory):
    """The machine after a set-up with a power cut and one without, and the last one's result."""
    folder = tmp_path_factory.mktemp("sent")
    checkout(folder / "code", "import tensorflow; print('faked GPU')\n")
    done("bash", folder / "code" / "terraform" / "pack_code.sh", folder / "code.tar.gz")
    with open(folder / "code.tar.gz", "rb") as tarball:
        done(*machine.ssh_words(), f"mkdir {CODE} && tar -xz -C {CODE}", stdin=tarball)
    packages = f"{ENVIRONMENT}/lib/python3.13/site-packages"
    running = start_program(*machine.ssh_words(), SET_UP, cwd=folder)
    wait_until(lambda: any(machine.root.glob(f"{packages}/six-*.dist-info/RECORD")), running)
    machine.ssh("sudo sh -c 'kill -KILL -1'")  # the shell's kill: no other is installed
    ended = finish(running, timeout=60)
    assert ended.returncode == 255, f"it ended before its connection: {ended.stdout}{ended.stderr}"
    (machine.root / "tmp/code.tar.gz").unlink(missing_ok=True)
    (machine.root / packages / "six.py").write_text("")  # as a file that had not reached the disk
    status = machine.root / "var/lib/dpkg/status"  # as dpkg leaves it when it is killed while it installs a package
    half = re.sub(r"(Package: nano\nStatus: ).*", r"\1install reinstreq half-installed", status.read_text())
    assert half != status.read_text()
    status.write_text(half)
    return machine, machine.ssh(SET_UP)


def test_set_up_ends_with_success(ready_machine):
    _, said = ready_machine
    assert said.returncode == 0, said.stdout + said.stderr
    assert said.stdout.splitlines()[-2:] == ["faked GPU", "== The VM is ready"]


def test_command_works_as_the_document_types_it_and_in_tmux(ready_machine):
    machine, _ = ready_machine
    assert "--optimizing-class-metric" in done(*machine.ssh_words(), HELP)
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


def apply(machine, folder, check_gpu):
    commit = checkout(folder, check_gpu)
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
