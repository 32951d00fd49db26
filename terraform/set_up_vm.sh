#!/usr/bin/env bash
# Runs on the VM, as the user who will log in, from the code base that Terraform unpacked: installs the environment and
# ends when TensorFlow computes on every GPU, or with what went wrong. It may be killed at any time and run again.
set -euo pipefail

code=$(cd "$(dirname "$0")/.." && pwd)
environment=$HOME/.local/share/necstlab-environment
path_line="export PATH=\"$environment/bin:\$PATH\""
requirements=("$code/requirements.txt" "$code/requirements-gpu.txt")

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

# Error-Mode: else an update without the network succeeds, and leaves lists that lead nowhere.
apt() {
  sudo env DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l apt-get -qq -o DPkg::Lock::Timeout=600 \
    -o Acquire::Retries=5 -o APT::Update::Error-Mode=any "$@"
}

# An earlier set-up may still be at work after the connection to it broke.
exec 9> "$HOME/.necstlab-set-up.lock"
flock --wait 1800 9 || fail "another set-up has been at work on this VM for 30 minutes: see ps aux, then run this again"

echo "== Waiting for the first boot to finish"
# Its exit status also tells of complaints that do not matter here, so only the end counts.
if command -v cloud-init > /dev/null; then timeout 900 cloud-init status --wait > /dev/null || true; fi

echo "== Installing tmux, nano and Python's venv"
# The lock's timeout does not cover the package lists, which the image's own updates may hold, nor dpkg by itself.
try_for 600 apt update || fail "apt-get update did not succeed within 10 minutes"
# What an interrupted set-up left half-done: apt-get installs nothing before that is put right.
try_for 600 sudo env DEBIAN_FRONTEND=noninteractive dpkg --configure --pending > /dev/null ||
  fail "dpkg --configure --pending did not succeed within 10 minutes"
apt install --fix-broken > /dev/null
apt install --no-install-recommends tmux nano python3-venv > /dev/null

# The file names what the environment holds, and is written when all of it is on the disk. Without it, or with another
# list in it, nothing there can be trusted: pip takes half a package for a whole one. What was downloaded is kept.
echo "== Installing the Python environment: TensorFlow with CUDA, some 3 GB"
if ! cat "${requirements[@]}" | cmp --silent - "$environment/installed"; then
  rm -rf "$environment"
  /usr/bin/python3 -m venv "$environment"
  "$environment/bin/pip" install --quiet --disable-pip-version-check --retries 10 --timeout 60 \
    "${requirements[@]/#/--requirement=}"
  sync
  cat "${requirements[@]}" > "$environment/installing"
  mv "$environment/installing" "$environment/installed"
fi
rm -rf ~/.cache/pip

# python3 is the environment's, with nothing to activate: in .profile for logins and tmux, whose shells read /etc/profile
# first, which may set PATH anew; in .bashrc for `ssh <vm> <command>`, above the line that ends it: so at the top of both.
for file in ~/.profile ~/.bashrc; do
  touch "$file"
  grep -qxF "$path_line" "$file" || { echo "$path_line" | cat - "$file" > "$file.new" && mv "$file.new" "$file"; }
done

echo "== Waiting for the GPU's driver"
# A call of nvidia-smi may hang while the driver starts.
try_for 600 timeout 60 nvidia-smi > /dev/null 2>&1 ||
  fail "the GPU's driver does not answer: nvidia-smi says: $(timeout 60 nvidia-smi 2>&1 || true)"
timeout 60 nvidia-smi -L

echo "== Checking that TensorFlow computes on the GPU"
# In a login shell, as it will be used.
bash -lc 'cd "$1" && python3 terraform/check_gpu.py' bash "$code"

sync
echo "== The VM is ready"
