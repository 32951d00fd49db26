"""The services of a VM of a cluster, on loopback: the scripts, the units, systemd and Dask are real."""

import asyncio
import os
import random
import shutil
import ssl
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from distributed import Client
from distributed.core import rpc
from distributed.security import Security
from test_terraform import TERRAFORM, command, done, needs

SYSTEMD = "/lib/systemd/systemd"
ADDRESS = ".".join(["127", *(str(random.randint(2, 250)) for _ in range(3))])
PORTS = {"scheduler": 8786, "worker": 8788, "nanny": 8789}
WORKER = f"tls://{ADDRESS}:{PORTS['worker']}"


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Two folders of certificates, of two clusters."""
    needs("openssl")
    folders = [tmp_path_factory.mktemp("certificates") / "made" for _ in range(2)]
    for folder in folders:
        done("bash", TERRAFORM / "make_certificates.sh", folder)
    return folders


def make_home(home, certificates, **programs):
    """The home folder of a VM's user, as set_up_vm.sh leaves it, and the user's environment."""
    for folder in ("bin", "run", ".local/share"):
        (home / folder).mkdir(parents=True, mode=0o700)
    (home / ".local/share/necstlab-environment").symlink_to(sys.prefix)
    shutil.copytree(TERRAFORM, home / "necstlab-damage-segmentation/terraform")
    (home / "necstlab-damage-segmentation/only_here.py").write_text("from os import getcwd\n")
    shutil.copytree(certificates, home / ".config/necstlab-cluster")
    for name, text in programs.items():
        (home / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (home / "bin" / name).chmod(0o755)
    path = f"{home}/bin:{os.environ['PATH']}"
    return {"HOME": str(home), "XDG_RUNTIME_DIR": f"{home}/run", "USER": "root", "PATH": path}


class VM:
    """VM 0 with its services, in the home folder of a user with a systemd."""

    def __init__(self, home, certificates):
        self.code = home / "necstlab-damage-segmentation"
        self.environment = make_home(home, certificates, sudo=": loginctl is about boots, and none happens here")
        # In namespaces, so that its processes end with it. Without /run/systemd/system it does not start.
        inside = f"mount -t tmpfs run /run && mkdir -p /run/systemd/system && {SYSTEMD} --user; exit"
        namespaces = ["setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"]
        self.systemd = subprocess.Popen([*namespaces, "--mount-proc", "sh", "-c", inside], env=self.environment)
        wait_for((home / "run/systemd/private").exists)

    def inside(self, *words):
        """The output of a command that must succeed, in the namespaces."""
        (shell,) = psutil.Process(self.systemd.pid).children()
        return done("nsenter", f"--target={shell.pid}", "--mount", "--pid", *words, env=self.environment)

    def end(self):
        self.inside("systemctl", "--user", "exit")
        self.systemd.wait(timeout=60)


@pytest.fixture(scope="module")
def vm(tmp_path_factory, certificates):
    needs("unshare", "nsenter", "setpriv", "systemctl", SYSTEMD)
    if (refused := command("unshare", "--mount", "--pid", "--fork", "true")).returncode != 0:
        pytest.skip(f"no namespaces to run systemd in: {refused.stderr.strip()}")
    vm = VM(tmp_path_factory.mktemp("vm") / "home", certificates[0])
    try:
        vm.inside("bash", vm.code / "terraform/join_cluster.sh", ADDRESS, ADDRESS)
        yield vm
    finally:
        vm.end()


@pytest.fixture
def client(vm, certificates):
    files = {"tls_ca_file": str(certificates[0] / "ca.pem"), "tls_client_cert": str(certificates[0] / "vm.pem")}
    security = Security(require_encryption=True, **files)
    with Client(f"tls://{ADDRESS}:8786", security=security, timeout=60, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=60)
        yield client


def test_certificates_are_their_owners_and_as_strict_as_python_3_13_wants(certificates):
    folder = certificates[0]
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (folder, *folder.iterdir())}
    assert modes == {folder.name: "0o700", "ca.pem": "0o600", "vm.pem": "0o600"}
    done("openssl", "verify", "-x509_strict", "-CAfile", folder / "ca.pem", folder / "vm.pem")


def test_the_scheduler_and_the_worker_import_the_code(vm, client):
    worker = client.scheduler_info()["workers"][WORKER]
    assert (worker["nthreads"], worker["memory_limit"]) == (1, 0)
    assert Path(worker["local_directory"]).is_relative_to(vm.code / "tmp")
    ask = "__import__('only_here').getcwd()"
    assert client.submit(eval, ask).result(timeout=60) == client.run_on_scheduler(eval, ask) == str(vm.code)


def test_the_scheduler_forgets_a_lost_worker_after_a_minute(client):
    ttl = "__import__('dask').config.get('distributed.scheduler.worker-ttl')"
    assert client.run_on_scheduler(eval, ttl) == "60s"


def test_a_shell_of_vm_0_needs_no_arguments_to_use_the_cluster(vm):
    count = "import distributed as d; d.Client(timeout=60).wait_for_workers(1, timeout=60); print('in')"
    assert done("bash", "-lc", f'{sys.executable} -c "{count}"', env=vm.environment).splitlines()[-1] == "in"


def test_another_vm_has_a_worker_only(tmp_path, certificates):
    environment = make_home(tmp_path, certificates[0], sudo=":", systemctl='echo "$@"')
    script = tmp_path / "necstlab-damage-segmentation/terraform/join_cluster.sh"
    said = done("bash", script, "10.0.0.10", "10.0.0.11", env=environment).splitlines()
    assert said[1:3] == ["--user enable --quiet dask-worker", "--user restart dask-worker"]
    assert "VM_ADDRESS=10.0.0.11" in (tmp_path / ".config/necstlab-cluster/vm.env").read_text()
    assert "DASK_" not in done("bash", "-lc", "env", env=environment), "a job here would not be this VM's own"


def identity(server, context):
    """What a server of Dask says that it is, to a client with this SSLContext or, if it is None, with plain TCP."""

    async def ask():
        scheme, options = ("tls", {"ssl_context": context}) if context else ("tcp", {})
        async with rpc(f"{scheme}://{ADDRESS}:{PORTS[server]}", connection_args=options, timeout=5) as peer:
            return await peer.identity()

    return asyncio.run(ask())["type"].lower()


def credentials(certificates=None):
    """What a client connects with that trusts every server, as an intruder's does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if certificates:
        context.load_cert_chain(certificates / "vm.pem")
    return context


@pytest.mark.parametrize("server", PORTS)
def test_only_the_certificate_of_the_cluster_gets_in(client, certificates, server):
    assert identity(server, credentials(certificates[0])) == server
    for intruder in (credentials(), credentials(certificates[1]), None):
        with pytest.raises(OSError):
            identity(server, intruder)


def test_nothing_listens_but_on_the_vms_own_address_and_loopback(vm, client):
    connections = [c for p in psutil.Process(vm.systemd.pid).children(recursive=True) for c in p.net_connections()]
    listening = [c.laddr for c in connections if c.status == psutil.CONN_LISTEN]
    assert {tuple(address) for address in listening if address.ip != "127.0.0.1"} == {
        (ADDRESS, port) for port in PORTS.values()
    }
    assert len(listening) == len(PORTS) + 2, "not the HTTP servers of the scheduler and the worker, on 127.0.0.1"


@pytest.mark.parametrize(("signal", "ending"), [("KILL", "killed"), ("TERM", "with exit code 0")])
def test_a_worker_that_ends_comes_back(vm, client, signal, ending):
    def restarts():
        return int(vm.inside("systemctl", "--user", "show", "--value", "--property=NRestarts", "dask-worker"))

    before = client.run(os.getpid), restarts()
    vm.inside("systemctl", "--user", "kill", f"--signal={signal}", "dask-worker")
    wait_for(lambda: restarts() == before[1] + 1)
    wait_for(lambda: client.scheduler_info()["workers"] and client.run(os.getpid) != before[0])
