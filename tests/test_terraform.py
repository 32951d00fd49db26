"""The GPU VM, as far as it goes without Google Cloud: Terraform's checks, the code that is sent, the set-up.

The set-up runs for real, over SSH, in a plain Ubuntu or Debian of its own that debootstrap makes. Only the GPU is
faked: the driver's answer, NVIDIA's libraries (empty wheels under the names that TensorFlow asks for) and
TensorFlow's look at it.
"""

import importlib.metadata
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
TERRAFORM = ROOT / "terraform"
CODE = "necstlab-damage-segmentation"  # on the VM
NOT_CODE = shutil.ignore_patterns(
    *(".git", ".venv", "tmp", "sandbox", "__pycache__", ".*_cache", ".hypothesis"),
    *(".terraform*", "*.tfstate*", "terraform.tfvars"),
)
# The VM's own system where this host can check its signature, else the nearest.
KEYRINGS = Path("/usr/share/keyrings")
SYSTEMS = [
    ("noble", "http://archive.ubuntu.com/ubuntu", KEYRINGS / "ubuntu-archive-keyring.gpg", "main,universe"),
    ("trixie", "http://deb.debian.org/debian", KEYRINGS / "debian-archive-keyring.gpg", "main"),
]


def command(*words, **options):
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)


def done(*words, **options):
    """The standard output of a command that must succeed."""
    result = command(*words, **options)
    assert result.returncode == 0, f"{words}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def needs(*programs):
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not on PATH: {', '.join(missing)}")


def commit_everything(folder):
    done("git", "init", "--quiet", cwd=folder)
    done("git", "add", "--all", cwd=folder)
    done("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "-m", "code", cwd=folder)
    return done("git", "rev-parse", "HEAD", cwd=folder).strip()


# Terraform's own checks


def terraform(folder, *words):
    environment = os.environ | {"TF_IN_AUTOMATION": "1", "CHECKPOINT_DISABLE": "1"}
    return command("terraform", *words, cwd=folder, env=environment)


def terraform_init(folder):
    """`terraform init`, which writes into the folder: the caller gives it a copy."""
    result = terraform(folder, "init", "-input=false", "-no-color")
    if "could not connect to registry.terraform.io" in " ".join(result.stderr.split()):
        pytest.skip("Terraform's registry is out of reach, so there is no google provider")
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def configuration(tmp_path_factory):
    needs("terraform")
    folder = tmp_path_factory.mktemp("terraform") / "terraform"
    shutil.copytree(TERRAFORM, folder, ignore=NOT_CODE)
    terraform_init(folder)
    return folder


def test_terraform_is_formatted():
    needs("terraform")
    result = terraform(TERRAFORM, "fmt", "-check", "-diff", "-recursive")
    assert result.returncode == 0, result.stdout + result.stderr


def test_terraform_is_valid(configuration):
    result = terraform(configuration, "validate", "-no-color")
    assert result.returncode == 0, result.stdout + result.stderr


def test_terraform_plans(configuration):
    result = terraform(configuration, "test", "-no-color")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failed" in result.stdout
    assert "0 passed" not in result.stdout.split()


def test_example_has_every_variable_without_a_default(configuration):
    """Without the example's line, or with a name that variables.tf does not know, the plan would ask or complain."""
    example = (configuration / "terraform.tfvars.example").read_text()
    given = {line.split("=")[0].strip(" #") for line in example.splitlines() if " = " in line}
    blocks = (configuration / "variables.tf").read_text().split('variable "')[1:]
    names = {block.split('"')[0]: "\n  default " in block for block in blocks}
    assert {name for name, has_default in names.items() if not has_default} <= given
    assert given <= set(names)


def test_shell_scripts_pass_shellcheck():
    needs("shellcheck")
    scripts = sorted(TERRAFORM.glob("*.sh"))
    assert scripts
    result = command("shellcheck", *scripts)
    assert result.returncode == 0, result.stdout


# The code that is sent


@pytest.fixture
def checkout(tmp_path):
    """A checkout with everything in it that must stay behind, and the commit it is at."""
    folder = tmp_path / "check out"
    (folder / "configs").mkdir(parents=True)
    (folder / "terraform").mkdir()
    shutil.copy(TERRAFORM / "pack_code.sh", folder / "terraform")
    shutil.copy(ROOT / ".gitignore", folder)
    (folder / "models.py").write_text("as committed")
    (folder / "gone.py").write_text("deleted before it is sent")
    (folder / "configs" / "dataset-medium.yaml").write_text("as committed")
    (folder / "configs" / "größe 1.yaml").write_text("an odd name")
    commit = commit_everything(folder)
    for left_behind in [
        ".venv/bin/python",
        "sandbox/datasets/image.png",
        "tmp/cached",
        "terraform/terraform.tfstate",
        "terraform/terraform.tfvars",
        "terraform/.terraform/providers/google",
        "key.json",
        "configs/key.json",
        "id_ed25519",
    ]:
        (folder / left_behind).parent.mkdir(parents=True, exist_ok=True)
        (folder / left_behind).write_text("secret or large")
    return folder, commit


def packed(folder, tmp_path):
    """File name -> content of what pack_code.sh packs."""
    done("bash", folder / "terraform" / "pack_code.sh", "sent/code.tar.gz", cwd=tmp_path)
    with tarfile.open(tmp_path / "sent" / "code.tar.gz") as tar:
        return {member.name: tar.extractfile(member).read().decode() for member in tar if member.isfile()}


COMMITTED = {
    *(".gitignore", "models.py", "gone.py", "terraform/pack_code.sh"),
    *("configs/dataset-medium.yaml", "configs/größe 1.yaml"),
}


def test_committed_code_is_sent_with_its_commit(checkout, tmp_path):
    folder, commit = checkout
    files = packed(folder, tmp_path)
    assert set(files) == COMMITTED | {".git_hash"}
    assert files[".git_hash"] == f"{commit}\n"


def test_local_edits_are_sent_and_make_the_commit_dirty(checkout, tmp_path):
    folder, commit = checkout
    (folder / "configs" / "dataset-medium.yaml").write_text("edited")
    (folder / "configs" / "dataset-mine.yaml").write_text("not tracked yet")
    (folder / "gone.py").unlink()
    files = packed(folder, tmp_path)
    assert set(files) == COMMITTED - {"gone.py"} | {".git_hash", "configs/dataset-mine.yaml"}
    assert files["configs/dataset-medium.yaml"] == "edited"
    assert files[".git_hash"] == f"{commit}-dirty\n"


def test_hash_left_by_an_earlier_copy_does_not_count(checkout, tmp_path):
    folder, commit = checkout
    (folder / ".git_hash").write_text("of another time")
    assert packed(folder, tmp_path)[".git_hash"] == f"{commit}\n"


def test_code_without_a_commit_is_not_sent(checkout, tmp_path):
    folder, _ = checkout
    shutil.rmtree(folder / ".git")
    result = command("bash", folder / "terraform" / "pack_code.sh", tmp_path / "code.tar.gz")
    assert result.returncode != 0
    assert "error: no commit in" in result.stderr
    assert not (tmp_path / "code.tar.gz").exists()


# The look at the GPU


def check_gpu(source, number, tmp_path):
    (tmp_path / "check.py").write_text(source)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}
    return command(sys.executable, tmp_path / "check.py", number, env=environment)


def test_a_gpu_that_tensorflow_does_not_see_is_an_error(tmp_path):
    result = check_gpu((TERRAFORM / "check_gpu.py").read_text(), 1, tmp_path)
    assert result.returncode != 0
    assert "error: TensorFlow sees 0 of 1 GPUs" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("number", "succeeds"), [(0, False), (1, True), (2, False)])
def test_a_device_that_computes_is_enough(number, succeeds, tmp_path):
    """The same steps on the one CPU that every machine has."""
    result = check_gpu((TERRAFORM / "check_gpu.py").read_text().replace('"GPU"', '"CPU"'), number, tmp_path)
    assert (result.returncode == 0) == succeeds, result.stderr
    assert ("computes on 1 of 1" in result.stdout) == succeeds


# The set-up of the VM


class Machine:
    """A running system with an SSH server on an address of the loopback network."""

    def __init__(self, root, address, key):
        self.root, self.address, self.key = root, address, key

    def ssh_words(self, *options):
        quiet = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes"]
        return ["ssh", "-F", "none", "-i", self.key, *options, *(f"-o{o}" for o in quiet), f"jane@{self.address}"]

    def ssh(self, typed, **options):
        return command(*self.ssh_words(), typed, **options)

    def login(self, typed):
        """What comes of typing into the shell that `ssh <vm>` opens, with a terminal."""
        return done(*self.ssh_words("-tt"), input=f"{typed}\nexit\n", timeout=120)


def make_system(root):
    """A plain system with what the VM's image has beyond it: Python, sudo, an SSH server."""
    settings = root / "etc" / "dpkg" / "dpkg.cfg.d"
    settings.mkdir(parents=True)
    (settings / "unsafe-io").write_text("force-unsafe-io\n")  # it need not outlive a power cut: faster
    for suite, mirror, keyring, components in SYSTEMS:
        if not keyring.exists():
            continue
        try:
            urllib.request.urlopen(f"{mirror}/dists/{suite}/Release", timeout=20).close()
        except OSError as error:
            pytest.skip(f"{mirror} is out of reach: {error}")
        done(
            *("debootstrap", "--variant=minbase", f"--components={components}", f"--keyring={keyring}"),
            *("--include=openssh-server,sudo,python3", suite, root, mirror),
        )
        return
    pytest.skip("no keyring of Ubuntu's or Debian's archive to check a system against")


def stub_cuda_wheels(folder):
    """Empty wheels of what tensorflow[and-cuda] asks for, each of a version that it accepts."""
    for line in importlib.metadata.requires("tensorflow"):
        requirement = Requirement(line)
        if not (requirement.marker and "and-cuda" in str(requirement.marker)):
            continue
        below = next(int(s.version.split(".")[0]) for s in requirement.specifier if s.operator == "<")
        name, version = requirement.name.replace("-", "_"), f"{below - 1}.9999"
        assert requirement.specifier.contains(version)
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            metadata = f"Metadata-Version: 2.1\nName: {requirement.name}\nVersion: {version}\n"
            wheel.writestr(f"{info}/METADATA", metadata)
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")


def fetch_wheels(folder, python_version):
    """What requirements.txt asks for, as this host's pip and its cache give it, for the system's Python."""
    platforms = ["_2_28", "_2_27", "_2_26", "_2_24", "_2_17", "2014", "_2_12", "2010", "_2_5", "1"]
    done(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"),
        *("--python-version", python_version, *(f"--platform=manylinux{p}_x86_64" for p in platforms)),
        *("-r", ROOT / "requirements.txt", "-d", folder),
    )


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture(scope="module")
def machine():
    needs("debootstrap", "unshare", "setpriv", "chroot", "ssh", "ssh-keygen")
    if os.geteuid() != 0:
        pytest.skip("only root can make a system of its own")
    if (refused := command("unshare", "--mount", "--pid", "--fork", "true")).returncode != 0:
        pytest.skip(f"no namespaces for a system of its own: {refused.stderr.strip()}")
    scratch = Path(tempfile.mkdtemp(prefix="vm-", dir="/var/tmp"))
    command("mount", "-t", "tmpfs", "vm", scratch)  # some 4 GB in memory, where it can be: faster to make and remove
    server = None
    try:
        root, key = scratch / "root", scratch / "key"
        make_system(root)
        python = done("chroot", root, "python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
        wheels = root / "opt" / "wheels"
        wheels.mkdir()
        fetch_wheels(wheels, python)
        stub_cuda_wheels(wheels)
        (root / "etc" / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /opt/wheels\n")

        # The driver is not up yet at first, and a first boot may end with complaints.
        program(
            root / "usr/local/bin/nvidia-smi",
            "#!/bin/sh\n[ -e /tmp/driver ] || { touch /tmp/driver; exit 9; }\necho 'GPU 0: none (UUID: none)'\n",
        )
        program(root / "usr/local/bin/cloud-init", "#!/bin/sh\nexit 2\n")

        (root / "etc/hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n")
        done("chroot", root, "useradd", "--create-home", "--shell", "/bin/bash", "jane")
        (root / "etc/sudoers.d/jane").write_text("jane ALL=(ALL) NOPASSWD: ALL\n")
        done("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
        (root / "home/jane/.ssh").mkdir()
        shutil.copy(f"{key}.pub", root / "home/jane/.ssh/authorized_keys")
        done("chroot", root, "chown", "-R", "jane:", "/home/jane/.ssh")

        # Its mounts and processes end with the server.
        address = ".".join(["127", *(str(random.randint(2, 250)) for _ in range(3))])
        inside = (
            "mount -t proc proc $0/proc && mount -t devpts -o newinstance,ptmxmode=0666 devpts $0/dev/pts"
            " && mkdir -p $0/run/sshd && exec chroot $0 /usr/sbin/sshd -D -e -o ListenAddress=$1 -o Port=22"
        )
        with open(scratch / "sshd.log", "w") as log:
            server = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig=KILL"),  # nothing stays when pytest itself is killed
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
    """A checkout of this code whose look at the GPU is another."""
    shutil.copytree(ROOT, folder, ignore=NOT_CODE)
    commit = commit_everything(folder)
    (folder / "terraform" / "check_gpu.py").write_text(source)
    return commit


@pytest.fixture(scope="module")
def ready_machine(machine, tmp_path_factory):
    """The machine after its set-up, what the set-up said, and the commit that was sent."""
    folder = tmp_path_factory.mktemp("sent")
    commit = checkout_with_check_gpu(folder / "code", "import tensorflow; print('faked GPU')\n")
    done("bash", folder / "code" / "terraform" / "pack_code.sh", folder / "code.tar.gz")
    with open(folder / "code.tar.gz", "rb") as tarball:
        done(*machine.ssh_words(), f"mkdir {CODE} && tar -xz -C {CODE}", stdin=tarball)
    said = machine.ssh(f"bash {CODE}/terraform/set_up_vm.sh", timeout=500)
    return machine, said, commit


HELP = f"cd {CODE} && python3 train_segmentation_model_prediction_thresholds.py --help"


def test_set_up_ends_with_success(ready_machine):
    _, said, _ = ready_machine
    assert said.returncode == 0, said.stdout + said.stderr
    assert said.stdout.splitlines()[-2:] == ["faked GPU", "== The VM is ready"]


def test_the_environment_is_what_requirements_pins(ready_machine):
    machine, _, _ = ready_machine
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if line)
    listed = done(*machine.ssh_words(), "python3 -m pip list --format=json")
    there = {canonicalize_name(package["name"]): package["version"] for package in json.loads(listed)}
    assert "nvidia-cudnn-cu12" in there, "TensorFlow came without its CUDA libraries"
    others = {"pip", *(name for name in there if name.startswith("nvidia-"))}
    assert {name: version for name, version in there.items() if name not in others} == {
        canonicalize_name(name): version for name, version in pins.items()
    }, "requirements.txt does not pin all that this Python needs, or something else was installed"


def test_networks_can_be_built(ready_machine):
    machine, _, _ = ready_machine
    build = "segmentation_models.Unet('resnet18', input_shape=(None, None, 1), encoder_weights=None)"
    source = f"import segmentation_models; {build}"
    result = machine.ssh(f'TF_USE_LEGACY_KERAS=1 SM_FRAMEWORK=tf.keras python3 -c "{source}"')
    assert result.returncode == 0, result.stderr


def test_command_works_as_the_document_types_it(ready_machine):
    machine, _, _ = ready_machine
    over_ssh = machine.ssh(HELP)
    assert over_ssh.returncode == 0, over_ssh.stderr
    assert "--optimizing-class-metric" in over_ssh.stdout
    assert "--optimizing-class-metric" in machine.login(HELP)


def test_command_works_in_tmux(ready_machine):
    machine, _, _ = ready_machine
    machine.login(f"tmux new-session -d -s t; tmux send-keys -t t '{HELP} > ~/said; echo $? > ~/status' Enter")
    waited = machine.ssh("for i in $(seq 60); do [ -s status ] && break; sleep 1; done; cat said; exit $(cat status)")
    machine.ssh("tmux kill-server")
    assert waited.returncode == 0, waited.stdout + waited.stderr
    assert "--optimizing-class-metric" in waited.stdout


def test_nano_is_there(ready_machine):
    machine, _, _ = ready_machine
    assert "nano" in done(*machine.ssh_words(), "nano --version")


def test_commit_is_there(ready_machine):
    machine, _, commit = ready_machine
    assert done(*machine.ssh_words(), f"cat {CODE}/.git_hash").strip() == f"{commit}-dirty"


# terraform apply, provisioners and all, of a mocked VM whose address is the machine's

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
    number_of_machines   = 2
  }}
  plan_options {{
    target = [google_compute_instance.vm[1]]
  }}
  assert {{
    condition = output.ssh == {{
      damage-123456-jane   = null
      damage-123456-jane-1 = "ssh -i {key} jane@{address}"
    }}
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


def test_apply_copies_the_code_and_sets_the_vm_up(ready_machine, tmp_path):
    needs("terraform")
    machine, _, _ = ready_machine
    commit, result = apply(machine, tmp_path / "code", "import tensorflow\n")
    assert result.returncode == 0, result.stdout + result.stderr
    assert done(*machine.ssh_words(), f"cat {CODE}/.git_hash").strip() == f"{commit}-dirty"
    assert machine.ssh(HELP).returncode == 0
    assert machine.ssh("grep -c necstlab-environment .profile .bashrc").stdout.split() == [".profile:1", ".bashrc:1"]


def test_apply_fails_with_what_went_wrong(ready_machine, tmp_path):
    needs("terraform")
    machine, _, _ = ready_machine
    _, result = apply(machine, tmp_path / "code", "raise SystemExit('error: no GPU today')\n")
    assert result.returncode != 0
    assert "remote-exec provisioner error" in result.stdout + result.stderr
