"""The server as a process: SIGTERM lets what runs finish, or tells it that time is up."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from autopar.serve.http.app import create_app
from autopar.serve.http.options import Options
from autopar.serve.http.server import bind, run
from tests.serve_http_fakes import Story, told

model, listener = told(Story(pace=0.02)), bind("127.0.0.1", 0)
app = create_app(model, Options(drain={drain}))
run(app, listener, lambda: print(listener.getsockname()[1], flush=True))
model.engine.close()
print("closed", flush=True)
"""


@pytest.mark.parametrize("drain", [10.0, 0.3])
def test_sigterm_drains_and_stops(drain: float):
    program = PROGRAM.format(root=str(Path(__file__).parent.parent), drain=drain)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    url = f"http://127.0.0.1:{int(process.stdout.readline())}"
    body = {"prompt": "x", "max_tokens": 50, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
        lines = (line for line in answer.iter_lines() if line)
        first = next(lines)
        killer = threading.Thread(target=process.send_signal, args=(signal.SIGTERM,))
        killer.start()
        rest = [first, *lines]
    killer.join()
    assert rest[-1] == "data: [DONE]"
    last = json.loads(rest[-2].removeprefix("data: "))
    if drain > 1:
        assert last["choices"][0]["finish_reason"] == "length"
    else:
        assert last["error"]["code"] == "shutting_down"
    assert process.wait(20) == 0
    assert process.stdout.read() == "closed\n"
    process.stdout.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_waiting_for_a_body_has_an_end():
    from autopar.serve.http.options import Limits, Options
    from tests.serve_http_fakes import serving, told

    def halting():
        yield b'{"prompt":'
        time.sleep(0.5)

    with serving(told(), Options(limits=Limits(body_seconds=0.2))) as url:
        headers = {"content-type": "application/json"}
        got = httpx.post(f"{url}/v1/completions", content=halting(), headers=headers)
        assert got.status_code == 408 and got.json()["error"]["code"] == "timeout"
