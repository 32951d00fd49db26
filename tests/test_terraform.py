"""Terraform's checks, the code that is sent, the packages that pip installs, and check_gpu.py.

test_vm.py runs the set-up, test_vm_cluster.py the services of a cluster.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import network

ROOT = Path(__file__).resolve().parents[1]
TERRAFORM = ROOT / "terraform"
CODE = "necstlab-damage-segmentation"  # on the VM
NOT_CODE = shutil.ignore_patterns(
    *(".git", ".venv*", "tmp", "sandbox", "__pycache__", ".*_cache", ".hypothesis"),
    *(".terraform*", "*.tfstate*", "terraform.tfvars", "certificates"),
)
# The platforms whose wheels pip installs on the VM: Ubuntu 24.04 has glibc 2.39.
PLATFORMS = [f"--platform=manylinux{p}_x86_64" for p in (*(f"_2_{n}" for n in range(39, 4, -1)), "2014", "2010", "1")]
# What runs after these words has mounts and processes of its own. They end with it, and it ends with this process.
NAMESPACES = ["setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"]


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


def needs_namespaces():
    needs("setpriv", "unshare")
    if (refused := command(*NAMESPACES, "true")).returncode != 0:
        pytest.skip(f"no namespaces: {refused.stderr.strip()}")


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
    """Run `terraform init`, which writes into the folder: give it a copy."""
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


def test_terraform_is_formatted_and_plans_what_its_tests_say(configuration):
    for words in (["fmt", "-check", "-diff", "-recursive"], ["test", "-no-color"]):
        result = terraform(configuration, *words)
        assert result.returncode == 0, result.stdout + result.stderr


def test_example_has_every_variable_without_a_default(configuration):
    """And none that variables.tf does not know."""
    example = (configuration / "terraform.tfvars.example").read_text()
    given = {line.split("=")[0].strip(" #") for line in example.splitlines() if " = " in line}
    blocks = (configuration / "variables.tf").read_text().split('variable "')[1:]
    names = {block.split('"')[0]: "\n  default " in block for block in blocks}
    assert {name for name, has_default in names.items() if not has_default} <= given
    assert given <= set(names)


def test_shell_scripts_pass_shellcheck():
    needs("shellcheck")
    done("shellcheck", *TERRAFORM.glob("*.sh"))


# The code that is sent


COMMITTED = {"gone.py", "models.py", "terraform/pack_code.sh", "configs/dataset-medium.yaml", "configs/größe 1.yaml"}
IGNORED = {
    *(".venv/bin/python", "sandbox/datasets/image.png", "tmp/cached", "terraform/.terraform/providers/google"),
    *("terraform/terraform.tfstate", "terraform/terraform.tfvars", "terraform/certificates/vm.pem", ".git_hash"),
}
NOT_TRACKED = {"configs/key.json", "id_ed25519"}


def packed(folder, tmp_path):
    """Content by name of the files that pack_code.sh packs."""
    done("bash", folder / "terraform" / "pack_code.sh", "sent/code.tar.gz", cwd=tmp_path)
    with tarfile.open(tmp_path / "sent" / "code.tar.gz") as tar:
        return {member.name: tar.extractfile(member).read().decode() for member in tar if member.isfile()}


def test_tracked_code_is_sent_with_its_commit(tmp_path):
    folder = tmp_path / "check out"
    for name in COMMITTED | IGNORED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("first")
    shutil.copy(TERRAFORM / "pack_code.sh", folder / "terraform")
    shutil.copy(ROOT / ".gitignore", folder)
    commit = commit_everything(folder)
    for name in NOT_TRACKED:
        (folder / name).write_text("secret")
    files = packed(folder, tmp_path)
    assert set(files) == COMMITTED | {".gitignore", ".git_hash"}
    assert files[".git_hash"] == f"{commit}\n"
    # Local edits are sent, and make the commit dirty.
    (folder / "configs/dataset-medium.yaml").write_text("edited")
    (folder / "configs/dataset-mine.yaml").write_text("not tracked yet")
    (folder / "gone.py").unlink()
    files = packed(folder, tmp_path)
    assert set(files) == COMMITTED - {"gone.py"} | {".gitignore", ".git_hash", "configs/dataset-mine.yaml"}
    assert files["configs/dataset-medium.yaml"] == "edited"
    assert files[".git_hash"] == f"{commit}-dirty\n"


# What pip resolves


@pytest.mark.slow
def test_pip_installs_what_the_requirements_pin_and_nothing_else(tmp_path):
    """For the VM's Python. With a new pip, because older ones download gigabytes even for a dry run."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done(*pip, "--target", tmp_path / "pip", "pip==26.3")
    done(
        *(*pip, "--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--only-binary=:all:", *PLATFORMS),
        *("--python-version", "3.12", "--target", tmp_path / "nothing", "--report", tmp_path / "report.json"),
        *("-r", ROOT / "requirements.txt", "-r", ROOT / "requirements-gpu.txt"),
        env=os.environ | {"PYTHONPATH": str(tmp_path / "pip")},
    )
    packages = [package["metadata"] for package in json.loads((tmp_path / "report.json").read_text())["install"]]
    resolved = {canonicalize_name(package["name"]): package["version"] for package in packages}
    lines = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-gpu.txt").read_text()
    pins = [Requirement(line) for line in re.sub(" *#.*", "", lines).split("\n") if line]
    assert resolved == {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert resolved["nvidia-cudnn-cu12"] == "9.10.2.21"


# check_gpu.py


def check_gpu(folder, says, status=0, cudnn="9.10.2.21", **environment):
    """Run check_gpu.py with a driver that answers `says`, and with cuDNN of a version from pip."""
    info = folder / f"nvidia_cudnn_cu12-{cudnn}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nvidia-cudnn-cu12\nVersion: {cudnn}\n")
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\nexit {status}\n")
    (folder / "nvidia-smi").chmod(0o755)
    path = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(folder)}
    return command(sys.executable, TERRAFORM / "check_gpu.py", env=os.environ | path | environment)


@pytest.mark.parametrize(
    ("says", "others", "words"),
    [
        ("", {"PATH": "/nowhere"}, ["no NVIDIA driver"]),
        ("No devices were found", {"status": 6}, ["no GPU"]),
        ("NVIDIA-SMI has failed because it couldn't communicate.", {"status": 9}, ["driver does not work"]),
        ("Failed to initialize NVML: Driver/library version mismatch", {"status": 18}, ["driver was updated"]),
        ("Tesla T4, 7.5, 470.256.02", {}, ["driver is too old: 470.256.02", "525.60.13"]),
        ("NVIDIA L4, 8.9, 580.95.05\nTesla M60, 5.2, 580.95.05", {}, ["no kernels for Tesla M60", "5.2"]),
        ("Tesla V100-SXM2-16GB, 7.0, 580.95.05", {"cudnn": "9.11.0.98"}, ["cuDNN 9.11.0.98", "Tesla V100"]),
    ],
)
def test_an_unusable_gpu_or_driver_is_explained_in_one_line(tmp_path, says, others, words):
    result = check_gpu(tmp_path, says, **others)
    assert result.returncode != 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)


def test_a_library_that_is_missing_is_named(tmp_path):
    """With a driver and a cuDNN that support the GPU, only the libraries can be the cause."""
    (tmp_path / "libcudart.so.12").touch()
    result = check_gpu(tmp_path, "Tesla P100-PCIE-16GB, 6.0, 580.95.05", LD_LIBRARY_PATH=str(tmp_path))
    assert re.match(r"error: TensorFlow sees 0 of 1 GPUs.* libcudart\.so\.12.* requirements-gpu\.txt", result.stderr)


def test_a_device_that_computes_is_enough(monkeypatch, capsys):
    """On a CPU, which every machine has."""
    network.import_tensorflow()
    monkeypatch.syspath_prepend(TERRAFORM)
    importlib.import_module("check_gpu").compute_on(1, "CPU")
    assert "computes on 1 of 1 CPUs" in capsys.readouterr().out
