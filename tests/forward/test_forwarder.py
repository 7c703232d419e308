"""Forwarding to one destination: in order, from where it was, whatever happens to the connection."""

from __future__ import annotations

import errno
import os
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import trustme

from auditlog import (
    AuditLogger,
    AuditReader,
    DestinationBusy,
    DestinationError,
    DirectoryError,
    Position,
)
from auditlog.forward import Destination, Forwarder
from auditlog.forward.delivery import SENT_AGAIN_BYTES
from auditlog.storage.files import Files
from auditlog.storage.progress import Place, Progress
from auditlog.testing import FailingFiles
from tests.forward.sinks import DAY, Packets, Stream, append, forwarding, once, stored
from tests.helpers import free_port, line, until, write_day

pytestmark = pytest.mark.usefixtures("quick")


def days_of(directory: Path, count: int = 20, first: int = 0, size: int = 0) -> list[str]:
    """A log of so many entries in two days; gives their ids."""
    lines = [line(number, note="x" * size) for number in range(first, first + count)]
    write_day(directory, "2024-08-11", b"".join(lines[: count // 2]))
    write_day(directory, DAY, b"".join(lines[count // 2 :]))
    return [str(number) for number in range(first, first + count)]


class TestInOrder:
    def test_a_run_sends_what_there_is_and_the_next_one_what_came_since(self, directory: Path) -> None:
        ids = days_of(directory)
        with Stream() as stream:
            progress = once(directory, stream.endpoint)
            until(lambda: stream.ids == ids)
            assert progress.position == progress.sent_through
            once(directory, stream.endpoint)
            append(directory, 20, 21)
            once(directory, stream.endpoint)
            until(lambda: stream.ids == [*ids, "20", "21"])

    def test_entries_come_as_they_are_written_and_the_last_ones_before_a_stop(self, directory: Path) -> None:
        days_of(directory, 2)
        with Stream() as stream:
            with forwarding(directory, stream.endpoint):
                for number in range(2, 6):
                    append(directory, number)
                    until(lambda number=number: stream.ids[-1:] == [str(number)])  # type: ignore[misc]
                append(directory, 6)
            until(lambda: stream.ids == [str(number) for number in range(7)])
            assert len(stream.connections) == 1

    def test_an_empty_log_has_nothing_to_send(self, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        assert once(directory, f"tcp://127.0.0.1:{free_port()}").sent == 0

    def test_it_may_begin_with_what_is_written_from_now_on(self, directory: Path) -> None:
        days_of(directory)
        with Stream() as stream:
            once(directory, stream.endpoint, begin="now")
            append(directory, 20)
            once(directory, stream.endpoint, begin="now")
            until(lambda: stream.ids == ["20"])

    def test_no_log_is_an_error_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(DirectoryError):
            Forwarder(tmp_path / "none", Destination(endpoint="tcp://127.0.0.1:1"))

    @pytest.mark.parametrize("form", ["json_lines", "raw"])
    def test_damage_is_passed_over_and_counted(self, directory: Path, form: str) -> None:
        write_day(directory, DAY, line(0) + b"torn{\n" + b'{"no":json}\n' + line(1) + b"{]}\n")
        with Stream() as stream:
            progress = once(directory, stream.endpoint, format=form)
            if form == "raw":  # what stands in the file, event or not
                until(lambda: stream.lines == [line(0)[:-1], b'{"no":json}', line(1)[:-1], b"{]}"])
            else:
                until(lambda: stream.ids == ["0", "1"])
            assert progress.damaged == (1 if form == "raw" else 3)
            append(directory, 2)
            again = once(directory, stream.endpoint, format=form)
            assert (again.sent, again.damaged) == (progress.sent + 1, progress.damaged)

    def test_a_line_of_any_length_is_sent_whole(self, directory: Path) -> None:
        write_day(directory, DAY, line(0, note="y" * (15 << 20)) + line(1))
        with Stream() as stream:
            once(directory, stream.endpoint)
            until(lambda: len(stream.ids) == 2)
            assert len(stream.messages[0]["note"]) == 15 << 20


class TestStreams:
    def test_after_a_disconnect_the_last_8_mib_are_sent_again(self, directory: Path) -> None:
        ids = days_of(directory, 400, size=50_000)  # 20 MB
        offsets = [entry.position for entry in AuditReader(directory).read()]
        with Stream() as stream, forwarding(directory, stream.endpoint) as forwarder:
            until(lambda: stream.ids == ids)
            stream.drop()
            append(directory, 400)
            until(lambda: stream.ids[-1] == "400")
            again = stream.ids[400:-1]
            assert again == ids[-len(again) :]
            resent = len(again) * (50_000 + 80)
            assert SENT_AGAIN_BYTES <= resent <= SENT_AGAIN_BYTES + (2 << 20)
            assert forwarder.progress.reconnects == 1
            assert forwarder.progress.position in offsets

    def test_a_run_that_died_is_followed_by_one_that_sends_those_again(self, directory: Path) -> None:
        ids = days_of(directory, 400, size=50_000)
        with Stream() as stream:
            with forwarding(directory, stream.endpoint) as forwarder:
                until(lambda: stream.ids == ids and forwarder.progress.sent == 400)
                until(lambda: stored(directory).sent == 400)
                left = stored(directory)  # as a kill would leave it
            assert left.sent_through > left.position
            Place(str(directory), forwarder.destination.name, Files()).write(left)
            once(directory, stream.endpoint)
            until(lambda: stream.ids[400:] == ids[-(len(stream.ids) - 400) :] != [])
            assert (len(stream.ids) - 400) * 50_000 >= SENT_AGAIN_BYTES - (1 << 20)

    def test_a_peer_that_closed_is_noticed_before_the_next_message_counts_as_sent(
        self, directory: Path
    ) -> None:
        days_of(directory, 2)
        expected = 2
        with Stream() as stream, forwarding(directory, stream.endpoint) as forwarder:
            for number in range(2, 5):
                until(lambda expected=expected: len(stream.ids) == expected)  # type: ignore[misc]
                stream.drop()
                append(directory, number)
                expected += number + 1  # all of it again, and the new one: sent once
            until(lambda: len(stream.ids) == expected)
        assert forwarder.progress.sent == expected

    def test_a_peer_that_says_something_is_not_minded(self, directory: Path) -> None:
        days_of(directory, 2)
        with Stream() as stream, forwarding(directory, stream.endpoint):
            until(lambda: stream.open)
            stream.open[0].sendall(b"HTTP/1.1 400 Bad Request\r\n" * 1000)
            append(directory, 2)
            until(lambda: stream.ids == ["0", "1", "2"])

    def test_nobody_there_is_an_error_for_one_run_and_waited_out_by_another(self, directory: Path) -> None:
        days_of(directory, 2)
        port = free_port()
        with pytest.raises(DestinationError, match=r"destination siem: connection refused"):
            once(directory, f"tcp://127.0.0.1:{port}", name="siem")
        with forwarding(directory, f"tcp://127.0.0.1:{port}", name="siem") as forwarder:
            until(lambda: forwarder.progress.failing)
            with Stream(port=port) as stream:
                until(lambda: stream.ids == ["0", "1"])
                until(lambda: not stored(directory).failing)
                left = stored(directory)
                assert left.last_error == "connection refused"
                assert left.last_error_ms > 0


class TestTls:
    @pytest.fixture(scope="class")
    @staticmethod
    def authority() -> trustme.CA:
        return trustme.CA()

    @pytest.fixture
    @staticmethod
    def stream(authority: trustme.CA) -> Iterator[Stream]:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("127.0.0.1", "logs.example.com").configure_cert(context)
        with Stream(context) as stream:
            yield stream

    @pytest.fixture
    @staticmethod
    def ca_file(authority: trustme.CA, tmp_path: Path) -> str:
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        return str(tmp_path / "ca.pem")

    def test_messages_arrive_and_the_connection_ends_in_order(
        self, directory: Path, stream: Stream, ca_file: str
    ) -> None:
        ids = days_of(directory, 1000)
        progress = once(directory, stream.endpoint, ca_file=ca_file)
        until(lambda: stream.ids == ids)
        assert progress.position == progress.sent_through
        with forwarding(directory, stream.endpoint, ca_file=ca_file):
            append(directory, 1000)
            until(lambda: stream.ids == [*ids, "1000"])
            stream.drop()
            append(directory, 1001)
            until(lambda: stream.ids[-2:] == ["1000", "1001"])

    def test_a_receiver_that_ends_without_a_word_may_have_read_nothing(
        self, directory: Path, stream: Stream, ca_file: str
    ) -> None:
        days_of(directory, 4)
        stream.says_goodbye = False
        assert once(directory, stream.endpoint, ca_file=ca_file).position == Position.START
        stream.says_goodbye = True
        assert once(directory, stream.endpoint, ca_file=ca_file).position > Position.START
        until(lambda: stream.ids == ["0", "1", "2", "3"] * 2)

    def test_a_certificate_of_an_unknown_authority_is_refused(self, directory: Path, stream: Stream) -> None:
        days_of(directory, 2)
        with pytest.raises(DestinationError, match="TLS: unable to get local issuer certificate"):
            once(directory, stream.endpoint)

    def test_a_certificate_must_have_the_name(self, directory: Path, stream: Stream, ca_file: str) -> None:
        days_of(directory, 2)
        with pytest.raises(DestinationError, match=r"TLS: .*elsewhere.example.com"):
            once(directory, stream.endpoint, ca_file=ca_file, server_name="elsewhere.example.com")
        once(directory, stream.endpoint, ca_file=ca_file, server_name="logs.example.com")
        until(lambda: stream.ids == ["0", "1"])


class TestUdp:
    def test_each_message_is_a_packet(self, directory: Path) -> None:
        ids = days_of(directory, 200)
        with Packets() as packets:
            progress = once(directory, packets.endpoint)
            assert [orjson.loads(packet)["resource_id"] for packet in packets.take(200)] == ids
            assert packets.rest() == []
            assert (progress.sent, progress.cut, progress.lost) == (200, 0, 0)

    @pytest.mark.parametrize("limit", [65_507, 2_000])
    def test_what_does_not_fit_is_cut_counted_and_blocks_nothing(self, directory: Path, limit: int) -> None:
        long = orjson.dumps({"resource_id": "1", "event_data": {"note": "y" * 70_000}}) + b"\n"
        write_day(directory, DAY, line(0) + long + line(2))
        with Packets() as packets:
            progress = once(directory, packets.endpoint, max_message_bytes=limit)
            got = [orjson.loads(packet) for packet in packets.take(3)]
            assert [each["resource_id"] for each in got] == ["0", "1", "2"]
            assert "cut: 70000 bytes" in str(got[1]) or "truncated" in str(got[1])
            assert progress.cut == 1

    def test_nobody_there_costs_what_was_refused_and_nothing_comes_twice(self, directory: Path) -> None:
        ids = days_of(directory, 20)
        port = free_port()
        with forwarding(directory, f"udp://127.0.0.1:{port}/") as forwarder:
            until(lambda: forwarder.progress.lost)
            with Packets(port) as packets:
                until(lambda: forwarder.progress.sent_through.day.isoformat() == DAY)
                until(lambda: forwarder.progress.sent >= 20)
                got = [orjson.loads(packet)["resource_id"] for packet in packets.rest()]
        assert got == ids[-len(got) :]
        assert len(got) + forwarder.progress.lost == 20
        assert forwarder.progress.failing is False

    def test_nothing_is_sent_that_could_not_be_said_to_be(self, directory: Path) -> None:
        days_of(directory, 4)
        files = FailingFiles()
        with Packets() as packets, forwarding(directory, packets.endpoint, files=files) as forwarder:
            packets.take(4)
            files.fail("replace", errno.ENOSPC)
            append(directory, 4)
            until(lambda: forwarder.progress.failing)
            assert packets.rest() == []
            files.heal()
            assert orjson.loads(packets.take(1)[0])["resource_id"] == "4"

    def test_what_a_run_that_died_was_about_to_send_counts_as_lost(self, directory: Path) -> None:
        days_of(directory, 4)
        with Packets() as packets:
            once(directory, packets.endpoint, name="siem")
            place = Place(str(directory), "siem", Files())
            left = place.read()
            assert left
            left.in_flight = 3
            place.write(left)
            assert once(directory, packets.endpoint, name="siem").lost == 3
            assert len(packets.take(4)) == 4
            assert packets.rest() == []


class TestPosition:
    def test_only_one_forwards_and_another_takes_over(self, directory: Path) -> None:
        days_of(directory, 2)
        with Stream() as stream, forwarding(directory, stream.endpoint) as one:
            until(lambda: one.active)
            with pytest.raises(DestinationBusy):
                Forwarder(directory, one.destination).run(stand_by=False)
            with pytest.raises(DestinationBusy):
                once(directory, stream.endpoint)
            with forwarding(directory, stream.endpoint) as other:
                append(directory, 2)
                until(lambda: stream.ids == ["0", "1", "2"])
                assert not other.active
                one.stop()
                until(lambda: other.active)
                append(directory, 3)
                until(lambda: stream.ids == ["0", "1", "2", "3"])

    def test_a_lock_file_that_was_removed_lets_no_two_forward(self, directory: Path) -> None:
        days_of(directory, 2)
        place, other = (Place(str(directory), "siem", Files()) for _ in range(2))
        assert place.lock()
        os.unlink(directory / ".auditlog/forward/siem.lock")
        assert other.lock()  # nobody can tell; but the one that comes first to a new file is the one
        place.unlock()
        assert not place.lock()
        other.unlock()
        assert place.lock()
        place.unlock()

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"[]", b'{"position":5}', b'{"sent":"many"}', b'{"swept":[5]}']
    )
    def test_what_nobody_stored_is_no_position(self, content: bytes) -> None:
        with pytest.raises(ValueError, match=r"wrong value|no JSON object|unexpected|empty"):
            Progress.parse(content)

    def test_a_damaged_position_is_an_error_that_says_what_to_do(self, directory: Path) -> None:
        days_of(directory, 2)
        file = directory / ".auditlog/forward/siem"
        with Stream() as stream:
            once(directory, stream.endpoint)
            file.write_bytes(b"{damaged")
            with pytest.raises(DirectoryError, match=r"forward/siem is damaged .* remove it"):
                once(directory, stream.endpoint)
            with forwarding(directory, stream.endpoint) as forwarder:
                until(lambda: forwarder.progress.failing)
                assert file.read_bytes() == b"{damaged"
                file.unlink()
                until(lambda: stream.ids == ["0", "1", "0", "1"])

    def test_a_disk_that_is_full_does_not_keep_streams_from_being_sent(self, directory: Path) -> None:
        days_of(directory, 2)
        files = FailingFiles()
        with Stream() as stream, forwarding(directory, stream.endpoint, files=files):
            until(lambda: stream.ids == ["0", "1"])
            files.fail("replace", errno.ENOSPC)
            append(directory, 2)
            until(lambda: stream.ids == ["0", "1", "2"])
            files.heal()

    def test_a_forked_child_keeps_neither_lock_nor_connection(self, directory: Path) -> None:
        days_of(directory, 2)
        with Stream() as stream:
            with forwarding(directory, stream.endpoint):
                until(lambda: stream.ids == ["0", "1"])
                child = os.fork()
                if child == 0:
                    stream.forget()
                    signal.pause()
                    os._exit(0)
            try:
                until(lambda: not stream.open)  # the receiver saw the parent leave
                assert stored(directory).position > Position.START
                append(directory, 2)
                once(directory, stream.endpoint)
                until(lambda: stream.ids == ["0", "1", "2"])
            finally:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def test_a_server_forwards_what_it_writes_and_says_how_it_fares(directory: Path) -> None:
    with Stream() as stream:
        dead = Destination(endpoint=f"tcp://127.0.0.1:{free_port()}/", name="dead")
        with AuditLogger(
            directory, forward=[Destination(endpoint=stream.endpoint, name="siem"), dead]
        ) as log:
            for number in range(100):
                log.create("T", str(number))
            until(lambda: len(stream.ids) == 100)
            until(lambda: log.forward_status()[0].failing)
            log.create("T", "last")
        until(lambda: stream.ids[-1] == "last")
        statuses = {each.name: each for each in log.forward_status()}
        assert statuses["dead"].lag_events == 101
        assert statuses["siem"].lag_events == 0
        assert statuses["siem"].sent == 101
