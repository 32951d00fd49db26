#!/usr/bin/env bash
# Runs on the VM, as the user who will log in, from the code base that Terraform unpacked: installs the environment and
# ends when TensorFlow sees every GPU, or with what went wrong. It may be run again.
set -euo pipefail

code=$(cd "$(dirname "$0")/.." && pwd)
environment=$HOME/.local/share/necstlab-environment
path_line="export PATH=\"$environment/bin:\$PATH\""

fail() {
  echo "error: $*" >&2
  exit 1
}
trap 'echo "error: the VM is not set up: line $LINENO failed: $BASH_COMMAND" >&2' ERR

# try_for <seconds> <command...>: until it succeeds, at most so long
try_for() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    if [ "$SECONDS" -ge "$end" ]; then return 1; fi
    sleep 5
  done
}

apt() {
  sudo env DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l apt-get -qq -o DPkg::Lock::Timeout=600 "$@"
}

echo "== Waiting for the first boot to finish"
# Its exit status also tells of complaints that do not matter here, so only the end counts.
if command -v cloud-init > /dev/null; then timeout 900 cloud-init status --wait > /dev/null || true; fi

echo "== Installing tmux, nano and Python's venv"
# The lock's timeout does not cover the package lists, which the image's own updates may hold.
try_for 600 apt update || fail "apt-get update did not succeed within 10 minutes"
apt install --no-install-recommends tmux nano python3-venv > /dev/null

echo "== Installing the Python environment: TensorFlow with CUDA, some 3 GB"
if [ ! -x "$environment/bin/pip" ]; then /usr/bin/python3 -m venv --clear "$environment"; fi
tensorflow=$(sed -nE 's/^tensorflow==([0-9.]+).*/\1/p' "$code/requirements.txt")
[ -n "$tensorflow" ] || fail "requirements.txt pins no tensorflow==<version>"
"$environment/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check --retries 10 \
  -r "$code/requirements.txt" "tensorflow[and-cuda]==$tensorflow"

# python3 is the environment's, with nothing to activate: in .profile for logins and tmux, whose shells read /etc/profile
# first, which may set PATH anew; at the top of .bashrc, above the line that ends it, for `ssh <vm> <command>`.
touch ~/.profile ~/.bashrc
grep -qxF "$path_line" ~/.profile || echo "$path_line" >> ~/.profile
grep -qxF "$path_line" ~/.bashrc || { echo "$path_line" | cat - ~/.bashrc > ~/.bashrc.new && mv ~/.bashrc.new ~/.bashrc; }

echo "== Waiting for the GPU's driver"
try_for 600 nvidia-smi > /dev/null 2>&1 || fail "the GPU's driver does not answer: nvidia-smi says: $(nvidia-smi 2>&1 || true)"
nvidia-smi -L

echo "== Checking that TensorFlow sees the GPU"
# In a login shell, as it will be used.
bash -lc 'cd "$1" && python3 terraform/check_gpu.py "$(nvidia-smi -L | grep -c ^GPU)"' bash "$code"

echo "== The VM is ready"
