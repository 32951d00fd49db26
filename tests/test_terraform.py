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
