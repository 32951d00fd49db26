"""Several processes of the tool, one per machine: each counts a share of the images, and the chief sums the counts.

Every worker keeps one connection to the chief. A message is a line of JSON, and raw bytes may follow it. Messages are
signs of life with the progress, numbers to sum, and why a worker ends, which the chief passes on to the others.
A connection belongs to one run: a worker that has joined never connects again, so two runs cannot mix.
"""

import collections
import contextlib
import hashlib
import json
import socket
import threading
import time

import numpy as np

from errors import USAGE, PeerError, UsageError, first_line

START_SECONDS = 600  # all workers must be there within this time
LIFE_SECONDS = 5  # between signs of life; Google's network forgets a connection that is idle for ten minutes
DEAD_SECONDS = 60  # a worker without a sign of life for this time is taken for dead
HANG_SECONDS = 1800  # a worker without progress for this time is said to hang
WAIT_SECONDS = 60  # between lines that say which workers a sum waits for
LEAVE_SECONDS = 0.4  # at most, to tell the others why this worker ends
PART = 2**20  # bytes of numbers in one message: signs of life can be sent between two of these
CONTINUE = "what was counted is kept in tmp: start all workers again to continue"
FORM = 'must be like {"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'


def read_tf_config(text):
    """Read the cluster from TF_CONFIG.

    Parameters
    ----------
    text : str or None
        JSON as TensorFlow defines it. If the cluster names no "chief", worker 0 is the chief. If the text is empty or
        None, or has no cluster, this process is the only one.

    Returns
    -------
    addresses : list of str
        host:port of all workers, the chief first; ["localhost"] if this process is the only one.
    index : int
        The position of this process among them.

    Raises
    ------
    UsageError
        The text does not have this form.
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
        raise UsageError(f"TF_CONFIG {FORM}; each worker needs a valid host:port that no other has")
    if own not in tasks:
        raise UsageError(f"TF_CONFIG {FORM}; {own[0]} {own[1]} is not in its cluster")
    return addresses, tasks.index(own)


class Cluster:
    """The connections of this process to the other workers; none if it is the only one.

    Parameters
    ----------
    addresses : list of str
        host:port of all workers, the chief first. Connections are made to the chief's only; the others serve as names.
    index : int
        The position of this process among them; 0 is the chief.
    show : callable
        Takes a line to print.
    end : callable or None
        Is called with the PeerError that ends the run, in one of the cluster's threads, and should end the process. The
        method that is running, or is called next, raises the error too.

    Attributes
    ----------
    number : int
        Number of workers.
    """

    def __init__(self, addresses=("localhost",), index=0, show=print, end=None):
        self.addresses, self.index, self.number = addresses, index, len(addresses)
        self._show, self._end = show, end
        self._changed = threading.Condition()  # guards all attributes below
        self._peers = {}  # by index: on the chief the workers that are there, on a worker the chief
        self._started = False
        self._error = None
        self._farewells = None  # threads that tell the peers that this worker ends
        self._total, self._arrived = None, 0  # the sum so far, and the number of bytes that were added to it
        self._totals = collections.deque()  # whole sums that wait to be taken: the chief may send two in a row
        self._progress = [[0, 0]] * self.number  # images counted and to count; None while it waits for the others
        self._since = [time.monotonic()] * self.number  # the time of the last progress

    def __str__(self):
        return self._name(self.index)

    def _name(self, index):
        return f"worker {index} ({self.addresses[index]})"

    def join(self):
        """Wait until all workers are there.

        Raises
        ------
        PeerError
            A worker did not come in time, or has another TF_CONFIG.
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
        """Note how many images of this worker's share are counted; the others learn it with the next sign of life.

        Parameters
        ----------
        images, total : int
            The number of images counted, and the number in the share.

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
        """Sum numbers over all workers. Each worker must call this.

        Parameters
        ----------
        numbers : int64 array, shape (n,), n > 0

        Returns
        -------
        int64 array, shape (n,)

        Raises
        ------
        PeerError
            Another worker ended with an error or died.
        """
        if self.number == 1:
            return numbers
        content = memoryview(np.ascontiguousarray(numbers, "<i8")).cast("B")
        if self.index == 0:
            with self._changed:
                self._add(content, 0, len(content))
            total = self._wait_for_total()
            self._send(memoryview(total).cast("B"))
        else:
            self._send(content)
            total = self._wait_for_total()
        return total

    def from_chief(self, make, kind):
        """Make a list on the chief only, and give it to all. Each worker must call this.

        Parameters
        ----------
        make : callable
            Is called on the chief only. It returns a list of `kind`.
        kind : NamedTuple class
            Its fields are values that JSON can hold.

        Returns
        -------
        list of `kind`

        Raises
        ------
        PeerError
            Another worker ended with an error or died.
        """
        if self.index > 0:
            return [kind(*fields) for fields in json.loads(self._wait_for_total().tobytes())]
        made = make()
        if self.number > 1:
            text = json.dumps(made).encode()
            text += b" " * (-len(text) % 8)  # it is sent like the numbers of a sum, which have 8 bytes
            self._send(memoryview(text))
        return made

    def agree(self, key, flag=False):
        """Check that all workers are about to do the same. Each worker must call this.

        Parameters
        ----------
        key : str
            Text that must be the same for all workers.
        flag : bool
            Only the chief's is used.

        Returns
        -------
        bool
            The chief's flag.

        Raises
        ------
        UsageError
            A worker has another key than the chief; the message names it.
        PeerError
            Another worker ended with an error or died.
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
        """Tell the others that this worker ends. Takes at most LEAVE_SECONDS; any thread may call it at any time.

        Parameters
        ----------
        error : (int, str)
            The exit code with which all workers are to end, and the message. None if the work of this one is done.
        """
        self._bid_farewell({"error": error} if error else {"done": True})
        deadline = time.monotonic() + LEAVE_SECONDS
        for thread in self._farewells:
            thread.join(max(0, deadline - time.monotonic()))

    def _gather(self):
        """On the chief: wait until all workers are there."""
        try:
            server = _server(self.addresses[0])
        except OSError as error:
            raise UsageError(
                f"{self} cannot listen at its port ({error.strerror or error}): end the process that uses it, perhaps "
                "an earlier run of this tool, or name another port in every TF_CONFIG"
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
        """On a worker: wait until the chief says that all workers are there."""
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

    def _send(self, content):
        """Send numbers to all peers."""
        for peer in list(self._peers.values()):
            with contextlib.suppress(OSError):  # the thread that reads from this peer reports the error
                for first in range(0, len(content), PART):
                    peer.send({"first": first, "of": len(content)}, content[first : first + PART])

    def _wait_for_total(self):
        """Wait until a sum is whole, and take it."""
        with self._changed:
            self._note_progress(self.index, None)
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._error or self._totals, WAIT_SECONDS):
                    if self._error:
                        raise self._error
                    self._note_progress(self.index, [0, 0])
                    return self._totals.popleft()
            self._show(f"Waiting for {self._who_counts() or 'the sum'}.")

    def _who_counts(self):
        counting = [(i, *progress) for i, progress in enumerate(self._progress) if progress and i != self.index]
        return ", ".join(
            self._name(i) + f": {images:,} of {total:,} images" * (total > 0) for i, images, total in counting
        )

    def _add(self, content, first, size):
        """Add a part of one worker's numbers, which begins at byte `first` of `size`, to the sum."""
        if self._total is None:
            self._total = np.zeros(size // 8, "<i8")
        if self._total.nbytes != size:
            raise ValueError(f"{size} bytes to sum, not {self._total.nbytes}")
        self._total[first // 8 : (first + len(content)) // 8] += np.frombuffer(content, "<i8")
        self._arrived += len(content)
        if self._arrived == size * (self.number if self.index == 0 else 1):  # the chief sums, the others hear the sum
            self._totals.append(self._total)
            self._total, self._arrived = None, 0

    def _note_progress(self, index, progress):
        if progress is None or progress != self._progress[index]:
            self._progress[index], self._since[index] = progress, time.monotonic()

    # The methods below run in the cluster's threads.

    def _accept(self, server):
        while True:
            with contextlib.suppress(OSError):
                _start(self._welcome, _Peer(server.accept()[0]))

    def _welcome(self, peer):
        """On the chief: accept a worker if its place is free.

        If it is not, the worker tries again: a dead process may have the place until its death is noticed.
        """
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
            free = False  # not a worker of this tool
        if free:
            self._listen_to(peer, index)
        peer.close()

    def _listen_to(self, peer, index):
        """Handle the messages of a peer until its connection ends."""
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
        except Exception as reason:  # any: this thread must not end without a report
            error = PeerError(f"{self._name(index)} died or cannot be reached ({first_line(reason)}); {CONTINUE}")
            with self._changed:
                if not self._started:  # it may connect again
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
        """Send signs of life; on the chief, also look for workers that make no progress."""
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
        """End this worker with an error, after telling the others."""
        if self._bid_farewell({"error": (error.exit_code, str(error))}):
            self.leave()  # returns when the others have heard it: this process may end at once
            with self._changed:
                self._error = error
                self._changed.notify_all()
            if self._end:
                self._end(error)

    def _bid_farewell(self, message):
        """Start to send every peer a last message; returns False if one was sent before."""
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
        """Send a message; without `wait`, only if no other thread is sending: that is a sign of life too."""
        if self._sending.acquire(blocking=wait):
            try:
                self._socket.sendall(json.dumps({**message, "bytes": len(content)}).encode() + b"\n")
                self._socket.sendall(content)
            except OSError:
                self.close()  # the peer could not read what follows half a message
                raise
            finally:
                self._sending.release()

    def send_last(self, message):
        with contextlib.suppress(OSError):
            self.send(message)
            self._socket.shutdown(socket.SHUT_WR)
            self._closed.wait(LEAVE_SECONDS)  # the message could be lost if this process ended with unread data

    def receive(self):
        """Wait for the next message; returns it and the bytes that follow it."""
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
    """A socket that listens at the port, at all addresses: a machine may resolve its host name to loopback."""
    host, port = _place(address)
    if host in ("localhost", "127.0.0.1"):
        return socket.create_server((host, port))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))
