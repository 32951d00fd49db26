#!/usr/bin/env bash
# Pack the code base as it is on this machine: the files that git tracks, with local edits, and configurations that it
# does not track yet. So .git, virtual environments, data, keys and Terraform's state are not packed.
# .git_hash has the commit in it, followed by "-dirty" if a tracked file was edited.
# Usage: pack_code.sh <tarball>
set -euo pipefail

mkdir -p "$(dirname "$1")"
tarball=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$(dirname "$0")/.."

commit=$(git rev-parse --verify HEAD)
if ! git diff --quiet HEAD -- .; then commit+=-dirty; fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
echo "$commit" > "$scratch/.git_hash"

{
  git ls-files -z --cached
  git ls-files -z --others --exclude-standard -- 'configs/*.yaml'
} | while IFS= read -r -d '' path; do
  # A file that git tracks may have been deleted here.
  if [ -e "$path" ] || [ -L "$path" ]; then printf '%s\0' "$path"; fi
done > "$scratch/files"

# COPYFILE_DISABLE keeps macOS from adding ._ files.
COPYFILE_DISABLE=1 tar -czf "$tarball" -C "$scratch" .git_hash -C "$PWD" --null -T "$scratch/files"
