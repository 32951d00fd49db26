#!/usr/bin/env bash
# Runs on the VM, as the user who will log in, in the code base that Terraform unpacked. It installs the environment and
# checks that TensorFlow computes on every GPU, or ends with an error. It may be killed at any time and run again.
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

# try_for <seconds> <command...>: run the command until it succeeds, for at most that number of seconds
try_for() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    if [ "$SECONDS" -ge "$end" ]; then return 1; fi
    sleep 5
  done
}

# Error-Mode: otherwise an update without the network succeeds, and leaves old lists whose packages are gone.
apt() {
  sudo env DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l apt-get -qq -o DPkg::Lock::Timeout=600 \
    -o Acquire::Retries=5 -o APT::Update::Error-Mode=any "$@"
}

# An earlier set-up may still be running after its connection broke.
exec 9> "$HOME/.necstlab-set-up.lock"
flock --wait 1800 9 || fail "another set-up has been running on this VM for 30 minutes: look for it with ps aux, then run this again"

echo "== Waiting for the first boot to finish"
# Its exit status is not used: it is also an error for faults that do not matter here.
if command -v cloud-init > /dev/null; then timeout 900 cloud-init status --wait > /dev/null || true; fi

echo "== Installing tmux, nano and Python's venv"
# The image's automatic updates may have locked the package lists or dpkg, for which the timeout above does not work.
try_for 600 apt update || fail "apt-get update did not succeed within 10 minutes"
# Complete what an interrupted set-up left half-installed; before that, apt-get installs nothing.
try_for 600 sudo env DEBIAN_FRONTEND=noninteractive dpkg --configure --pending > /dev/null ||
  fail "dpkg --configure --pending did not succeed within 10 minutes"
apt install --fix-broken > /dev/null
apt install --no-install-recommends tmux nano python3-venv > /dev/null

# The file `installed` has the requirements that the environment was made from, and is written when all is on the disk. If
# it is missing or different the environment is made anew, because pip takes a half-installed package for a whole one. What
# was downloaded is still in pip's cache.
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

# Make python3 the environment's, without activation. .profile is for logins and tmux, whose shells read /etc/profile
# first, which may set PATH. .bashrc is for `ssh <vm> <command>`: it returns early there, so the line is at the top.
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
# In a login shell, as the user will have.
bash -lc 'cd "$1" && python3 terraform/check_gpu.py' bash "$code"

sync
echo "== The VM is ready"
