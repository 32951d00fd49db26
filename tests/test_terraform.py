"""The GPU VM, without Google Cloud and without a VM: Terraform's checks, the code that is sent, the packages that pip
installs, and check_gpu.py. test_vm.py runs the set-up."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
TERRAFORM = ROOT / "terraform"
NOT_CODE = shutil.ignore_patterns(
    *(".git", ".venv", "tmp", "sandbox", "__pycache__", ".*_cache", ".hypothesis"),
    *(".terraform*", "*.tfstate*", "terraform.tfvars"),
)
# The platforms whose wheels pip installs on the VM: Ubuntu 24.04 has glibc 2.39.
PLATFORMS = [f"--platform=manylinux{p}_x86_64" for p in (*(f"_2_{n}" for n in range(39, 4, -1)), "2014", "2010", "1")]
VM_PYTHON = "3.12"


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


def pins(*files):
    """Version by package, with pip's spelling of the name, of the pins in requirements files."""
    lines = [line.split("#")[0].strip() for file in files for line in (ROOT / file).read_text().splitlines()]
    pairs = (re.fullmatch(r"([^=[]+)(?:\[.*\])?==(.+)", line).groups() for line in lines if line)
    return {canonicalize_name(name): version for name, version in pairs}


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
    passed, failed = re.search(r"(\d+) passed, (\d+) failed", result.stdout).groups()
    written = "".join(path.read_text() for path in TERRAFORM.glob("tests/*.tftest.hcl"))
    assert (int(passed), int(failed)) == (len(re.findall(r"(?m)^run ", written)), 0)
    for name in ("whole_internet", "one_machine_by_default", "the_bucket_and_nothing_else", "stops_by_itself"):
        assert f'run "{name}"... pass' in result.stdout, "a test is missing"


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
    scripts = sorted(TERRAFORM.glob("*.sh"))
    assert scripts
    result = command("shellcheck", *scripts)
    assert result.returncode == 0, result.stdout


# The code that is sent


@pytest.fixture
def checkout(tmp_path):
    """A checkout and its commit; it also has all kinds of files that must not be sent."""
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
    for not_sent in [
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
        (folder / not_sent).parent.mkdir(parents=True, exist_ok=True)
        (folder / not_sent).write_text("secret or large")
    return folder, commit


def packed(folder, tmp_path):
    """Content by name of the files that pack_code.sh packs."""
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


def test_an_old_hash_file_is_not_sent(checkout, tmp_path):
    folder, commit = checkout
    (folder / ".git_hash").write_text("of an earlier copy")
    assert packed(folder, tmp_path)[".git_hash"] == f"{commit}\n"


def test_code_without_a_commit_is_not_sent(checkout, tmp_path):
    folder, _ = checkout
    shutil.rmtree(folder / ".git")
    result = command("bash", folder / "terraform" / "pack_code.sh", tmp_path / "code.tar.gz")
    assert result.returncode != 0
    assert "error: no commit in" in result.stderr
    assert not (tmp_path / "code.tar.gz").exists()


# What pip resolves


def test_pip_installs_what_the_requirements_pin_and_nothing_else(tmp_path):
    """For the VM's Python. With a new pip, because older ones download gigabytes even for a dry run."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if (no_index := command(*pip, "--target", tmp_path / "pip", "pip==26.3")).returncode != 0:
        pytest.skip(f"no package index: {no_index.stderr.strip().splitlines()[-1]}")
    done(
        *(*pip, "--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--only-binary=:all:", *PLATFORMS),
        *("--python-version", VM_PYTHON, "--target", tmp_path / "nothing", "--report", tmp_path / "report.json"),
        *("-r", ROOT / "requirements.txt", "-r", ROOT / "requirements-gpu.txt"),
        env=os.environ | {"PYTHONPATH": str(tmp_path / "pip")},
    )
    packages = [package["metadata"] for package in json.loads((tmp_path / "report.json").read_text())["install"]]
    resolved = {canonicalize_name(package["name"]): package["version"] for package in packages}
    assert resolved == pins("requirements.txt", "requirements-gpu.txt")
    assert resolved["nvidia-cudnn-cu12"] == "9.10.2.21"


# check_gpu.py

CHECK_GPU = (TERRAFORM / "check_gpu.py").read_text()


@pytest.fixture
def check_gpu(tmp_path):
    """Run check_gpu.py with a driver that answers `says`, and with cuDNN of a version from pip."""

    def check(says, status=0, cudnn="9.10.2.21", source=CHECK_GPU, **environment):
        (tmp_path / "check.py").write_text(source)
        smi = tmp_path / "bin" / "nvidia-smi"
        smi.parent.mkdir()
        smi.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\nexit {status}\n")
        smi.chmod(0o755)
        info = tmp_path / "packages" / f"nvidia_cudnn_cu12-{cudnn}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nvidia-cudnn-cu12\nVersion: {cudnn}\n")
        path = {"PATH": f"{smi.parent}:{os.environ['PATH']}", "PYTHONPATH": str(info.parent)}
        return command(sys.executable, tmp_path / "check.py", env=os.environ | path | environment)

    return check


def assert_one_line(result, *words):
    assert result.returncode != 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("says", "status", "words"),
    [
        ("No devices were found", 6, ["no GPU"]),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9, ["driver does not work"]),
        ("Failed to initialize NVML: Driver/library version mismatch", 18, ["driver was updated", "start it again"]),
        ('Field "compute_cap" is not a valid field to query.', 2, ["driver is too old", "525.60.13"]),
        ("Tesla T4, 7.5, 470.256.02", 0, ["driver is too old: 470.256.02", "525.60.13"]),
        ("Tesla K80, 3.7, 535.1", 0, ["no kernels for Tesla K80", "3.7"]),
        ("NVIDIA L4, 8.9, 580.95.05\nTesla M60, 5.2, 580.95.05", 0, ["no kernels for Tesla M60", "5.2"]),
    ],
)
def test_an_unusable_gpu_or_driver_is_explained(check_gpu, says, status, words):
    assert_one_line(check_gpu(says, status), *words)


@pytest.mark.parametrize("gpu", ["Tesla P100-PCIE-16GB, 6.0", "Tesla V100-SXM2-16GB, 7.0"])
def test_a_cudnn_without_kernels_for_the_gpu_is_named(check_gpu, gpu):
    result = check_gpu(f"{gpu}, 580.95.05", cudnn="9.11.0.98")
    assert_one_line(result, "cuDNN 9.11.0.98 has no kernels for " + gpu.split(",")[0], "requirements-gpu.txt")


def test_a_machine_without_a_driver(check_gpu):
    assert_one_line(check_gpu("", PATH="/nowhere"), "no NVIDIA driver")


def test_a_library_that_is_missing_is_named(check_gpu, tmp_path):
    """With a driver and a cuDNN that support the GPU, only the libraries can be the cause."""
    (tmp_path / "libcudart.so.12").touch()
    result = check_gpu("Tesla P100-PCIE-16GB, 6.0, 580.95.05", LD_LIBRARY_PATH=str(tmp_path))
    assert_one_line(result, "TensorFlow sees 0 of 1 GPUs", "libcudart.so.12", "requirements-gpu.txt")


def test_a_device_that_computes_is_enough(check_gpu):
    """The same steps on a CPU, which every machine has. And OLDEST_GPU is the oldest that TensorFlow lists."""
    source = CHECK_GPU.replace('devices("GPU")', 'devices("CPU")')
    source += "    import tensorflow as tf\n    print(OLDEST_GPU, tf.sysconfig.get_build_info())\n"
    result = check_gpu("NVIDIA L4, 8.9, 580.95.05", source=source)
    assert result.returncode == 0, result.stderr
    computes, built_for = result.stdout.splitlines()
    assert "computes on 1 of 1" in computes
    assert built_for.split()[0] == min(f"{major}.{minor}" for major, minor in re.findall(r"'sm_(\d)(\d)'", built_for))
