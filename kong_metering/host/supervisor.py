"""The process that Kong starts: it holds the socket that listens, and has it served, whatever becomes of the servers.

Contract: `Supervisor.run` blocks until SIGTERM, SIGINT or the parent's death, passes that on to the servers, waits for
them for `stop_timeout` and some seconds more, kills who is left then, and returns. Where a worker of a Kong has started
it, and Kong goes on without that worker, as at a reload, it leaves the servers to the next plugin server, which Kong is
starting, and returns: they serve meanwhile, however long that takes on a busy machine. It runs no plugin code, no
thread and no event loop, so that there is little that can fail; it forks from a process that has everything imported,
which takes some milliseconds. A server that ends is replaced at once: connections wait in the backlog meanwhile. So is
one whose loop has not come round at `_STILL_LOOKS` looks while somebody waited for it. Servers that die as soon as they
are started, several in a row, are started less often. It reaps whatever child it has: it may be process 1.

When it dies the servers go on until the next plugin server takes over (`lifetime.py`). When the next one takes over
while it lives it starts no more servers, and waits for its end; should the next one end first, and nobody serve, it
serves again: it keeps the socket, so that connections wait meanwhile.

Once a second it looks whether the socket's path still leads to its socket (`watch.py`). If not, and no other plugin
server answers there, it makes a new one at the path, and has the servers accept from that.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NoReturn

from kong_metering.errors import StartupError
from kong_metering.host import reexec
from kong_metering.host.attendant import Attendant
from kong_metering.host.board import Board, State
from kong_metering.host.channels import Channel, Kind
from kong_metering.host.handover import Elder, Inheritance, Sockets, Successor, process_of
from kong_metering.host.keeping import Keeping
from kong_metering.host.lifetime import ORPHANED, SIGNALS
from kong_metering.host.names import SERVER_NAME, SUPERVISOR_NAME, WATCHER_NAME, name_process
from kong_metering.host.opening import listen
from kong_metering.host.readiness import tell_ready
from kong_metering.host.station import Station
from kong_metering.host.watch import Found, PathWatch, make_way
from kong_metering.host.workers import Workers, is_living
from kong_metering.log import LOGGER, ProcessLog, cause_of, flush, trouble
from kong_metering.memoryfile import Use

if TYPE_CHECKING:
    from kong_metering.host.board import Slot
    from kong_metering.host.keeping import Lent
    from kong_metering.host.opening import Opening

_LOOK_SECONDS = 1.0
_STILL_LOOKS = 5
# A server that dies younger than this was not able to serve.
_YOUNG_SECONDS = 0.5
_PATIENT_DEATHS = 3
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0
# A server that is told to end alone is replaced; one that is told together with us, as by systemd, is not.
_ENDING_PAUSE_SECONDS = 0.02
_END_MARGIN_SECONDS = 3.0
_HEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
# Kept back while no one could act on them: between processes, and between programs.
_KEPT_BACK = (*SIGNALS, signal.SIGHUP)
_REHEARSAL_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class SupervisorOptions:
    """How many servers there are, and when all ends.

    `parent` is the process that must live on, None if none need. `kong` is the master process of the gateway that has
    started this one, if any has. `stop_timeout`: seconds that servers have to end.
    """

    servers: int = 1
    parent: int | None = None
    kong: int | None = None
    stop_timeout: float = 5.0


@dataclass
class _Server:
    """A process that serves, or did."""

    pid: int
    index: int
    started_at: float
    beats: int = -1
    still_looks: int = 0


@dataclass
class _Post:
    """A post of the servers: who has it, or when the next one is started; and what is kept for them."""

    server: _Server | None = None
    keeping: Keeping = field(default_factory=Keeping)
    due_at: float = 0.0
    young_deaths: int = 0


class Supervisor:
    """Keeps servers running; `serve` is called in each server's process, and serves until that is to end."""

    def __init__(
        self,
        opening: Opening,
        options: SupervisorOptions,
        log: ProcessLog,
        serve: Callable[[Station], None],
        watch: Callable[[Sequence[Slot], int], None] | None = None,
    ) -> None:
        """Take what each server does, and what a process beside them does with what they show, if there is to be one.

        `watch` is given the servers' slots, and the supervisor's process.
        """
        self._opening = opening
        self._options = options
        self._log = log
        self._serve = serve
        self._pid = os.getpid()
        self._posts = [_Post() for _ in range(options.servers)]
        self._board = Board(options.servers)
        self._workers = Workers(options.servers)
        slots, pid = self._board.slots, self._pid
        self._attendant = None if watch is None else Attendant(lambda: watch(slots, pid))
        self._takes_over = opening.takes_over
        # Those that serve no more, and are not gone yet.
        self._leaving: dict[int, _Server] = {}
        self._successor: Successor | None = None
        self._is_retired = False
        # The one before, which serves again should this one end, and the one after, once it serves.
        self._elder: Elder | None = None
        self._heir: Successor | None = None
        self._watch = PathWatch(opening.place.path, None)
        # Those whose servers do not know of the newest socket yet.
        self._untold: set[int] = set()
        # The program that is tried before this one is started anew, and until when.
        self._rehearsal: tuple[int, float] | None = None
        self._ends_at: float | None = None
        self._has_left = False
        self._were_some_killed = False
        self._looked_at = time.monotonic()
        self._wakes, self._woken = socket.socketpair()

    def run(self) -> None:
        """Have the place served until it is to end. Raises `StartupError`."""
        name_process(SUPERVISOR_NAME)
        _libc()  # takes longer than a server may
        _set_aside_what_lives_long()
        with self._heeding_signals():
            listener, inheritance = self._opening.take_over()
            self._watch.identity = listener.identity
            self._sockets = Sockets(listener.socket, tuple(Channel.make() for _ in self._posts), Channel.make())
            shares = self._shared_out(inheritance)
            for index in range(len(shares)):
                self._fork(index, shares)
            inheritance.close()
            self._dismiss_former()
            self._elder = self._opening.finish()
            tell_ready()
            while not self._is_over:
                self._wait()
                self._reap()
                self._read_channel()
                self._ask_successor()
                self._ask_heir()
                self._forget_elder()
                self._start_due()
                self._start_attendant()
                self._look()
        if self._attendant is not None:
            self._attendant.end()
        # One that has ended in order has said itself what it could not write.
        if self._were_some_killed and any(post.keeping.holds(Use.EVENTS) for post in self._posts):
            LOGGER.error(
                "servers that were killed may have left events in this process's memory, which end with it: there was "
                "no shared memory, and no server after them that could write"
            )
        self._log.repeats.flush()

    # -- its loop -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        """Have signals wake the loop, which looks at them; nothing else happens at them."""
        for end in (self._wakes, self._woken):
            end.setblocking(False)  # noqa: FBT003 - the standard library's signature
        signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        for number in _HEEDED:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _KEPT_BACK)
        yield
        for number in _HEEDED:
            signal.signal(number, signal.SIG_IGN if number != signal.SIGCHLD else signal.SIG_DFL)
        signal.set_wakeup_fd(-1)

    @property
    def _is_over(self) -> bool:
        return self._has_left or (self._ends_at is not None and not self._alive())

    def _alive(self) -> list[_Server]:
        return [post.server for post in self._posts if post.server is not None] + [*self._leaving.values()]

    def _wait(self) -> None:
        """Wait until something happens, or is due; and heed signals."""
        poll = select.poll()
        poll.register(self._wakes, select.POLLIN)
        if self._ends_at is None and self._sockets.supervisor is not None:
            poll.register(self._sockets.supervisor.outlet, select.POLLIN)
        for other in (self._successor, self._heir):
            if other is not None:
                poll.register(other, select.POLLIN)
        now = time.monotonic()
        moments = [self._looked_at + _LOOK_SECONDS, *([] if self._ends_at is None else [self._ends_at])]
        if self._may_start:
            moments += [post.due_at for post in self._posts if post.server is None]
        poll.poll(max(0.0, min(moments) - now) * 1000 + 1)
        with contextlib.suppress(BlockingIOError):
            for number in self._wakes.recv(4096):
                if number == signal.SIGTERM and self._is_replaced:
                    self._leave(signal.Signals(number).name)
                elif number in (signal.SIGTERM, signal.SIGINT):
                    self._end(signal.Signals(number).name)
                elif number == signal.SIGHUP:
                    self._rehearse()

    @property
    def _may_start(self) -> bool:
        return self._ends_at is None and self._successor is None and not self._is_retired

    def _start_due(self) -> None:
        now = time.monotonic()
        for index, post in enumerate(self._posts):
            if self._may_start and post.server is None and post.due_at <= now:
                self._fork(index, [])

    # -- starting -----------------------------------------------------------------------------------------------------

    def _shared_out(self, inheritance: Inheritance) -> list[Inheritance]:
        """Give each server the connections of its workers, and all what was kept for requests."""
        shares: list[list[tuple[socket.socket, bytes]]] = [[] for _ in self._posts]
        for connection, unread in inheritance.connections:
            shares[self._workers.server_of(process_of(connection))].append((connection, unread))
        return [Inheritance(tuple(share), inheritance.kept) for share in shares]

    def _fork(self, index: int, shares: Sequence[Inheritance]) -> None:
        """Start a server, which takes its share of what is left by those before."""
        post = self._posts[index]
        self._board.slots[index].clear()
        lent = post.keeping.lend()
        pid = self._forked()
        if pid is None:
            post.keeping.put_back(lent)
            post.due_at = time.monotonic() + _LONGEST_PAUSE_SECONDS
            return
        if pid == 0:
            self._be_server(index, shares, lent)
        post.keeping.lent_to(pid, lent)
        # What was to be said through Kong, the new server says.
        while self._log.relay.take() is not None:
            pass
        post.server = _Server(pid, index, time.monotonic())

    def _forked(self) -> int | None:
        """Fork with signals kept back, which the child is to heed when it can; None, said, when that cannot be."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _KEPT_BACK)
        try:
            return os.fork()
        except OSError as error:
            LOGGER.error("no process can be started: %s", cause_of(error), extra=trouble("fork"))
            return None
        finally:
            if os.getpid() == self._pid:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _KEPT_BACK)

    def _start_attendant(self) -> None:
        if self._attendant is not None and self._may_start and self._attendant.is_due:
            self._attendant.start(self._forked, self._begin_as_attendant)

    def _begin_as_attendant(self) -> None:
        self._begin_as_child(WATCHER_NAME)
        self._sockets.listener.close()
        for channel in (*self._sockets.servers, self._sockets.supervisor):
            if channel is not None:
                channel.close()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _KEPT_BACK)

    def _begin_as_child(self, name: str) -> None:
        """Let go, in a process that was just forked, of what is the supervisor's alone."""
        self._log.repeats.forget()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])
        for unneeded in (self._wakes, self._woken, self._successor, self._heir, self._elder):
            if unneeded is not None:
                unneeded.close()
        self._watch.forget()
        for post in self._posts:
            post.keeping.close()
        self._opening.leave()
        name_process(name)

    def _be_server(self, index: int, shares: Sequence[Inheritance], lent: Lent) -> NoReturn:
        status = 1
        try:
            self._begin_as_child(SERVER_NAME)
            for other, share in enumerate(shares):
                if other != index:
                    share.close()
            _be_told_of_parents_death()
            self._board.slots[index].claim()
            self._serve(self._station(index, shares[index] if shares else Inheritance(), lent))
            status = 0
        except StartupError as error:
            LOGGER.critical("cannot start: %s", error)
        except BaseException as error:  # noqa: BLE001 - what a process dies of
            LOGGER.critical("the server failed: %s", cause_of(error))
        finally:
            flush()
            os._exit(status)

    def _station(self, index: int, inheritance: Inheritance, lent: Lent) -> Station:
        return Station(
            path=self._opening.place.path,
            backlog=self._opening.place.backlog,
            sockets=self._sockets,
            slots=self._board.slots,
            workers=self._workers,
            index=index,
            supervisor=self._pid,
            kong=self._options.kong,
            takes_over=self._takes_over,
            inheritance=inheritance,
            lent=lent,
        )

    # -- ends of servers ----------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self._bury(pid, os.waitstatus_to_exitcode(status))

    def _bury(self, pid: int, code: int) -> None:
        self._were_some_killed = self._were_some_killed or code < 0
        for post in self._posts:
            post.keeping.reclaim(pid)
        if self._leaving.pop(pid, None) is not None:
            return
        if self._rehearsal is not None and self._rehearsal[0] == pid:
            self._start_anew(code)
            return
        if self._attendant is not None and self._attendant.bury(pid, code, is_missed=self._may_start):
            return
        for post in self._posts:
            server = post.server
            if server is not None and server.pid == pid:
                post.server = None
                self._mourn(post, server, code)

    def _mourn(self, post: _Post, server: _Server, code: int) -> None:
        """Say why a server has died, and when the next one is started."""
        now = time.monotonic()
        lived = now - server.started_at
        post.young_deaths = post.young_deaths + 1 if lived < _YOUNG_SECONDS else 0
        excess = post.young_deaths - _PATIENT_DEATHS
        pause = min(_FIRST_PAUSE_SECONDS * 2.0**excess, _LONGEST_PAUSE_SECONDS) if excess >= 0 else 0.0
        post.due_at = now + pause
        if not self._may_start:
            return
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        message = f"server {server.pid} {how} after {lived:.1f} s"
        if pause:
            message += f", as did {post.young_deaths - 1} before it in a row; the next one starts in {pause:g} s"
            LOGGER.error("%s", message, extra=trouble("died at once"))
        else:
            LOGGER.warning("%s; the next one takes its place", message, extra=trouble("died"))

    # -- what others say ----------------------------------------------------------------------------------------------

    def _read_channel(self) -> None:
        channel = self._sockets.supervisor
        if channel is None or self._ends_at is not None:
            return
        for message in channel.messages():
            if message.kind is Kind.RETIRE and message.socket is not None:
                self._follow(message.socket)
            elif message.socket is not None:
                message.socket.close()
        for post in self._posts:
            if post.server is not None and self._board.slots[post.server.index].state is State.ENDING:
                self._replace(post, time.monotonic() + _ENDING_PAUSE_SECONDS)

    def _replace(self, post: _Post, due_at: float) -> None:
        """Have the place of a server that serves no more taken by another one."""
        if post.server is not None:
            self._leaving[post.server.pid] = post.server
            post.server, post.due_at, post.young_deaths = None, due_at, 0

    def _follow(self, connection: socket.socket) -> None:
        """Start no more servers, until it is known whether the next plugin server serves."""
        if self._successor is not None:
            self._successor.close()
        self._successor = Successor(connection)

    def _ask_successor(self) -> None:
        successor = self._successor
        if successor is None or (is_done := successor.is_done()) is None:
            return
        self._successor = None
        if is_done:
            LOGGER.info("process %d has taken over", successor.process)
            self._heir = successor
            self._retire()
            return
        successor.close()
        LOGGER.warning("process %d did not take over after all; this one keeps serving", successor.process)
        self._replace_parted()

    def _ask_heir(self) -> None:
        heir = self._heir
        if heir is None or (gives_back := heir.gives_back()) is None:
            return
        heir.close()
        self._heir = None
        # One that was killed may have servers yet, or have a next one started by Kong: whoever looks finds out.
        if gives_back:
            self._resume(f"process {heir.process}, which had taken over, ends")

    def _forget_elder(self) -> None:
        if self._elder is not None and self._elder.is_gone:
            self._elder.close()
            self._elder = None

    def _resume(self, why: str) -> None:
        """Serve again."""
        if self._ends_at is None and self._is_retired:
            LOGGER.warning("%s; this one, process %d, serves again", why, self._pid)
            self._is_retired = False
            self._replace_parted()

    def _replace_parted(self) -> None:
        """Have the places taken again of servers that have handed over."""
        for post in self._posts:
            if post.server is not None and self._board.slots[post.server.index].state is State.PARTED:
                _tell(post.server, signal.SIGTERM)
                self._replace(post, time.monotonic())

    def _retire(self) -> None:
        """Serve no more; what the servers have is delivered until they are told to end."""
        self._is_retired = True
        if self._attendant is not None:
            self._attendant.end()
        for post in self._posts:
            if post.server is not None and self._board.slots[post.server.index].state is not State.PARTED:
                # Two processes must not serve one socket.
                LOGGER.warning("server %d did not hand over, and is killed", post.server.pid)
                _tell(post.server, signal.SIGKILL)

    # -- starting anew ------------------------------------------------------------------------------------------------

    def _rehearse(self) -> None:
        """See whether the program can be started anew; this one goes on meanwhile."""
        if not self._may_start or self._rehearsal is not None:
            LOGGER.info("SIGHUP changes nothing now: another process has taken over, or is about to")
            return
        try:
            self._rehearsal = reexec.rehearse(), time.monotonic() + _REHEARSAL_SECONDS
        except OSError as error:
            LOGGER.error("the program cannot be restarted, this one keeps running: %s", cause_of(error))

    def _start_anew(self, code: int) -> None:
        """Start the program anew in this process, if the rehearsal went well; its servers take over from ours."""
        self._rehearsal = None
        if code != 0:
            LOGGER.error("the program cannot be restarted, it ended with status %d; this one keeps running", code)
            return
        if not self._may_start:
            return
        LOGGER.info("restarting")
        if self._attendant is not None:
            self._attendant.end()
        ends = [end.fileno() for channel in self._sockets.servers for end in (channel.inlet, channel.outlet)]
        servers = [0 if post.server is None else post.server.pid for post in self._posts]
        flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, _KEPT_BACK)
        self._keep_back_what_came()
        try:
            reexec.Restart(self._pid, self._sockets.listener.fileno(), ends, servers, list(self._leaving)).start()
        except OSError as error:
            LOGGER.error("the program could not be restarted, this one keeps running: %s", cause_of(error))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _KEPT_BACK)

    def _keep_back_what_came(self) -> None:
        """Have signals that came in the last moment come once more, to the program that is started anew."""
        with contextlib.suppress(BlockingIOError):
            for number in self._wakes.recv(4096):
                if number in _KEPT_BACK:
                    os.kill(self._pid, number)

    def _dismiss_former(self) -> None:
        """Have the servers end that this process has started before it was started anew."""
        former = self._opening.restart
        if former is None:
            return
        now = time.monotonic()
        for index, pid in enumerate(former.servers):
            if pid:
                server = self._leaving[pid] = _Server(pid, index, now)
                # One that did not hand over must not go on with a socket that others serve.
                _tell(server, signal.SIGKILL if index in self._opening.silent else signal.SIGTERM)
        self._leaving.update({pid: _Server(pid, 0, now) for pid in former.leaving})

    # -- looking ------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Once a second: see whether everybody does what they should. Looks count, not time: machines are suspended."""
        now = time.monotonic()
        if self._ends_at is not None and now >= self._ends_at:
            for server in self._alive():
                LOGGER.warning("server %d did not end in time, and is killed", server.pid)
                _tell(server, signal.SIGKILL)
            self._ends_at = now + _END_MARGIN_SECONDS
        if self._rehearsal is not None and now >= self._rehearsal[1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._rehearsal[0], signal.SIGKILL)
        if now - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = now
        self._log.repeats.summarise()
        if self._options.parent is not None and os.getppid() != self._options.parent:
            why = "the process that started this one is gone"
            if self._is_replaced:
                self._leave(why)
            else:
                self._end(why)
        if self._may_start:
            self._look_at_servers()
            self._look_at_path()
        elif self._is_alone and self._watch.look_who_serves() is Found.NOTHING:
            self._resume(f"nobody serves on {self._watch.path} any more")

    @property
    def _is_alone(self) -> bool:
        """Whether somebody else has taken over, of whom it is not known whether they live."""
        return self._is_retired and self._ends_at is None and self._heir is None

    def _look_at_servers(self) -> None:
        for post in self._posts:
            if post.server is not None:
                self._look_at(post.server)

    def _look_at_path(self) -> None:
        """See that whoever connects to the path reaches us, or another plugin server."""
        self._tell_of_listener()
        found = self._watch.look()
        if found is Found.NOTHING:
            self._listen_anew()
        elif found is Found.OTHERS:
            LOGGER.error(
                "another plugin server has made its own socket at %s; this one waits for its end",
                self._watch.path,
                extra=trouble("path"),
            )

    def _listen_anew(self) -> None:
        """Make a socket at the path, where somebody has removed or replaced ours."""
        place = self._opening.place
        try:
            aside = make_way(place.path)
            listener = listen(place)
        except (OSError, StartupError) as error:
            LOGGER.error(
                "%s was removed or replaced, and Kong cannot connect: %s", place.path, error, extra=trouble("path")
            )
            # It has a way into Kong's own log.
            with contextlib.suppress(OSError):
                self._sockets.servers[0].send(Kind.UNREACHABLE)
            return
        was = "removed or replaced" if aside is None else f"replaced by something that is in {aside} now"
        LOGGER.error("%s was %s; it is there again", place.path, was, extra=trouble("path"))
        former, self._sockets = self._sockets.listener, replace(self._sockets, listener=listener.socket)
        former.close()
        self._watch.identity = listener.identity
        self._untold = set(range(len(self._posts)))
        self._tell_of_listener()

    def _tell_of_listener(self) -> None:
        """Have the servers accept from the newest socket; a channel that is full is tried again."""
        for index in tuple(self._untold):
            with contextlib.suppress(OSError):
                self._sockets.servers[index].send(Kind.LISTENER, self._sockets.listener.fileno())
                self._untold.discard(index)

    def _look_at(self, server: _Server) -> None:
        slot = self._board.slots[server.index]
        beats, server.beats = server.beats, slot.beats
        if slot.beats != beats or not self._is_waited_for(server):
            server.still_looks = 0
            return
        server.still_looks += 1
        if server.still_looks >= _STILL_LOOKS:
            LOGGER.error("server %d is stuck while connections wait, and is killed", server.pid, extra=trouble("still"))
            _tell(server, signal.SIGKILL)

    def _is_waited_for(self, server: _Server) -> bool:
        poll = select.poll()
        for waited in (self._sockets.listener, self._sockets.servers[server.index].outlet):
            poll.register(waited, select.POLLIN)
        return bool(poll.poll(0))

    # -- its end ------------------------------------------------------------------------------------------------------

    @property
    def _is_replaced(self) -> bool:
        """Whether the Kong that has started this one goes on: then it starts the next one, if it has not yet."""
        is_next_there = self._successor is not None or self._is_retired
        goes_on = self._options.kong is not None and is_living(self._options.kong)
        return goes_on and self._ends_at is None and not is_next_there and self._elder is None

    def _leave(self, why: str) -> None:
        """Leave the servers alone; they end when the next plugin server has taken over, or Kong is gone."""
        LOGGER.info("the supervisor ends, and leaves the servers to the next one: %s", why)
        self._has_left = True

    def _end(self, why: str) -> None:
        """Tell the servers to end, and listen no more."""
        if self._ends_at is not None:
            return
        for server in self._alive():
            _tell(server, signal.SIGTERM)
        self._ends_at = time.monotonic() + max(0.0, self._options.stop_timeout) + _END_MARGIN_SECONDS
        LOGGER.info("the supervisor ends: %s", why)
        self._sockets.listener.close()
        for channel in (*self._sockets.servers, self._sockets.supervisor):
            if channel is not None:
                channel.shut_down()
                for message in channel.messages():
                    if message.socket is not None:
                        message.socket.close()
        if self._elder is not None and not self._is_retired:
            self._elder.give_back()
        for other in (self._successor, self._heir, self._elder):
            if other is not None:
                other.close()
        self._successor = self._heir = self._elder = None


def _tell(server: _Server, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(server.pid, number)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _be_told_of_parents_death() -> None:
    """Have the system send a signal when the parent dies; where it cannot, the server finds out within a second."""
    with contextlib.suppress(OSError, AttributeError):
        _libc().prctl(_PR_SET_PDEATHSIG, int(ORPHANED), 0, 0, 0)


def _set_aside_what_lives_long() -> None:
    """Leave what lives as long as the process, which is most of what there is, out of every collection."""
    gc.collect()
    gc.freeze()
