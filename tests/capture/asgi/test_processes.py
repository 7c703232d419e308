from __future__ import annotations

import asyncio
import re
import signal
import ssl
from pathlib import Path

import httpx

from tests.capture.helpers import records
from tests.conftest import Start
from tests.helpers import until

TOGETHER = 100  # requests that each of the two processes has at work at the same time


def test_concurrent_requests_to_several_processes_never_mix(directory: Path, start: Start) -> None:
    with (directory.parent / "stderr").open("w+b") as stderr:
        site = start("asgi_site", directory, TOGETHER, stderr=stderr)
        try:
            said = Path(stderr.name)
            until(lambda: said.read_bytes().count(b"startup complete") == 2 or site.poll() is not None)
            running = re.search(rb"running on (http://127.0.0.1:\d+)", said.read_bytes())
            assert running is not None, said.read_text()
            expected, pids = asyncio.run(change_things(running[1].decode()))
        finally:
            site.send_signal(signal.SIGTERM)
            site.wait(30)
    events = records(directory)
    assert len(events) == len(expected) == 2 * TOGETHER
    found = {}
    for event in events:
        assert event["event_type"] == "update"
        session = event["event_data"]["session"]
        request_id = event["event_data"]["audit"]["request_id"]
        found[event["resource_id"]] = (session["email"], session["ip_address"], request_id)
    assert found == expected
    assert len(pids) == 2


async def change_things(address: str) -> tuple[dict[str, tuple[str, str, str]], set[int]]:
    """200 requests of 20 users at once, the half of them to each process; give what must be in the log."""
    tls = ssl.create_default_context()  # unused, but each client would make its own
    clients: dict[int, list[tuple[int, httpx.AsyncClient]]] = {}

    async def connect(number: int) -> None:
        transport = httpx.AsyncHTTPTransport(local_address=f"127.0.1.{number % 20 + 1}", verify=tls)
        http = httpx.AsyncClient(base_url=address, transport=transport, timeout=60)
        pid = (await http.get("/pid")).json()  # the connection stays with this process
        connected = clients.setdefault(pid, [])
        if len(connected) == TOGETHER:
            await http.aclose()
            await connect(number)
        else:
            connected.append((number, http))

    for number in range(2 * TOGETHER):
        await connect(number)
    expected = {}

    async def change(number: int, http: httpx.AsyncClient) -> None:
        name, user, request_id = f"thing-{number}", f"user-{number % 20}", f"request-{number}"
        expected[name] = (user, f"127.0.1.{number % 20 + 1}", request_id)
        kind = "threads" if number % 40 < 20 else "tasks"
        headers = {"X-User": user, "X-Request-ID": request_id}
        assert (await http.put(f"/{kind}/{name}", headers=headers)).is_success
        await http.aclose()

    async with asyncio.TaskGroup() as group:
        for number, http in (each for connected in clients.values() for each in connected):
            group.create_task(change(number, http))
    return expected, set(clients)
