"""How patient a forwarder is: between attempts, with receivers that stall, at its end, and in a server."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
import trustme

from auditlog import AuditLogger, AuditReader, DestinationError, Entry
from auditlog.forward import Destination, destination, forwarder
from auditlog.forward.channel import Delivery
from auditlog.forward.forwarder import FIRST_PAUSE, LONGEST_PAUSE
from auditlog.storage.days import SystemClock
from auditlog.storage.files import Files
from auditlog.testing import FailingFiles
from tests.forward.http_server import Answer
from tests.forward.sinks import (
    DAY,
    Packets,
    Requests,
    Stream,
    append,
    forwarder_to,
    forwarding,
    once,
    stored,
)
from tests.helpers import free_port, line, until, write_day

pytestmark = pytest.mark.timeout(60)

# ---------------------------------------------------------------------- between attempts


class Pauses(threading.Event):
    """Stands in for a forwarder's: notes how long it would have waited, and does not.

    attempts: after so many it is set.
    """

    def __init__(self, attempts: int = 1 << 30) -> None:
        super().__init__()
        self.asked: list[float] = []
        self._attempts = attempts

    def wait(self, timeout: float | None = None) -> bool:
        self.asked.append(timeout or 0.0)
        if len(self.asked) == self._attempts:
            self.set()
        return self.is_set()


class Receiver:
    """A channel to a receiver that behaves differently at each attempt.

    It is `away`, or `busy` and asks for 7 s, or `takes` what there is and leaves then.
    """

    def __init__(self, attempts: Sequence[str], delivery: Delivery = "at_least_once") -> None:
        self.delivery = delivery
        self._attempts = iter(attempts)
        self._now = ""

    def open(self, known: Entry | None = None) -> None:
        self._now = next(self._attempts)
        if self._now == "away":
            raise ConnectionRefusedError(errno.ECONNREFUSED, "connection refused")

    def send(self, entries: Sequence[Entry]) -> int:
        if self._now == "busy":
            raise DestinationError("siem", "busy", retry_after=7.0)
        return sum(len(entry.line) for entry in entries)

    def check(self) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "connection reset")

    def finish(self) -> bool:
        return False

    def close(self) -> None: ...

    def abort(self) -> None: ...


def pauses(
    directory: Path, monkeypatch: pytest.MonkeyPatch, attempts: Sequence[str], delivery: Delivery
) -> list[float]:
    """Those behind each attempt."""
    write_day(directory, DAY, line(0))
    monkeypatch.setattr(forwarder, "channel_for", lambda *_: Receiver(attempts, delivery))
    late = forwarder_to("tcp://127.0.0.1:1", directory)
    late._stop = asked = Pauses(len(attempts))
    late.run()
    assert len(asked.asked) == len(attempts)
    return asked.asked


def are(found: list[float], *longest: float) -> bool:
    """Is each pause between half and the whole of what it may be?"""
    return all(most / 2 <= each <= most for each, most in zip(found, longest, strict=True))


class TestAttempts:
    def test_pauses_grow_to_the_longest_and_are_never_all_alike(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = pauses(directory, monkeypatch, ["away"] * 40, "sent_again")
        longest = [min(FIRST_PAUSE * 2**number, LONGEST_PAUSE) for number in range(40)]
        assert are(found, *longest)
        assert longest[-1] == LONGEST_PAUSE
        assert len({each / most for each, most in zip(found, longest, strict=True)}) > 30

    def test_they_begin_anew_when_something_was_taken(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        attempts = ["away", "away", "away", "away", "takes", "away", "away"]
        found = pauses(directory, monkeypatch, attempts, "at_least_once")
        assert are(found, 0.5, 1, 2, 4, 0.5, 1, 2)

    @pytest.mark.parametrize(("lasting", "then"), [(0.1, (0.5, 1.0)), (60.0, (8.0, 16.0))])
    def test_they_begin_anew_after_a_connection_that_lasted(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch, lasting: float, then: tuple[float, float]
    ) -> None:
        monkeypatch.setattr(forwarder, "_LASTING_SECONDS", lasting)  # it stays until nothing comes for 0.2 s
        attempts = ["away", "away", "away", "away", "takes", "away"]
        found = pauses(directory, monkeypatch, attempts, "sent_again")
        assert are(found, 0.5, 1, 2, 4, *then)

    def test_a_receiver_is_left_alone_for_as_long_as_it_asks(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = pauses(directory, monkeypatch, ["busy"] * 6 + ["away"], "at_least_once")
        assert found[:4] == [7.0] * 4
        assert 7 <= found[4] <= 8
        assert are(found[5:], 16, 30)

    def test_what_an_http_server_asks_for_is_kept_to(self, directory: Path) -> None:
        write_day(directory, DAY, line(0))
        with Requests() as requests:
            requests.planned += [Answer(503, headers={"Retry-After": seconds}) for seconds in ("120", "3")]
            late = forwarder_to(requests.endpoint, directory)
            late._stop = asked = Pauses(2)
            late.run()
            assert asked.asked == [120.0, 3.0]
            once(directory, requests.endpoint)
            assert requests.ids == ["0"]


# ---------------------------------------------------------------------- receivers that stall


@contextmanager
def stalled() -> Iterator[str]:
    """A receiver that takes connections and never reads; gives its endpoint."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}/"


def write_much(directory: Path) -> None:
    """At once more than a kernel takes for a receiver that does not read."""
    write_day(directory, DAY, line(0, note="x" * (15 << 20)))


class TestStalled:
    @pytest.mark.usefixtures("quick")
    def test_one_that_never_reads_is_given_up_after_the_deadline(self, directory: Path) -> None:
        write_much(directory)
        with stalled() as endpoint, forwarding(directory, endpoint, send_timeout=0.3) as late:
            until(lambda: late.progress.reconnects >= 2)
        assert late.progress.last_error == "it took too long"

    def test_an_end_waits_for_all_at_once_and_leaves_those_that_are_stuck(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(forwarder, "_STOP_SECONDS", 1.0)
        write_much(directory)
        several = 4
        with stalled() as endpoint:
            forward = [Destination(endpoint=endpoint, name=f"n{number}") for number in range(several)]
            log = AuditLogger(directory, fsync="never", retention=None, forward=forward)
            until(lambda: all(status.active for status in log.forward_status()))
            began = time.monotonic()
            log.close()
            assert time.monotonic() - began < several - 1
            names = "auditlog-forward-n"
            until(lambda: not [each for each in threading.enumerate() if each.name.startswith(names)], 10)

    def test_an_end_before_anything_was_sent_sends_what_is_there(self, directory: Path) -> None:
        write_day(directory, DAY, line(0) + line(1))
        with Stream() as stream:
            late = forwarder_to(stream.endpoint, directory)
            late.stop()
            late.run()
            until(lambda: stream.ids == ["0", "1"])


# ---------------------------------------------------------------------- in a server


def work(seconds: float) -> float:
    """Have the processor for so long; gives for how long it was."""
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        pass
    return time.thread_time() - began


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """Another thread that takes all the time that it can have."""
    end = threading.Event()

    def run() -> None:
        while not end.is_set():
            work(0.001)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


class TestPace:
    def test_who_is_alone_does_not_rest(self) -> None:
        pace = forwarder._Pace()
        work(0.05)
        assert pace.rest() < 0.025

    def test_who_has_a_busy_neighbour_rests_longer_than_it_worked(self) -> None:
        pace = forwarder._Pace()
        with busy_neighbour():
            worked = work(0.05)
            rest = pace.rest()
        assert worked < rest < 60 * (worked + 0.05)

    def test_work_is_rested_from_once(self) -> None:
        pace = forwarder._Pace()
        with busy_neighbour():
            work(0.1)
            assert pace.rest() > 0.1
            time.sleep(0.1)
            assert pace.rest() < 1

    @pytest.mark.parametrize("in_server", [True, False])
    def test_a_forwarder_rests_in_a_server_only(self, directory: Path, in_server: bool) -> None:
        write_day(directory, DAY, b"".join(map(line, range(2000))))
        with Stream() as stream, busy_neighbour():
            late = forwarder_to(stream.endpoint, directory, in_server=in_server)
            late._stop = asked = Pauses()
            late.start()
            until(lambda: len(stream.lines) == 2000)
            late.stop()
        assert any(each > 0 for each in asked.asked) == in_server

    def test_those_that_a_server_starts_do(self, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        target = Destination(endpoint=f"tcp://127.0.0.1:{free_port()}/", name="siem")
        [started] = forwarder.start_all(str(directory), [target], SystemClock(), Files())
        started.stop()
        assert started._pace is not None


# ---------------------------------------------------------------------- UDP


@contextmanager
def name_with_two_addresses(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """As where a machine has `::1` and `127.0.0.1` for localhost, and a receiver only one of them."""
    look_up = socket.getaddrinfo

    def look_up_two(host: str, *arguments: Any, **options: Any) -> list[Any]:
        hosts = ["127.0.0.2", "127.0.0.1"] if host == "two.example.com" else [host]
        return [found for each in hosts for found in look_up(each, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up_two)
    yield "two.example.com"


@pytest.mark.usefixtures("quick")
class TestUdp:
    def test_runs_that_end_in_order_lose_nothing(self, directory: Path) -> None:
        write_day(directory, DAY, line(0) + line(1))
        with Packets() as packets:
            once(directory, packets.endpoint)
            assert once(directory, packets.endpoint).lost == 0
            append(directory, 2)
            assert once(directory, packets.endpoint).lost == 0
            until(lambda: packets.ids == ["0", "1", "2"])

    def test_what_is_refused_at_the_end_of_a_run_is_counted(self, directory: Path) -> None:
        write_day(directory, DAY, line(0))
        assert once(directory, f"udp://127.0.0.1:{free_port()}/").lost == 1

    def test_what_arrived_is_not_lost_with_a_process_that_dies_later(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(forwarder, "_STORE_SECONDS", 1000.0)
        write_day(directory, DAY, line(0))
        with Packets() as packets, forwarding(directory, packets.endpoint):
            for number in range(1, 4):
                until(lambda number=number: stored(directory).sent == number)  # type: ignore[misc]
                assert stored(directory).in_flight == 0
                append(directory, number)
            until(lambda: packets.ids == ["0", "1", "2", "3"])

    def test_what_is_about_to_be_sent_is_on_the_disk_before(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Looking(Receiver):
            def send(self, entries: Sequence[Entry]) -> int:
                found.append(stored(directory).in_flight)
                return 0

        found: list[int] = []
        write_day(directory, DAY, line(0) + line(1))
        monkeypatch.setattr(forwarder, "channel_for", lambda *_: Looking(["takes"], "at_most_once"))
        once(directory, "udp://127.0.0.1:1")
        assert found == [2, 2]

    def test_a_receiver_that_is_not_there_is_told_once(
        self, directory: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_day(directory, DAY, b"".join(map(line, range(4))))
        port, files = free_port(), FailingFiles()
        caplog.set_level(logging.INFO, "auditlog")
        with forwarding(directory, f"udp://127.0.0.1:{port}/", files=files) as late:
            for number in (4, 5):
                until(lambda number=number: late.progress.lost == number)  # type: ignore[misc]
                looks = files.calls["open_directory"] + 20  # it is connected anew, and nothing comes
                until(lambda looks=looks: files.calls["open_directory"] > looks)  # type: ignore[misc]
                append(directory, number)
            until(lambda: late.progress.lost == 6)
            assert len(caplog.messages) == 1
            with Packets(port) as packets:
                append(directory, 6)
                until(lambda: packets.ids == ["6"])
                until(lambda: not late.progress.failing)
        assert caplog.messages[1:] == ["destination siem takes messages again"]
        assert (late.progress.sent, late.progress.lost) == (7, 6)

    def test_the_next_address_of_a_name_is_tried_after_a_refusal(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_day(directory, DAY, line(0))
        with Packets() as packets, name_with_two_addresses(monkeypatch) as name:
            with forwarding(directory, f"udp://{name}:{packets.port}/") as late:
                until(lambda: late.progress.lost == 1)
                append(directory, 1, 2)
                until(lambda: packets.ids == ["1", "2"])
                until(lambda: not late.progress.failing)
            assert late.progress.lost == 1

    def test_a_message_that_the_network_does_not_take_is_cut_until_it_does(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # More than UDP can carry: the kernel says so, as it does for a network with smaller packets.
        monkeypatch.setitem(destination.MAX_MESSAGE_BYTES, "udp", 200_000)
        long = orjson.dumps({"resource_id": "1", "event_data": {"note": "y" * 90_000}}) + b"\n"
        write_day(directory, DAY, line(0) + long + line(2) + long)
        with Packets() as packets:
            progress = once(directory, packets.endpoint)
            until(lambda: packets.ids == ["0", "1", "2", "1"])
            assert "cut: 90000 bytes" in packets.messages[1]["event_data"]["note"]
        assert (progress.cut, progress.lost) == (2, 0)


# ---------------------------------------------------------------------- one's own doing


def test_a_port_at_which_nobody_listens_is_never_ones_own(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_day(directory, DAY, line(0))
    # Among the ports that the kernel gives away it may give this one: then TCP connects it to itself.
    here = ("127.0.0.1", free_port())
    connect = partial(socket.create_connection, source_address=here)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(DestinationError, match="connection refused"):
        once(directory, f"tcp://127.0.0.1:{here[1]}/")


def test_a_child_that_cannot_read_the_certificate_any_more_writes_and_does_not_forward(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ca_file = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(ca_file))
    endpoint = f"tls://127.0.0.1:{free_port()}/"
    forward = [Destination(endpoint=endpoint, ca_file=str(ca_file))]
    with AuditLogger(directory, fsync="never", retention=None, forward=forward) as log:
        log.create("T", "parent")
        ca_file.unlink()
        child = os.fork()
        if child == 0:
            try:
                log.create("T", "child")
                log.create("T", "child, too")
                os._exit("this process does not forward: ca_file" not in caplog.text)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    written = [entry.record["resource_id"] for entry in AuditReader(directory).read()]
    assert written == ["parent", "child", "child, too"]
