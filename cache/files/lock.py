"""The owner lock: one process at a time writes an output, and a second writer is told who holds it.

A lock is one small object that says who holds it (host, process, since when). Its holder touches it
every ``BEAT`` seconds. A holder on this machine that has ended loses it to the next writer. About a
holder on another machine only the age of its last touch is known: if recent, it is alive; if old, a
user may break the lock. ``Locks`` is what a lock needs from the place that stores it: files here
(``lock_files.py``), conditional puts in an object store.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Protocol

from dspark.cache.errors import LockedError, LostLockError, StoreWriteError

BEAT = 15.0  # seconds between two touches
# seconds without a touch after which a holder elsewhere may be taken for dead: NFS shows a file's
# times up to 60 s late
OLD = 120.0
BREAK = "--break-lock"


@dataclass(frozen=True, slots=True)
class Found:
    """A lock as it was found: its bytes, seconds since its last touch by the clock of the place,
    and what ``swap`` compares.
    """

    data: bytes
    age: float
    version: str


class Locks(Protocol):
    """Small objects that are created and replaced conditionally. Errors of the place itself are
    OSError or StoreWriteError.
    """

    def create(self, name: str, data: bytes) -> str | None:
        """Create ``name`` atomically; returns its version, None if it exists already."""
        ...

    def read(self, name: str) -> Found | None: ...
    def swap(self, name: str, version: str, data: bytes) -> str | None:
        """Replace ``name`` if it still has ``version``; returns the new version, None if it has
        changed.
        """
        ...

    def touch(self, name: str, version: str) -> str | None:
        """Set its age to 0 if it still has ``version``; returns the new version, None if it has
        changed.
        """
        ...

    def remove(self, name: str, version: str) -> None:
        """Delete it if it still has ``version``."""
        ...


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a lock. ``machine``: the kernel and pid namespace of ``pid``; ``started``: when the
    process began, since ids are reused.
    """

    who: str
    host: str
    machine: str
    pid: int
    started: str
    since: str
    token: str

    @classmethod
    def here(cls, who: str) -> Owner:
        """Describe this process, as ``who`` (the name of the command)."""
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return cls(
            who,
            socket.gethostname(),
            machine(),
            os.getpid(),
            started(os.getpid()) or "",
            since,
            secrets.token_hex(8),
        )

    @classmethod
    def read(cls, data: bytes) -> Owner | None:
        """Return the owner that ``data`` names; None if it is not the content of a lock."""
        try:
            found = json.loads(data)
            kinds = {f.name: int if f.name == "pid" else str for f in fields(cls)}
            if isinstance(found, dict) and all(
                type(found.get(n)) is kind for n, kind in kinds.items()
            ):
                return cls(**{name: found[name] for name in kinds})
        except (ValueError, RecursionError):
            pass
        return None

    def gone(self) -> bool:
        """Tell whether the process is known to have ended: it ran on this machine."""
        return self.machine == machine() and started(self.pid) != self.started

    def words(self) -> str:
        """Describe who and where, for a message."""
        return f"{self.who} (host {self.host}, pid {self.pid}, since {self.since})"


@cache
def machine() -> str:
    """Return what distinguishes process ids of this machine from those of any other: host, boot and
    pid namespace.
    """
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def started(pid: int) -> str | None:
    """Return when process ``pid`` began, in kernel ticks since boot; None if there is none, or if
    it is a zombie.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    except OSError:
        if os.path.exists("/proc/self/stat"):
            return None
    try:  # a system without /proc: all that is known is that the id is in use
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


class Lock:
    """A held lock; ends with ``release``, or as a context manager. ``check`` raises LostLockError
    once another process has it.
    """

    def __init__(self, where: Locks, name: str, of: str, owner: Owner, version: str) -> None:
        self.owner, self._where, self._name, self._of = owner, where, name, of
        self._version: str | None = version
        self._end, self._touching = threading.Event(), threading.Lock()
        self._beat = threading.Thread(target=self._beats, name="dspark-lock", daemon=True)
        self._beat.start()

    def _beats(self) -> None:
        while not self._end.wait(BEAT):
            self._touch()

    def _touch(self) -> None:
        """Show that we are alive. A lock that cannot be reached now may be later; a lock taken by
        another process stays lost.
        """
        # One at a time: a touch may change the version that the next one relies on.
        with self._touching:
            if self._version is None:
                return
            with suppress(OSError, StoreWriteError):
                self._version = self._where.touch(self._name, self._version)

    def check(self) -> None:
        """Raise LostLockError if the lock is not ours any more."""
        self._touch()
        if self._version is None:
            raise LostLockError(
                f"{self._of}: this process lost its lock, and another process may be writing "
                "there. This one writes nothing more."
            )

    def release(self) -> None:
        """Release the lock. A forked child that inherited it does nothing."""
        if os.getpid() != self.owner.pid or self._end.is_set():
            return
        self._end.set()
        self._beat.join()
        if self._version is not None:
            with suppress(OSError, StoreWriteError):
                self._where.remove(self._name, self._version)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def take(
    where: Locks, name: str, owner: Owner, *, of: str, break_lock: bool = False
) -> Lock | Refused:
    """Take the lock ``name`` for ``owner``, or return who has it. ``of``: what it guards, for
    messages.
    """
    data = json.dumps(asdict(owner)).encode()
    for _ in range(20):  # each time another writer was quicker
        version = where.create(name, data)
        if version is not None:
            return Lock(where, name, of, owner, version)
        found = where.read(name)
        if found is None:
            continue  # released in between
        holder = Owner.read(found.data)
        if not (holder and holder.gone()):
            old = found.age >= OLD and not (holder and holder.machine == machine())
            if not (old and break_lock):
                return Refused(of, holder, found.age, breakable=old)
        version = where.swap(name, found.version, data)
        if version is not None:
            return Lock(where, name, of, owner, version)
    return Refused(of, None, 0.0, breakable=False)


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a lock could not be taken. ``holder`` is None if unknown; ``age`` in seconds;
    ``breakable``: a user may break it.
    """

    of: str
    holder: Owner | None
    age: float
    breakable: bool

    def error(self) -> LockedError:
        """Return the error for the second writer."""
        who = self.holder.words() if self.holder else "another process"
        if self.breakable:
            return LockedError(
                f"{self.of} is locked by {who}, whose last sign of life was {self.age:.0f} s "
                f"ago. If that process is dead, give {BREAK}."
            )
        return LockedError(
            f"{self.of} is being written by {who}; wait for it to end, or choose another output."
        )


def hold(
    where: Locks, name: str, who: str, *, of: str, break_lock: bool = False, wait: float = 0.0
) -> Lock:
    """Take the lock ``name`` as ``who``, waiting up to ``wait`` seconds for it. Raises LockedError,
    saying who has it.
    """
    owner, until = Owner.here(who), time.monotonic() + wait
    while True:
        got = take(where, name, owner, of=of, break_lock=break_lock)
        if isinstance(got, Lock):
            return got
        if time.monotonic() >= until:
            raise got.error()
        time.sleep(min(0.5, max(until - time.monotonic(), 0.0)))
