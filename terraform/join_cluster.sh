#!/usr/bin/env bash
# Runs on each VM of a cluster after set_up_vm.sh, as the user who will log in. It makes the VM a Dask worker, and VM 0
# the scheduler too, as services of the user that start when the VM boots. It may be killed and run again.
# Usage: join_cluster.sh <address of VM 0> <address of this VM>
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
folder=$HOME/.config/necstlab-cluster # has ca.pem and vm.pem of make_certificates.sh
chmod 700 "$folder"
chmod 600 "$folder"/*.pem
trap 'echo "error: this VM has not joined the cluster: line $LINENO failed: $BASH_COMMAND" >&2' ERR

# Dask reads these. The services have them on every VM, and on VM 0 so have the user's shells.
cat > "$folder/dask.env" << END
DASK_SCHEDULER_ADDRESS=tls://$1:8786
DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=true
DASK_DISTRIBUTED__COMM__TLS__CA_FILE=$folder/ca.pem
DASK_DISTRIBUTED__COMM__TLS__SCHEDULER__CERT=$folder/vm.pem
DASK_DISTRIBUTED__COMM__TLS__WORKER__CERT=$folder/vm.pem
DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT=$folder/vm.pem
END
echo "VM_ADDRESS=$2" > "$folder/vm.env"

services=(dask-worker)
if [ "$1" = "$2" ]; then
  services=(dask-scheduler dask-worker)
  # In .profile for logins and tmux, in .bashrc for `ssh <vm> <command>`: it returns early there, so the line is at the top.
  line="set -a; . '$folder/dask.env'; set +a"
  for file in ~/.profile ~/.bashrc; do
    touch "$file"
    grep -qxF "$line" "$file" || { echo "$line" | cat - "$file" > "$file.new" && mv "$file.new" "$file"; }
  done
fi

mkdir -p ~/.config/systemd/user
for service in "${services[@]}"; do cp "$here/$service.service" ~/.config/systemd/user; done
sudo loginctl enable-linger "$USER" # else the services would only run while the user is logged in
systemctl --user daemon-reload
systemctl --user enable --quiet "${services[@]}"
systemctl --user restart "${services[@]}"
echo "== The VM is in the cluster"
