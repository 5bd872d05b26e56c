"""The supervisor, around children that end in all the ways that servers do. No engine is started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from server.commands import serve
from server.errors import Exit
from server.supervisor import RESTARTS, Supervisor

ROOT = Path(__file__).resolve().parents[2]
# Always in a process of its own: it ends all children that it has.
SUPERVISE = (
    "import sys; from server import supervisor; supervisor.FIRST_PAUSE, supervisor.WINDOW = {pause}, {window}; "
    "sys.exit(supervisor.Supervisor(sys.argv[1:]).run())"
)


def supervised(*command: str, pause: float = 0.001, window: float = 600) -> subprocess.Popen[bytes]:
    program = SUPERVISE.format(pause=pause, window=window)
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", program, *command], cwd=ROOT, stdout=pipe, stderr=pipe)


def result(process: subprocess.Popen[bytes]) -> tuple[int, list[str]]:
    """Exit code, and what the supervisor said."""
    _, said = process.communicate(timeout=60)
    return process.returncode, said.decode().splitlines()


def plan(tmp_path: Path, *codes: int) -> list[str]:
    """A command that ends with these exit codes (negative: by this signal), one after the other."""
    log = tmp_path / "log"
    log.touch()
    program = (
        f"import os, sys; log = {str(log)!r}; turn = os.path.getsize(log); open(log, 'a').write('x'); "
        f"code = {[int(code) for code in codes]}[turn]; os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)"
    )
    return [sys.executable, "-c", program]


@pytest.mark.parametrize(
    ("codes", "ends", "runs"),
    [
        ((0,), 0, 1),
        ((Exit.ENGINE, 0), 0, 2),
        ((-signal.SIGKILL, 1, Exit.MEMORY, 0), 0, 4),  # memory of the killed one may take a while to be free
        ((Exit.MODEL,), Exit.MODEL, 1),
        ((Exit.USAGE,), Exit.USAGE, 1),
        ((Exit.INTERRUPTED,), Exit.INTERRUPTED, 1),
        ((-signal.SIGTERM,), 128 + signal.SIGTERM, 1),
        ((Exit.ENGINE,) * 9, Exit.ENGINE, 1 + RESTARTS),
        ((-signal.SIGKILL,) * 9, 128 + signal.SIGKILL, 1 + RESTARTS),
    ],
)
def test_what_is_started_again(tmp_path: Path, codes: tuple[int, ...], ends: int, runs: int) -> None:
    assert result(supervised(*plan(tmp_path, *codes)))[0] == ends
    assert (tmp_path / "log").stat().st_size == runs


def test_the_log_says_what_happened(tmp_path: Path) -> None:
    assert result(supervised(*plan(tmp_path, -9, 7, 0)))[1] == [
        "longreach: supervisor: the server ended by itself after 0 s: SIGKILL",
        "longreach: supervisor: restart 1 of at most 5 in 600 s comes in 0.001 s",
        "longreach: supervisor: the server ended by itself after 0 s: exit code 7 (engine)",
        "longreach: supervisor: restart 2 of at most 5 in 600 s comes in 0.002 s",
    ]


def test_old_restarts_are_forgotten(tmp_path: Path) -> None:
    assert result(supervised(*plan(tmp_path, *(7,) * 8, 0), window=0))[0] == 0


def child_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    """Once it is ready."""
    assert process.stdout
    return psutil.Process(int(process.stdout.readline()))


DRAINS = "import os, signal, sys, time; signal.signal({signal}, lambda *_: (time.sleep(.2), sys.exit({code})));" \
    " print(os.getpid(), flush=True); time.sleep(60)"  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_the_server_may_drain(number: signal.Signals) -> None:
    process = supervised(sys.executable, "-c", DRAINS.format(signal=int(number), code=0))
    child_of(process)
    process.send_signal(number)
    assert process.wait(20) == 0


def test_a_stop_between_two_starts(tmp_path: Path) -> None:
    """It doesn't wait for its next start."""
    process = supervised(sys.executable, "-c", "import os; os.abort()", pause=3600)
    assert process.stderr
    while b"restart 1" not in process.stderr.readline():
        pass
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGABRT


def test_a_killed_server_leaves_no_engine() -> None:
    """Its engine, which heeds no signal, and the engine's worker, in a session of its own."""
    engine = (
        "import os, signal, subprocess, sys, time; signal.signal(15, signal.SIG_IGN); command = [sys.executable, '-c', "
        "'import time; time.sleep(60)']; worker = subprocess.Popen(command, start_new_session=True); "
        "print(os.getpid(), worker.pid, flush=True); time.sleep(60)"
    )
    server = f"import subprocess, sys; subprocess.call([sys.executable, '-c', {engine!r}])"
    process = supervised(sys.executable, "-c", server)
    assert process.stdout
    engines = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    engines[0].parent().kill()
    again = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]  # the next server has started
    assert not any(one.is_running() for one in engines)
    process.terminate()
    process.wait(20)
    assert not any(one.is_running() for one in again)


def test_a_killed_supervisor_stops_its_server() -> None:
    process = supervised(sys.executable, "-c", DRAINS.format(signal=int(signal.SIGTERM), code=0))
    child = child_of(process)
    process.kill()
    process.wait(20)
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_the_flag_starts_it_with_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(self: Supervisor) -> int:
        seen.append(self.command)
        return Exit.ENGINE

    monkeypatch.setattr(Supervisor, "run", run)
    with pytest.raises(SystemExit) as end:
        serve.run(["MODEL", "--supervise", "--port", "1"])
    assert end.value.code == Exit.ENGINE
    assert seen == [[sys.executable, "-m", "server.cli", "serve", "MODEL", "--port", "1"]]


def test_it_is_small() -> None:
    """It must not hold what the server needs."""
    code = "import sys, server.supervisor; sys.exit(bool({'vllm', 'torch', 'pydantic'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, env={**os.environ}).returncode == 0
