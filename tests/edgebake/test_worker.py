"""Workers that finish, crash, hang, eat memory and print garbage: real processes all."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgebake.errors import StoreError, ToolchainMissing
from edgebake.worker import OUTSIDE, Exit, Limits, command, describe, supervise
from working import ENV, POSIX, Run, argv, gone


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(
        body: str, payload: Mapping[str, Any] | None = None, **options: Any
    ) -> tuple[Exit, list[Mapping[str, Any]]]:
        events: list[Mapping[str, Any]] = []
        options = {
            "limits": Limits(),
            "log": tmp_path / "logs" / "w.log",
            "env": ENV,
            "on_event": events.append,
            **options,
        }
        end = supervise(argv(tmp_path, body), payload={} if payload is None else payload, **options)
        return end, events

    return run


# --- the ordinary way ------------------------------------------------------------------------------------------------


def test_payload_goes_in_and_events_come_out_in_order(run: Run) -> None:
    payload = {"unit": "bérénice@onnx", "big": "x" * 300_000}  # more than a pipe holds
    end, events = run(
        """
        c = channel()
        for i in range(500):
            c.send({"i": i, "unit": c.payload["unit"], "size": len(c.payload["big"]), "fill": "y" * 1000})
        """,
        payload,
    )
    assert (end.reason, end.code, end.signal, end.stage) == ("finished", 0, None, OUTSIDE)
    assert [event["i"] for event in events] == list(range(500))
    assert (events[0]["unit"], events[0]["size"]) == ("bérénice@onnx", 300_000)


def test_time_and_memory_are_told_per_stage_and_per_run_of_a_stage(run: Run) -> None:
    samples: list[tuple[float, float]] = []
    end, events = run(
        """
        c = channel()
        with c.stage("small", unit="a"):
            time.sleep(0.3)
        with c.stage("large", unit="a"):
            held = bytearray(os.urandom(1 << 20)) * 200
            time.sleep(0.3)
        del held
        with c.stage("small", unit="b"):
            time.sleep(0.3)
        """,
        on_sample=lambda rss_mib, elapsed_s: samples.append((rss_mib, elapsed_s)),
    )
    assert 200 < end.peak_mib["large"] < 300
    assert 0 < end.peak_mib["small"] < 100
    assert 0.55 < end.seconds["small"] < 10
    assert 0.25 < end.seconds["large"] < 10
    ended = [(e["stage"], e["unit"], e["ok"]) for e in events if e["state"] == "end"]
    assert ended == [("small", "a", True), ("large", "a", True), ("small", "b", True)]
    peaks = [e["peak_mib"] for e in events if e["state"] == "end"]
    assert peaks[1] > 200 > 100 > max(peaks[0], peaks[2])
    assert all(0.25 < e["seconds"] < 10 for e in events if e["state"] == "end")
    assert max(rss for rss, _ in samples) > 200
    assert [s for _, s in samples] == sorted(s for _, s in samples)


def test_stages_nest_and_one_left_open_by_a_failed_unit_ends_with_the_next(run: Run) -> None:
    end, events = run(
        """
        c = channel()
        with c.stage("lower", unit="a"):
            time.sleep(0.2)
            with c.stage("compress", unit="a"):
                time.sleep(0.2)
            time.sleep(0.2)
        c.send({"stage": "trace", "state": "start", "unit": "b"})
        c.send({"stage": "load", "state": "start", "unit": "c"})
        c.send({"stage": "load", "state": "end", "unit": "c"})
        os._exit(1)
        """
    )
    assert end.stage == OUTSIDE
    seconds = {e["stage"]: e["seconds"] for e in events if e["state"] == "end"}
    assert 0.15 < seconds["compress"] < seconds["lower"] - 0.3
    assert set(end.seconds) == {OUTSIDE, "lower", "compress", "trace", "load"}


def test_the_memory_of_descendants_counts(run: Run) -> None:
    end, _ = run(
        """
        c = channel()
        with c.stage("lower"):
            code = "import time; x = bytearray(b'1') * (150 << 20); time.sleep(0.8)"
            subprocess.run([sys.executable, "-c", code])
        """
    )
    assert end.peak_mib["lower"] > 150


def test_nothing_that_is_printed_can_spoil_the_events(run: Run) -> None:
    end, events = run(
        """
        sys.stdout.write("before the channel, no newline")
        c = channel()
        print('{"stage": "fake", "state": "start"}')
        os.write(1, b'\\x1e{"fake": 1}\\n')
        libc = ctypes.CDLL(None)
        libc.puts(b'\\x1e{"fake": 2}')
        libc.fflush(None)
        subprocess.run([sys.executable, "-c", r"print('\\x1e{\\"fake\\": 3}')"])
        os.write(2, b"\\xff\\xfe not text\\n")
        c.send({"real": 1})
        print("umlaut ü", file=sys.stderr)
        print("asked:", repr(sys.stdin.readline()))
        """
    )
    assert end.reason == "finished"
    assert events == [{"real": 1}]
    log = end.log.read_bytes()
    for text in (
        b"before the channel",
        b'"stage": "fake"',
        b'{"fake": 1}',
        b'{"fake": 2}',
        b'{"fake": 3}',
        b"asked: ''",
    ):
        assert text in log
    assert "umlaut ü".encode() in log


def test_a_program_that_knows_nothing_of_channels_can_be_supervised(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import sys; print('compiled', sys.stdin.read()); sys.exit(3)"]
    end = supervise(argv, payload=None, log=tmp_path / "log", limits=Limits(timeout_s=20))
    assert (end.reason, end.code) == ("crashed", 3)
    assert end.log.read_text().strip() == "compiled"
    assert "ended with code 3" in describe(end).what


def test_command_runs_a_module_and_not_what_lies_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    end = supervise(command("json.tool", "--help"), payload=None, log=tmp_path / "log", limits=Limits())
    assert end.reason == "finished"


def test_a_program_that_is_not_there_is_a_missing_toolchain(tmp_path: Path) -> None:
    with pytest.raises(ToolchainMissing, match="qnn-compiler"):
        supervise(["qnn-compiler"], payload={}, log=tmp_path / "log", limits=Limits())


def test_a_log_that_cannot_be_written_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        supervise(command("this"), payload=None, log=tmp_path / "file" / "log", limits=Limits())


# --- crashes ---------------------------------------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize(
    "crash, number, words",
    [
        ("ctypes.string_at(0)", signal.SIGSEGV, "signal 11 (segmentation fault"),
        ("os.abort()", signal.SIGABRT, "signal 6 (abort"),
        ("os.kill(os.getpid(), signal.SIGKILL)", signal.SIGKILL, "signal 9 (killed"),
    ],
)
def test_a_crash_is_survived_and_said_in_words(run: Run, crash: str, number: int, words: str) -> None:
    end, events = run(f'c = channel()\nc.send({{"stage": "lower", "state": "start"}})\nprint("at work")\n{crash}')
    assert (end.reason, end.signal, end.code, end.stage) == ("crashed", number, None, "lower")
    assert [e["state"] for e in events] == ["start"]
    problem = describe(end)
    assert words in problem.what
    assert "in stage lower" in problem.what
    assert "at work" in problem.what
    assert problem.fix
    assert problem.where == str(end.log)
    if number == signal.SIGSEGV:
        assert "case.py" in end.log.read_text()  # the Python stack of the crash


def test_a_worker_that_ends_without_a_word_has_crashed(run: Run) -> None:
    end, _ = run('c = channel()\nc.send({"stage": "trace", "state": "start"})\nos._exit(7)')
    assert (end.reason, end.code, end.stage) == ("crashed", 7, "trace")
    assert "ended with code 7 in stage trace" in describe(end).what


def test_an_exception_names_the_stage_it_left(run: Run) -> None:
    end, events = run('c = channel()\nwith c.stage("load"):\n    pass\nwith c.stage("lower"):\n    1 / 0')
    assert (end.reason, end.code, end.stage) == ("crashed", 1, "lower")
    assert [e["ok"] for e in events if e["state"] == "end"] == [True, False]
    assert "ZeroDivisionError" in describe(end).what


def test_a_crash_while_importing_is_outside_any_stage(run: Run) -> None:
    end, _ = run("import there_is_no_such_module", {"big": "x" * 300_000})
    assert end.stage == OUTSIDE
    text = describe(end).what
    assert "outside any stage" in text
    assert "there_is_no_such_module" in text


def test_events_sent_just_before_a_crash_arrive(run: Run) -> None:
    _, events = run('c = channel()\nfor i in range(2000): c.send({"i": i})\nos._exit(1)')
    assert len(events) == 2000


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_hang_ends_at_the_limit_of_its_stage(run: Run) -> None:
    begun = time.monotonic()
    end, _ = run(
        """
        c = channel()
        for name in ("trace", "compress"):
            with c.stage(name):
                time.sleep(0.6)
        with c.stage("lower"):
            time.sleep(60)
        """,
        limits=Limits(timeout_s=1.0),
    )
    assert (end.reason, end.stage) == ("timeout", "lower")
    assert time.monotonic() - begun < 6  # the earlier stages have not used up its time
    assert "stage lower ran longer than 1 s (--timeout)" in describe(end).what


def test_a_hang_outside_of_stages_ends_too(run: Run) -> None:
    end, _ = run("time.sleep(60)", limits=Limits(timeout_s=0.5))
    assert (end.reason, end.stage) == ("timeout", OUTSIDE)
    assert "outside any stage" in describe(end).what


def test_memory_above_the_limit_ends_the_worker(run: Run) -> None:
    end, _ = run(
        """
        c = channel()
        with c.stage("lower"):
            held = []
            while True:
                held.append(bytearray(b"1") * (16 << 20))
                time.sleep(0.02)
        """,
        limits=Limits(timeout_s=30, memory_mib=200),
    )
    assert (end.reason, end.stage) == ("memory", "lower")
    assert 200 < end.peak_mib["lower"] < 500
    text = describe(end).what
    assert text.startswith("stage lower used 2")
    assert "MiB, the limit is 200.0 MiB (--memory)" in text


def test_what_the_worker_started_ends_with_it(run: Run, tmp_path: Path) -> None:
    end, events = run(
        """
        c = channel()
        sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
        pids = [subprocess.Popen(sleeper).pid, subprocess.Popen(sleeper, start_new_session=True).pid]
        c.send({"pids": pids})
        time.sleep(60)
        """,
        limits=Limits(timeout_s=1.5),
    )
    assert end.reason == "timeout"
    assert all(gone(pid, 1.0) for pid in events[0]["pids"])


@POSIX
def test_what_a_worker_leaves_running_ends_when_it_ends(run: Run) -> None:
    end, events = run(
        """
        c = channel()
        if os.fork() == 0:  # keeps the channel open
            time.sleep(60)
        else:
            sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
            c.send({"pid": subprocess.Popen(sleeper).pid})
            sys.stdout.flush()
            os._exit(0)
        """
    )
    assert end.reason == "finished"
    assert gone(events[0]["pid"], 1.0)


def test_another_thread_can_stop_a_worker(run: Run) -> None:
    stop = threading.Event()
    threading.Timer(0.4, stop.set).start()
    end, _ = run('c = channel()\nc.send({"stage": "lower", "state": "start"})\ntime.sleep(60)', stop=stop)
    assert (end.reason, end.stage) == ("interrupted", "lower")
    assert "finished stages are kept" in describe(end).fix


def test_an_exception_in_a_callback_kills_the_worker(run: Run) -> None:
    pids = []

    def on_event(event: Mapping[str, Any]) -> None:
        pids.append(event["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run('c = channel()\nc.send({"pid": os.getpid()})\ntime.sleep(60)', on_event=on_event)
    assert gone(pids[0], 1.0)
