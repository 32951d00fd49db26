"""Several processes of the tool, one a machine: each counts a share of the images, and the chief sums the counts.

Every worker keeps one connection to the chief. What goes through it is a line of JSON, which raw bytes may follow:
signs of life with progress, numbers to sum, and why a worker ends, which the chief passes on to the others.
A connection belongs to one run: a worker that has joined never connects again, so runs cannot mix.
"""

import contextlib
import hashlib
import json
import socket
import threading
import time

import numpy as np

from errors import USAGE, PeerError, UsageError, first_line

START_SECONDS = 600  # within which all workers come
LIFE_SECONDS = 5  # between signs of life; Google's network forgets a connection that is idle for ten minutes
DEAD_SECONDS = 60  # without a sign of life, after which a worker is taken for dead
HANG_SECONDS = 1800  # without progress, after which a worker is taken to hang
WAIT_SECONDS = 60  # between lines that say for whom a sum waits
LEAVE_SECONDS = 0.4  # for the others to hear why this worker ends
PART = 2**20  # bytes of numbers in one message: other messages go between
CONTINUE = "what was counted is kept in tmp: start all workers again to continue"
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
    UsageError
    """
    try:
        config = json.loads(text or "{}")
        if not (cluster := config.get("cluster")):
            return ["localhost"], 0
        tasks = [(kind, i) for kind in ("chief", "worker") for i in range(len(cluster.get(kind, [])))]
        addresses = [cluster[kind][i] for kind, i in tasks]
        places = [_place(address) for address in addresses]
        own = (config["task"]["type"], int(config["task"]["index"]))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(f"TF_CONFIG {FORM} ({type(error).__name__}: {error})") from error
    if set(cluster) - {"chief", "worker"} or len(cluster.get("chief", [])) > 1:
        raise UsageError(f"TF_CONFIG {FORM}; beside worker, its cluster may have one chief and nothing else")
    if len(set(places)) < len(places) or not all(host and 0 < port < 2**16 for host, port in places):
        raise UsageError(f"TF_CONFIG {FORM}; each worker needs a host:port of its own")
    if own not in tasks:
        raise UsageError(f"TF_CONFIG {FORM}; {own[0]} {own[1]} is not in its cluster")
    return addresses, tasks.index(own)


class Cluster:
    """The place of this process among the workers. Where it is the only one, it connects to nothing.

    Parameters
    ----------
    addresses : list of str
        host:port of all workers, the chief first. Only the chief's is used; the others are their names.
    index : int
        Of this process; 0 is the chief.
    show : callable
        Takes a line to print.
    end : callable
        Takes the PeerError that ends the run, in a thread of the cluster's own, whatever the others are busy with;
        meant to end the process. If it returns, or there is none, what is called next raises the error.

    Attributes
    ----------
    number : int
        Of workers.
    """

    def __init__(self, addresses=("localhost",), index=0, show=print, end=None):
        self.addresses, self.index, self.number = addresses, index, len(addresses)
        self._show, self._end = show, end
        self._changed = threading.Condition()  # guards all that follows
        self._peers = {}  # by index: to the chief, the workers that are there; to a worker, the chief
        self._started = False
        self._error = None
        self._farewells = None  # threads that tell the peers that this worker ends
        self._total, self._arrived = None, 0  # of the sum that is being made, and how many bytes of it are there
        self._progress = [[0, 0]] * self.number  # images counted and to count; None: it waits for the others
        self._since = [time.monotonic()] * self.number  # the last progress

    def __str__(self):
        return self._name(self.index)

    def _name(self, index):
        return f"worker {index} ({self.addresses[index]})"

    def join(self):
        """Wait until all workers are there.

        Raises
        ------
        PeerError
        UsageError
            This is the chief, and its port cannot be used.
        """
        if self.number == 1:
            return
        self._show(f"This is {self} of {self.number}; waiting for all to come.")
        _start(self._live)
        if self.index == 0:
            self._gather()
        else:
            self._reach_chief()

    def progress(self, images, total):
        """Tell the others how many images of this worker's share are counted.

        Raises
        ------
        PeerError
            Another worker ended with an error or died.
        """
        with self._changed:
            self._note_progress(self.index, [images, total])
            if self._error:
                raise self._error

    def sum(self, numbers):
        """Sum over all workers, of which each must call this.

        Parameters
        ----------
        numbers : int64 array, shape (n,), n > 0

        Returns
        -------
        int64 array, shape (n,)

        Raises
        ------
        PeerError
        """
        if self.number == 1:
            return numbers
        with self._changed:
            self._note_progress(self.index, None)
        content = memoryview(np.ascontiguousarray(numbers, "<i8")).cast("B")
        if self.index == 0:
            with self._changed:
                self._add(content, 0, len(content))
            total = self._wait_for_total(len(content) * self.number)
            content = memoryview(total).cast("B")
        for peer in list(self._peers.values()):
            with contextlib.suppress(OSError):  # the thread that reads from it says what is wrong
                for first in range(0, len(content), PART):
                    peer.send({"first": first, "of": len(content)}, content[first : first + PART])
        if self.index > 0:
            total = self._wait_for_total(len(content))
        with self._changed:
            self._note_progress(self.index, [0, 0])
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
        UsageError
            Which worker has another key than the chief.
        """
        numbers = np.zeros(self.number + 1, np.int64)
        numbers[self.index] = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
        numbers[-1] = flag and self.index == 0
        *keys, flag = self.sum(numbers)
        if others := [self._name(i) for i, key in enumerate(keys) if key != keys[0]]:
            raise UsageError(
                f"{', '.join(others)} has other arguments, or finds other objects in its bucket, than the chief: start "
                "all workers with the same command, on one gs:// bucket or one shared directory"
            )
        return bool(flag)

    def leave(self, error=None):
        """Tell the others that this worker ends, in LEAVE_SECONDS at most; any thread may call this at any time.

        Parameters
        ----------
        error : (int, str)
            The exit code with which all are to end, and why; None: its work is done.
        """
        self._bid_farewell({"error": error} if error else {"done": True})
        deadline = time.monotonic() + LEAVE_SECONDS
        for thread in self._farewells:
            thread.join(max(0, deadline - time.monotonic()))

    def _gather(self):
        """The chief: wait until all workers are there."""
        try:
            server = _server(self.addresses[0])
        except OSError as error:
            raise UsageError(
                f"{self} cannot listen at its port ({error.strerror or error}): end what uses it, an earlier run of "
                "this tool perhaps, or name another port in every TF_CONFIG"
            ) from error
        _start(self._accept, server)
        with self._changed:
            self._changed.wait_for(lambda: self._error or len(self._peers) == self.number - 1, START_SECONDS)
            if self._error:
                raise self._error
            if missing := [self._name(i) for i in range(1, self.number) if i not in self._peers]:
                raise PeerError(f"not all workers came within {START_SECONDS} s: {', '.join(missing)} did not")
            self._started = True
            self._since = [time.monotonic()] * self.number
        for peer in list(self._peers.values()):
            with contextlib.suppress(OSError):
                peer.send({"start": True})

    def _reach_chief(self):
        """A worker: wait until the chief is there, and says that all are."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            trouble = f"does not let this worker in: its TF_CONFIG differs, or it has a worker {self.index} already"
            try:
                peer = _Peer(socket.create_connection(_place(self.addresses[0]), timeout=5))
                peer.send({"worker": self.index, "of": self.number})
                with self._changed:
                    self._peers[0] = peer
                _start(self._listen_to, peer, 0)
            except OSError as error:
                trouble = f"does not answer ({error.strerror or error})"
            with self._changed:
                self._changed.wait_for(lambda: self._error or self._started or not self._peers)
                if self._error:
                    raise self._error
                if self._started:
                    return
            time.sleep(0.2)
        raise PeerError(f"not all workers came within {START_SECONDS} s: {self._name(0)} {trouble}")

    def _wait_for_total(self, size):
        """The sum, once as many bytes of it have arrived."""

        def arrived():
            with self._changed:
                return self._changed.wait_for(lambda: self._error or self._arrived == size, WAIT_SECONDS)

        while not arrived():
            self._show(f"Waiting for {self._who_counts() or 'the sum'}.")
        with self._changed:
            if self._error:
                raise self._error
            total, self._total, self._arrived = self._total, None, 0
        return total

    def _who_counts(self):
        counting = [(i, *progress) for i, progress in enumerate(self._progress) if progress and i != self.index]
        return ", ".join(
            self._name(i) + f": {images:,} of {total:,} images" * (total > 0) for i, images, total in counting
        )

    def _add(self, content, first, size):
        """Add a part of the numbers to sum, which begins at this byte."""
        if self._total is None:
            self._total = np.zeros(size // 8, "<i8")
        if self._total.nbytes != size:
            raise ValueError(f"{size} bytes to sum, not {self._total.nbytes}")
        self._total[first // 8 : (first + len(content)) // 8] += np.frombuffer(content, "<i8")
        self._arrived += len(content)

    def _note_progress(self, index, progress):
        if progress is None or progress != self._progress[index]:
            self._progress[index], self._since[index] = progress, time.monotonic()

    # All that follows runs in threads of its own.

    def _accept(self, server):
        while True:
            with contextlib.suppress(OSError):
                _start(self._welcome, _Peer(server.accept()[0]))

    def _welcome(self, peer):
        """The chief: let a worker in, if its place is free. If not, it tries again, until what had died is missed."""
        try:
            hello, _ = peer.receive()
            index, number = hello["worker"], hello["of"]
            if number != self.number:
                peer.send({"error": (USAGE, f"TF_CONFIG names {number} workers here, and {self.number} to the chief")})
            with self._changed:
                free = not self._started and number == self.number and index in range(1, number)
                free = free and self._peers.setdefault(index, peer) is peer
                self._changed.notify_all()
        except (OSError, ValueError, KeyError, TypeError):
            free = False  # it is none of ours
        if free:
            self._listen_to(peer, index)
        peer.close()

    def _listen_to(self, peer, index):
        """Take what a peer sends, until it ends."""
        try:
            while True:
                message, content = peer.receive()
                if "error" in message:
                    code, text = message["error"]
                    raise PeerError(text, code)
                with self._changed:
                    if "done" in message:
                        del self._peers[index]
                        return
                    self._take(message, content, index)
                    self._changed.notify_all()
        except PeerError as ending:
            error = ending
        except Exception as reason:  # whatever it is, this thread must not end silently
            error = PeerError(f"{self._name(index)} died or cannot be reached ({first_line(reason)}); {CONTINUE}")
            with self._changed:
                if not self._started:  # it may come again
                    del self._peers[index]
                    self._changed.notify_all()
                    return
        finally:
            peer.close()
        self._fail(error)

    def _take(self, message, content, index):
        if "start" in message:
            self._started = True
        elif "first" in message:
            self._add(content, message["first"], message["of"])
        elif self.index == 0:
            self._note_progress(index, message["progress"])
        else:
            own, self._progress = self._progress[self.index], message["progress"]
            self._progress[self.index] = own

    def _live(self):
        """Give signs of life, and, as the chief, look who gives none of progress."""
        while self._farewells is None:
            with self._changed:
                peers = dict(self._peers)
                progress = self._progress[:] if self.index == 0 else self._progress[self.index]
                late = time.monotonic() - HANG_SECONDS
                running = (0, *peers) if self.index == 0 and self._started and peers else ()
                hung = [i for i in running if self._progress[i] and self._since[i] < late]
            for peer in peers.values():
                with contextlib.suppress(OSError):
                    peer.send({"progress": progress}, wait=False)
            if hung:
                self._fail(
                    PeerError(
                        f"{self._name(hung[0])} hangs: it is alive, but has made no progress for "
                        f"{HANG_SECONDS / 60:g} minutes; {CONTINUE}"
                    )
                )
            time.sleep(LIFE_SECONDS)

    def _fail(self, error):
        """End with an error, and all others with it."""
        if self._bid_farewell({"error": (error.exit_code, str(error))}):
            self.leave()  # returns when the others have heard it: this process may end at once
            if self._end:
                self._end(error)
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _bid_farewell(self, message):
        """Send the last message to every peer; False if there was a last one before."""
        with self._changed:
            if self._farewells is not None:
                return False
            self._farewells = [_start(peer.send_last, message) for peer in self._peers.values()]
            return True


class _Peer:
    """A connection to another worker."""

    def __init__(self, connection):
        connection.settimeout(DEAD_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._file = connection, connection.makefile("rb")
        self._sending = threading.Lock()
        self._closed = threading.Event()

    def send(self, message, content=b"", wait=True):
        """Send a message; without `wait`, not while another thread sends one: that is a sign of life as well."""
        if self._sending.acquire(blocking=wait):
            try:
                self._socket.sendall(json.dumps({**message, "bytes": len(content)}).encode() + b"\n")
                self._socket.sendall(content)
            except OSError:
                self.close()  # nothing may follow a part of a message
                raise
            finally:
                self._sending.release()

    def send_last(self, message):
        with contextlib.suppress(OSError):
            self.send(message)
            self._socket.shutdown(socket.SHUT_WR)
            self._closed.wait(LEAVE_SECONDS)  # if this process ended with something unread, the message might be lost

    def receive(self):
        """The next message and the bytes that follow it."""
        line = self._file.readline(2**16)
        if not line.endswith(b"\n"):
            raise ConnectionError("its connection ended")
        message = json.loads(line)
        content = self._file.read(message["bytes"])
        if len(content) < message["bytes"]:
            raise ConnectionError("its connection ended")
        return message, content

    def close(self):
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads; `close` would not
        self._closed.set()


def _start(target, *arguments):
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def _place(address):
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _server(address):
    """A socket that listens at this machine's port; at all its addresses, as its own name may mean loopback to it."""
    host, port = _place(address)
    if host in ("localhost", "127.0.0.1"):
        return socket.create_server((host, port))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))
