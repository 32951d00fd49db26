"""The services of a VM of a cluster, on loopback: the scripts, the units, systemd and Dask are real."""

import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import dask
import psutil
import pytest
from distributed import Client
from test_terraform import CODE, NAMESPACES, TERRAFORM, done, needs, needs_namespaces

SYSTEMD = "/lib/systemd/systemd"
ADDRESS = ".".join(["127", *(str(random.randint(2, 250)) for _ in range(3))])
PORTS = {"scheduler": 8786, "worker": 8788, "nanny": 8789}


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
    shutil.copytree(TERRAFORM, home / CODE / "terraform")
    (home / CODE / "only_here.py").write_text("from os import getcwd\n")
    shutil.copytree(certificates, home / ".config/necstlab-cluster")
    for name, text in programs.items():
        (home / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (home / "bin" / name).chmod(0o755)
    path = f"{home}/bin:{os.environ['PATH']}"
    return {"HOME": str(home), "XDG_RUNTIME_DIR": f"{home}/run", "USER": "root", "PATH": path}


def dask_settings(environment):
    """Dask's settings in a login shell, as dask.config.set takes them."""
    variables = (line.partition("=") for line in done("bash", "-lc", "env", env=environment).splitlines())
    return {name[5:].lower(): value for name, _, value in variables if name.startswith("DASK_")}


class VM(NamedTuple):
    """VM 0 with its services, in the home folder of a user with a systemd."""

    code: Path
    environment: dict
    namespaces: psutil.Process

    def inside(self, *words):
        """The output of a command that must succeed, in the namespaces."""
        (first,) = self.namespaces.children()
        return done("nsenter", f"--target={first.pid}", "--mount", "--pid", *words, env=self.environment)


@pytest.fixture(scope="module")
def vm(tmp_path_factory, certificates):
    needs("nsenter", "systemctl", SYSTEMD)
    needs_namespaces()
    home = tmp_path_factory.mktemp("vm") / "home"
    environment = make_home(home, certificates[0], sudo=": loginctl is about boots, and none happens here")
    # Without /run/systemd/system it does not start.
    inside = f"mount -t tmpfs run /run && mkdir -p /run/systemd/system && {SYSTEMD} --user; exit"
    with subprocess.Popen([*NAMESPACES, "--mount-proc", "sh", "-c", inside], env=environment) as systemd:
        try:
            wait_for((home / "run/systemd/private").exists)
            vm = VM(home / CODE, environment, psutil.Process(systemd.pid))
            vm.inside("bash", vm.code / "terraform/join_cluster.sh", ADDRESS, ADDRESS)
            yield vm
        finally:
            systemd.kill()


@pytest.fixture
def client(vm):
    """A client that knows only what a login shell on VM 0 tells it."""
    with dask.config.set(**dask_settings(vm.environment)), Client(timeout=60, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=60)
        yield client


def test_certificates_are_their_owners_and_as_strict_as_python_3_13_wants(certificates):
    folder = certificates[0]
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (folder, *folder.iterdir())}
    assert modes == {folder.name: "0o700", "ca.pem": "0o600", "vm.pem": "0o600"}
    done("openssl", "verify", "-x509_strict", "-CAfile", folder / "ca.pem", folder / "vm.pem")


def test_the_services_import_the_code_and_have_the_right_settings(vm, client):
    ask = "__import__('only_here').getcwd()"
    assert client.submit(eval, ask).result(timeout=60) == client.run_on_scheduler(eval, ask) == str(vm.code)
    worker = client.scheduler_info()["workers"][f"tls://{ADDRESS}:{PORTS['worker']}"]
    assert (worker["nthreads"], worker["memory_limit"]) == (1, 0)
    ttl = "__import__('dask').config.get('distributed.scheduler.worker-ttl')"
    assert client.run_on_scheduler(eval, ttl) == "60s"


def test_another_vm_has_a_worker_only(tmp_path, certificates):
    environment = make_home(tmp_path, certificates[0], sudo=":", systemctl='echo "$@"')
    said = done("bash", tmp_path / CODE / "terraform/join_cluster.sh", "10.0.0.10", "10.0.0.11", env=environment)
    assert said.splitlines()[1:3] == ["--user enable --quiet dask-worker", "--user restart dask-worker"]
    assert "VM_ADDRESS=10.0.0.11" in (tmp_path / ".config/necstlab-cluster/vm.env").read_text()
    assert not dask_settings(environment), "a job here would not be this VM's own"


def first_byte(server, certificates=None):
    """What a server of Dask sends first to a client that trusts every server, as an intruder's does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if certificates:
        context.load_cert_chain(certificates / "vm.pem")
    with socket.create_connection((ADDRESS, PORTS[server]), timeout=30) as plain, context.wrap_socket(plain) as tls:
        return tls.recv(1)


@pytest.mark.parametrize("server", PORTS)
def test_only_the_certificate_of_the_cluster_gets_in(client, certificates, server):
    assert first_byte(server, certificates[0])
    for intruders in (None, certificates[1]):
        with pytest.raises(ssl.SSLError, match="certificate required|unknown ca"):
            first_byte(server, intruders)


def test_nothing_listens_but_on_the_vms_own_address_and_loopback(vm, client):
    connections = [c for p in vm.namespaces.children(recursive=True) for c in p.net_connections()]
    listening = [c.laddr for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.ip != "127.0.0.1"]
    assert {tuple(address) for address in listening} == {(ADDRESS, port) for port in PORTS.values()}


@pytest.mark.parametrize("signal", ["KILL", "TERM"])
def test_a_worker_that_ends_comes_back(vm, client, signal):
    """Also if it ends without an error, as it does after SIGTERM, and when it has lost the scheduler."""
    before = client.run(os.getpid)
    vm.inside("systemctl", "--user", "kill", "--kill-whom=main", f"--signal={signal}", "dask-worker")
    wait_for(lambda: client.run(os.getpid, on_error="ignore") not in ({}, before))
