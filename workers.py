"""Several processes of the tool, one a machine: each counts a share of the images, and the shares are summed once.

TensorFlow's engine for several workers sums, and its coordination service knows who is alive. They run in a process
of their own beside the one that counts (`python workers.py`): TensorFlow waits without limit, and deaf to signals,
for a worker that never comes, and a process can be ended. It needs no GPU.
"""

import contextlib
import ctypes
import hashlib
import json
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from errors import WORKER_LOST, PeerError, first_line

START_SECONDS = 600  # within which all workers come
DEAD_SECONDS = 60  # without a sign of life, after which a worker is taken for dead
LINGER_SECONDS = 2  # for which one that ends can still be asked for its part of a sum, or why it ends
FORM = 'must be like {"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'


def read_tf_config(text):
    """The cluster of which TF_CONFIG tells.

    Parameters
    ----------
    text : str
        JSON of TensorFlow's form. Where the cluster names no "chief", worker 0 is it. Empty, or without a cluster:
        this process is alone.

    Returns
    -------
    addresses : list of str
        Of all workers, the chief first.
    index : int
        Of this process among them.

    Raises
    ------
    ValueError
    """
    try:
        config = json.loads(text or "{}")
        if not (cluster := config.get("cluster")):
            return ["localhost"], 0
        tasks = [(kind, i) for kind in ("chief", "worker") for i in range(len(cluster.get(kind, [])))]
        addresses = [cluster[kind][i] for kind, i in tasks]
        places = [(host, int(port)) for host, _, port in (address.rpartition(":") for address in addresses)]
        own = (config["task"]["type"], int(config["task"]["index"]))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{FORM} ({type(error).__name__}: {error})") from error
    if set(cluster) - {"chief", "worker"} or len(cluster.get("chief", [])) > 1:
        raise ValueError(f"{FORM}; beside worker, its cluster may have one chief and nothing else")
    if len(set(places)) < len(places) or not all(host and 0 < port < 2**16 for host, port in places):
        raise ValueError(f"{FORM}; each worker needs a host:port of its own")
    if own not in tasks:
        raise ValueError(f"{FORM}; {own[0]} {own[1]} is not in its cluster")
    return addresses, tasks.index(own)


CONTINUE = "start all workers again to continue"


def read_cluster(text):
    return Cluster(*read_tf_config(text))


class Cluster:
    """The place of this process among the workers. Alone, it starts nothing and its sums are its own numbers.

    Attributes
    ----------
    number : int
        Of workers.
    index : int
        Of this process; 0 is the chief.
    """

    def __init__(self, addresses=("localhost",), index=0):
        self.addresses, self.index, self.number = addresses, index, len(addresses)
        self._process = None
        self._joined = False

    def __str__(self):
        return describe(self.index, self.addresses)

    def join(self):
        """Wait until all workers are there.

        Raises
        ------
        PeerError
        """
        if self.number == 1:
            return
        self._connection, theirs = multiprocessing.connection.Pipe()
        fd = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(fd), str(self.index), *self.addresses],
            pass_fds=[fd],
            start_new_session=True,  # Ctrl-C is for the tool, which tells the others
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        self._heard = time.monotonic()
        self._listen(START_SECONDS)
        if not self._joined:
            raise PeerError(f"not all workers came within {START_SECONDS} s{self._absent()}")

    def _absent(self):
        """Which workers do not answer, as the end of a sentence."""
        absent = []
        for index, address in enumerate(self.addresses):
            host, _, port = address.rpartition(":")
            if index != self.index:
                try:
                    socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
                except OSError as error:
                    absent.append(f"{describe(index, self.addresses)} does not answer ({error.strerror or error})")
        return "".join(f"; {line}" for line in absent)

    def _listen(self, seconds):
        """What the process beside this one says, waiting so many seconds: a sum, or None."""
        try:
            while self._connection.poll(seconds):
                error, total = self._connection.recv()
                if error:
                    raise PeerError(error[1] if self._joined else error[1] + self._absent(), error[0])
                self._heard, self._joined, seconds = time.monotonic(), True, 0
                if total is not None:
                    return total
        except (EOFError, OSError) as error:
            raise PeerError(f"{self} lost its process that speaks with the other workers") from error
        if self._joined and time.monotonic() - self._heard > DEAD_SECONDS:
            raise PeerError(_dead(0, self.addresses))
        return None

    def check(self):
        """Raise PeerError if another worker ended with an error or died."""
        if self.number > 1:
            self._listen(0)

    def sum(self, numbers):
        """Sum over all workers, of which each must call this.

        Parameters
        ----------
        numbers : int64 array, shape (n,)

        Returns
        -------
        int64 array, shape (n,)

        Raises
        ------
        PeerError
        """
        if self.number == 1:
            return numbers
        self.check()
        self._connection.send(numbers)
        while (total := self._listen(1)) is None:
            pass
        return total

    def agree(self, key, flag):
        """Compare what each worker is about to do.

        Parameters
        ----------
        key : str
            Which all must have alike.
        flag : bool

        Returns
        -------
        bool
            The flag of the chief.

        Raises
        ------
        ValueError
            Which worker has another key than the chief.
        """
        numbers = np.zeros(self.number + 1, np.int64)
        numbers[self.index] = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
        numbers[-1] = flag and self.index == 0
        *keys, flag = self.sum(numbers)
        if others := [describe(i, self.addresses) for i, key in enumerate(keys) if key != keys[0]]:
            raise ValueError(
                f"{', '.join(others)} has other arguments, or finds other objects in its bucket, than the chief: start "
                "all workers with the same command, on one gs:// bucket or one shared directory"
            )
        return bool(flag)

    def leave(self, error=None):
        """End the process beside this one, after it has told the others of an error (exit code, message)."""
        if self._process and self._joined:
            # It waits to be heard before it listens; what it says may have been cut by an interruption.
            threading.Thread(target=self._discard, daemon=True).start()
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._connection.send(error)
                self._process.wait(3 * LINGER_SECONDS)
        if self._process:
            self._process.kill()

    def _discard(self):
        with contextlib.suppress(OSError):
            while os.read(self._connection.fileno(), 2**16):
                pass


def describe(index, addresses):
    return f"worker {index} ({addresses[index]})"


def _dead(index, addresses):
    return (
        f"{describe(index, addresses)} died or cannot be reached; what was counted is kept in tmp: "
        "start all workers again to go on"
    )


# ---------------------------------------------------------------------------------------------------------------
# The process beside the one that counts


def _join(index, addresses):
    """Become a worker of TensorFlow's; returns a function that sums over all, and TensorFlow's context."""
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})
    import tensorflow as tf
    from tensorflow.compiler.xla.tsl.protobuf.coordination_config_pb2 import CoordinatedJob
    from tensorflow.python.eager import context

    context = context.context()
    context.configure_coordination_service(
        "standalone",
        service_leader="/job:worker/replica:0/task:0",
        cluster_register_timeout_in_ms=2000 * START_SECONDS,
        heartbeat_timeout_in_ms=1000 * DEAD_SECONDS,
        coordinated_jobs=[CoordinatedJob(name="worker", num_tasks=len(addresses))],
    )
    strategy = tf.distribute.MultiWorkerMirroredStrategy()

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.int64)])
    def add(numbers):
        def add_here(numbers):
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(numbers))

        return strategy.run(add_here, [numbers])

    return lambda numbers: add(numbers).numpy(), context


def _take_part(connection, index, addresses):
    """Send (None, None) as a sign of life, (None, sum), or (error, None), once all are there; end when told to."""
    own = describe(index, addresses)
    with contextlib.suppress(AttributeError):  # Linux: while it waits, nothing else ends it with its parent
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    try:
        add, context = _join(index, addresses)
    except Exception as error:
        connection.send(((WORKER_LOST, f"{own} cannot join the others: {first_line(error)}"), None))
        return
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, 0)

    thread, total = ThreadPoolExecutor(1), None
    try:
        while True:
            if connection.poll(0.2):
                message = connection.recv()
                if not isinstance(message, np.ndarray):
                    break
                total, asked = thread.submit(add, message), time.monotonic()
            error = _error_among_workers(context, addresses)
            ready = total and total.done() and not error
            if ready and (failure := total.exception()):
                # whose fault that is, the coordination service may know only later
                ready = time.monotonic() - asked > 2 * DEAD_SECONDS
                error = (WORKER_LOST, f"{own} cannot sum over the workers: {first_line(failure)}") if ready else None
            connection.send((error, total.result() if ready and not error else None))
            total = None if ready else total
    except (EOFError, OSError):
        message = (WORKER_LOST, _dead(index, addresses))
    if message:
        with contextlib.suppress(Exception):  # another was first
            context.report_error_to_cluster(1, json.dumps(message))
    time.sleep(LINGER_SECONDS)


def _error_among_workers(context, addresses):
    """Exit code and message that a worker told to all or that its silence means; None if all is well."""
    try:
        states = context.get_task_states([("worker", len(addresses))])
    except Exception:
        return WORKER_LOST, _dead(0, addresses)
    for index, state in enumerate(states):
        if state:
            try:
                return tuple(json.loads(str(state)))
            except ValueError:
                return WORKER_LOST, _dead(index, addresses)
    return None


if __name__ == "__main__":
    _take_part(multiprocessing.connection.Connection(int(sys.argv[1])), int(sys.argv[2]), sys.argv[3:])
    os._exit(0)
