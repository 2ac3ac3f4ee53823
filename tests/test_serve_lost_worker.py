"""A worker lost in mid-generation, over HTTP: its client hears of it, the server comes back and answers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

pytestmark = pytest.mark.slow
OPTIONS = ["opt-tiny", "--weights", "random", "--cluster", "1xT4,1xV100-16GB", "--emulate", "--stages", "2"]
BODY = {"prompt": "once", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
SOON = 10.0
"""Seconds in which a client hears that its answer is lost."""


@contextlib.contextmanager
def serving(folder: str) -> Iterator[tuple[str, psutil.Process]]:
    """`autopar serve` over two workers on an emulated Ray cluster: (address, process)."""
    command = [sys.executable, "-c", "from autopar.cli import main; main()", "serve", *OPTIONS]
    command += ["--port", "0", "--max-length", "128", "--compiled", folder]
    environment = {**os.environ, "XLA_FLAGS": ""}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout
            ready = process.stdout.readline()
            assert " is ready after " in ready, "it did not start; its message is above"
            yield ready.split(": ", 1)[1].strip().rstrip("/"), psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0


def workers(server: psutil.Process) -> list[psutil.Process]:
    """The processes of its stages."""
    return [p for p in server.children(recursive=True) if "StageWorker" in " ".join(p.cmdline())]


def answer(url: str) -> str:
    got = httpx.post(f"{url}/v1/completions", json=BODY, timeout=300)
    assert got.status_code == 200, got.text
    return got.json()["choices"][0]["text"]


def cut_off(url: str, kill: psutil.Process) -> tuple[dict, float]:
    """Kills a process when an answer has begun: (the last event, seconds until it came)."""
    events: list[str] = []
    killed = 0.0
    with httpx.stream("POST", f"{url}/v1/completions", json=BODY | {"stream": True}, timeout=60) as got:
        for line in got.iter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
            if len(events) == 1 and not killed:
                kill.kill()
                killed = time.monotonic()
    assert events.pop() == "[DONE]"
    return json.loads(events[-1]), time.monotonic() - killed


def test_a_lost_workers_client_hears_of_it_and_the_next_is_answered(tmp_path):
    with serving(str(tmp_path)) as (url, server):
        want = answer(url)
        assert len(workers(server)) == 2
        last, seconds = cut_off(url, workers(server)[-1])
        assert seconds < SOON, f"the client heard after {seconds:.1f} s"
        assert set(last["error"]) == {"message", "type", "param", "code"}
        assert last["error"]["type"] == "server_error" and last["error"]["code"] == "engine_failed"
        assert "Traceback" not in last["error"]["message"]

        health = httpx.get(f"{url}/health")
        assert health.status_code == 503 and health.json()["status"] == "restarting"
        said = health.json()["last_error"]
        assert "stage" in said and "its process died" in said, said
        began = time.monotonic()
        assert answer(url) == want, "a request that comes meanwhile waits"
        print(f"heard after {seconds:.1f} s: {last['error']['message']}")
        print(f"answered again {time.monotonic() - began:.1f} s later")

        health = httpx.get(f"{url}/health")
        assert health.status_code == 200 and health.json()["restarts"] == 1
        assert health.json()["last_error"] == said and health.json()["seconds_since_error"] > 0
        assert len(workers(server)) == 2
        assert answer(url) == want
    assert not psutil.pid_exists(server.pid)
    assert any(tmp_path.iterdir()), "compiled programs are kept"
