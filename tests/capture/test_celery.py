"""The capture for Celery, with real workers and a broker in a directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group

from auditlog import InvalidSetting, Session
from auditlog.capture import bind
from auditlog.capture.celery import HEADER, UNVERIFIED, carry_sessions
from auditlog.capture.session import Bound, Pending, binding
from tests.capture.helpers import records, snippet
from tests.conftest import ROOT
from tests.helpers import until
from tests.programs.celery_app import KEY, OLD_KEY, configure, make_app

BOB = Session(email="bob@example.com", user_agent="curl/8")
NOBODY = {"user_agent": "Omni-Internal-Agent"}
NOT_VERIFIED = {"user_agent": UNVERIFIED.user_agent}

POOLS = ["prefork", "threads", "spawn"]  # most tests use "solo"


class Site:
    """A broker and an audit log in a directory, with apps that send and workers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.output = directory / "output"  # what the worker printed and logged
        self._apps: list[Celery] = []
        self._workers: list[subprocess.Popen[bytes]] = []

    def app(self, key: Any = KEY, **settings: Any) -> Celery:
        """An app that sends tasks; one that carries no sessions where `key` is None."""
        app = make_app(self.directory, **settings)
        self._apps.append(app)
        if key is not None:
            carry_sessions(app, key=key)
        return app

    def work(self, *arguments: object) -> None:
        """Start a worker; see tests/programs/celery_app.py."""
        command = [sys.executable, "-m", "tests.programs.celery_app", self.directory, *arguments]
        with self.output.open("wb") as output:
            process = subprocess.Popen(
                [*map(str, command)], cwd=ROOT, stdout=output, stderr=output, start_new_session=True
            )
        self._workers.append(process)

    def events(self, *names: str) -> dict[str, dict[str, Any]]:
        """The details of events by the ids of their resources, as soon as they are all there."""
        found: dict[str, dict[str, Any]] = {}
        log = self.directory / "audit-log"

        def complete() -> bool:
            if log.exists():
                found.update((record["resource_id"], record["event_data"]) for record in records(log))
            return found.keys() >= set(names)

        until(complete)
        return {name: found[name] for name in names}

    def sessions(self, *names: str) -> dict[str, dict[str, Any]]:
        return {name: details["session"] for name, details in self.events(*names).items()}

    def headers(self) -> dict[str, dict[str, Any]]:
        """The headers of the messages in the broker, which whoever can read it sees, by the task's id."""
        messages = [json.loads(path.read_text()) for path in (self.directory / "queue").iterdir()]
        return {message["headers"]["id"]: message["headers"] for message in messages}

    def close(self) -> None:
        """End everything; no process outlives this."""
        for app in self._apps:
            app.close()
        for worker in self._workers:
            os.killpg(worker.pid, signal.SIGKILL)  # the processes of its pool, too
            worker.wait()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with closing(Site(tmp_path)) as site:
        yield site


@pytest.fixture(scope="module")
def working_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site where one process does all tasks, one after the other."""
    with closing(Site(tmp_path_factory.mktemp("site"))) as site:
        site.work("solo")
        yield site


def fields(session: Session) -> dict[str, Any]:
    """A session as it stands in an entry."""
    return session.model_dump(exclude_defaults=True)


def send(app: Celery, task: str, *arguments: object, **options: Any) -> None:
    app.tasks[task].apply_async(arguments, **options)


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_has_the_session_and_request_id_of_its_sender(site: Site, pool: str, alice: Session) -> None:
    app = site.app()
    with binding(Bound(alice, "request-1")):
        send(app, "write", "alice's")
    with bind(BOB):
        send(app, "write", "bob's")
    send(app, "write", "nobody's")
    site.work(pool)
    events = site.events("alice's", "bob's", "nobody's")
    assert events["alice's"]["session"] == fields(alice)
    assert events["alice's"]["audit"] == {"request_id": "request-1"}
    assert events["bob's"]["session"] == fields(BOB)
    assert events["nobody's"]["session"] == NOBODY
    assert "audit" not in events["bob's"]
    assert "audit" not in events["nobody's"]


def test_sessions_of_concurrent_senders_do_not_mix(site: Site) -> None:
    site.work("prefork")
    app = site.app()
    names = [f"{user}-{number}" for user in ("ann", "ben", "cid") for number in range(20)]

    def send_all(user: str) -> None:
        for name in names:
            if name.startswith(user):
                with bind(Session(email=user)):
                    send(app, "write", name)

    threads = [threading.Thread(target=send_all, args=(user,)) for user in ("ann", "ben", "cid")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert site.sessions(*names) == {name: {"email": name[:3]} for name in names}


def test_tasks_that_run_at_the_same_time_in_one_process_do_not_mix(site: Site, alice: Session) -> None:
    app = site.app()
    for who in (alice, BOB):
        with bind(who):
            send(app, "meet", who.email)
    site.work("threads")
    assert site.sessions(alice.email, BOB.email) == {who.email: fields(who) for who in (alice, BOB)}


def test_a_retry_and_a_task_sent_by_a_task_carry_the_session_on(working_site: Site, alice: Session) -> None:
    app = working_site.app()
    with binding(Bound(alice, "request-1")):
        send(app, "retry", "retry")
        send(app, "send", "sent")
    for details in working_site.events("retry-0", "retry-1", "retry-2", "sent").values():
        assert details["session"] == fields(alice)
        assert details["audit"] == {"request_id": "request-1"}


def test_chains_groups_and_chords_carry_the_session_on(working_site: Site, alice: Session) -> None:
    app = working_site.app()
    write = app.tasks["write"]
    with bind(alice):
        chain(write.s("first"), write.s("second"), write.s("third")).apply_async()
        group(write.s("left"), write.s("right")).apply_async()
        chord([write.s("one"), write.s("two")], write.s("body")).apply_async()
    sessions = working_site.sessions("first", "second", "third", "left", "right", "one", "two", "body")
    assert all(session == fields(alice) for session in sessions.values())


def test_a_task_whose_process_was_lost_is_retried_for_its_sender(site: Site, alice: Session) -> None:
    app = site.app()
    with bind(alice):
        send(app, "die_once", "lost")
    site.work("prefork")
    lost = site.events("lost-0")["lost-0"]["pid"]
    until(lambda: "Task accepted" in site.output.read_text())  # else the worker does not know who had it
    os.kill(lost, signal.SIGKILL)
    again = site.events("lost-1")["lost-1"]
    assert again["session"] == fields(alice)
    assert again["pid"] != lost


@pytest.mark.parametrize("how", ["error", "ignore", "reject"])
def test_a_failing_task_leaks_no_session_into_the_next(working_site: Site, how: str, alice: Session) -> None:
    app = working_site.app()
    with bind(alice):
        send(app, "fail", f"{how}s", how)
    failing = working_site.events(f"{how}s")[f"{how}s"]
    send(app, "write", f"after {how}")
    after = working_site.events(f"after {how}")[f"after {how}"]
    assert failing["session"] == fields(alice)
    assert after["session"] == NOBODY
    assert after["pid"] == failing["pid"]


def test_a_task_out_of_time_leaks_no_session_into_the_next(site: Site, alice: Session) -> None:
    app = site.app()
    site.work("prefork")
    with bind(alice):
        send(app, "hurry", "one")
        send(app, "hurry", "two")  # one for each process
    for name in ("three", "four", "five", "six"):
        send(app, "write", name)
    hurried = site.events("one", "two").values()
    later = site.events("three", "four", "five", "six").values()
    assert all(details["session"] == fields(alice) for details in hurried)
    assert all(details["session"] == NOBODY for details in later)
    assert {details["pid"] for details in later} <= {details["pid"] for details in hurried}


def test_the_hooks_of_a_base_class_have_the_session(working_site: Site, alice: Session) -> None:
    app = working_site.app()
    with bind(alice):
        send(app, "based", "task")
    sessions = working_site.sessions("task-before", "task-call", "task", "task-failure")
    assert all(session == fields(alice) for session in sessions.values())


def test_a_header_that_does_not_verify_gives_no_actor(site: Site, alice: Session) -> None:
    with bind(alice):
        send(site.app(), "write", "genuine", task_id="genuine")
        send(site.app(key="x" * 16), "write", "of another key")
    header = site.headers()["genuine"][HEADER]
    forger = site.app(key=None)

    def forge(name: str, value: object, task: str = "write", task_id: str = "genuine") -> str:
        forger.send_task(task, [name], task_id=task_id, headers={HEADER: value})
        return name

    forged = [
        forge("moved to another id", header, task_id="another"),
        forge("moved to another task", header, task="send"),
        forge("cut", header[:-2]),
        forge("changed", "A" + header[1:]),
        *(forge(repr(value), value) for value in ("", "a.b.c", "\ud800", 7, [header], {"email": "root"})),
        "of another key",
    ]
    site.work("solo")
    sessions = site.sessions("genuine", *forged)
    assert sessions.pop("genuine") == fields(alice)
    assert all(session == NOT_VERIFIED for session in sessions.values())
    output = site.output.read_text()
    assert output.count("does not verify") == len(forged)
    assert header not in output
    assert alice.email not in output


def test_a_task_that_waited_for_too_long_is_not_taken_for_its_senders(site: Site, alice: Session) -> None:
    with bind(alice):
        send(site.app(), "write", "late")
    site.work("solo", 0.001)
    assert site.sessions("late") == {"late": NOT_VERIFIED}


def test_a_key_that_is_going_still_verifies(working_site: Site, alice: Session) -> None:
    with bind(alice):
        send(working_site.app(key=OLD_KEY), "write", "old")
        send(working_site.app(key=[OLD_KEY, KEY]), "write", "new")
    assert working_site.sessions("old", "new") == {"old": fields(alice), "new": fields(alice)}


def test_a_retry_of_a_task_without_a_session_has_none(working_site: Site) -> None:
    send(working_site.app(), "retry", "nobody's")
    names = ("nobody's-0", "nobody's-1", "nobody's-2")
    assert working_site.sessions(*names) == dict.fromkeys(names, NOBODY)


def test_a_header_is_not_copied_to_a_task_sent_for_nobody(working_site: Site, alice: Session) -> None:
    with bind(alice):
        send(working_site.app(), "send_for_nobody", "nobody's")
    assert working_site.sessions("nobody's") == {"nobody's": NOBODY}


def test_the_first_version_of_the_protocol_carries_the_session(working_site: Site, alice: Session) -> None:
    with bind(alice):
        send(working_site.app(task_protocol=1), "retry", "old")
    assert working_site.sessions("old-0", "old-2") == {"old-0": fields(alice), "old-2": fields(alice)}


def test_all_fields_of_a_session_arrive(working_site: Site) -> None:
    session = Session.model_validate(
        {
            "user_agent": "Mozilla/5.0 <ü>",
            "ip_address": "::1",
            "user_id": "u-1",
            "role": "Admin",
            "email": "ünï@example.com",
            "fingerprint": "ab",
            "confirmation_type": "mail",
            "public_key_expiration": 1723460000,
            "tenant": {"id": 7},
        }
    )
    with bind(session):
        send(working_site.app(), "write", "whole")
    assert working_site.sessions("whole") == {"whole": session.model_dump()}


def test_an_eager_task_has_the_session_of_its_caller(site: Site, alice: Session) -> None:
    app = site.app(task_always_eager=True, task_store_eager_result=False)
    with binding(Bound(alice, "request-1")):
        send(app, "send", "eager")
    send(app, "write", "nobody's")
    events = site.events("eager", "nobody's")
    assert events["eager"]["session"] == fields(alice)
    assert events["eager"]["audit"] == {"request_id": "request-1"}
    assert events["nobody's"]["session"] == NOBODY


def test_only_tasks_of_the_given_app_are_touched(site: Site, alice: Session) -> None:
    site.app()
    with bind(alice):
        send(site.app(key=None), "write", "of another app")
    (headers,) = site.headers().values()
    assert HEADER not in headers


def test_a_sender_keeps_its_own_headers(site: Site, alice: Session) -> None:
    app = site.app(task_routes={"write": {"headers": {"own": "kept"}}})
    with bind(alice):
        send(app, "write", "task", task_id="routed")
        send(app, "write", "task", task_id="given", headers={"more": "kept"})
    send(app, "write", "task", task_id="nobody's")
    sent = site.headers()
    assert sent["routed"]["own"] == sent["given"]["more"] == sent["nobody's"]["own"] == "kept"
    assert [HEADER in sent[name] for name in ("routed", "given", "nobody's")] == [True, True, False]


def test_a_task_is_not_sent_where_its_session_cannot_be_found(site: Site) -> None:
    def broken() -> Session:
        raise LookupError("no such user")

    app = site.app()
    with binding(Pending(lambda: (Session(), ""), broken)), pytest.raises(LookupError):
        send(app, "write", "never")
    assert site.headers() == {}


REFUSED: dict[str, Callable[[Celery], None]] = {
    "short": partial(carry_sessions, key="x" * 15),
    "short in UTF-8": partial(carry_sessions, key=[KEY, "ü" * 7]),
    "none": partial(carry_sessions, key=[]),
    "no string": partial(carry_sessions, key=[KEY, 5]),  # type: ignore[list-item]
    "age zero": partial(carry_sessions, key=KEY, max_age=0),
    "age negative": partial(carry_sessions, key=KEY, max_age=timedelta(seconds=-1)),
    "age nan": partial(carry_sessions, key=KEY, max_age=float("nan")),
    "age text": partial(carry_sessions, key=KEY, max_age="1 h"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_make_no_sense_are_refused(site: Site, case: str) -> None:
    with pytest.raises(InvalidSetting) as refused:
        REFUSED[case](site.app(key=None))
    assert "xxx" not in str(refused.value)
    assert str(KEY) not in str(refused.value)


def test_what_is_no_app_or_carries_sessions_already_is_refused(site: Site) -> None:
    with pytest.raises(InvalidSetting, match="must be a Celery app"):
        carry_sessions(object(), key=KEY)  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting, match="already"):
        carry_sessions(site.app(), key=KEY)


def test_the_snippet_carries_the_session(site: Site, alice: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site.directory)
    names = snippet("Celery")
    configure(names["app"], site.directory)
    with bind(alice):
        names["upgrade"].delay("talos-default", "1.30.1")
    site.work("snippet")
    assert site.sessions("talos-default") == {"talos-default": fields(alice)}
    names["app"].close()
    names["audit"].close()
