"""`autopar serve` as a person meets it: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from autopar.cli import main
from autopar.cli.serve import Size, _greet
from autopar.serve.http.options import Options
from autopar.serve.http.server import bind

PROGRAM = f"""
import sys, types
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from tests.serve_http_fakes import Story, told

def load(name, *, options, chat_template, progress, **more):
    progress("reading weights")
    model = told(template=chat_template, queue_requests=options.queue_requests, weights=options.weights)
    model.close = model.engine.close
    return model

sys.modules["autopar.serve.model"] = types.SimpleNamespace(load=load)
from autopar.cli import main
main()
"""


def test_it_says_where_it_is_and_how_to_try_it(tmp_path: Path):
    (tmp_path / "keys").write_text("alpha=2\n\nbeta\n")
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    options = [
        "--port",
        "0",
        "--api-key-file",
        str(tmp_path / "keys"),
        "--chat-template",
        str(tmp_path / "chat.jinja"),
    ]
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        "serve",
        "story",
        *options,
        "--max-n",
        "2",
        "--served-as",
        "tale",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        first, curl = process.stdout.readline(), process.stdout.readline()
        assert first.startswith("story is ready after ") and first.endswith("/\n")
        words = shlex.split(curl)
        assert words[0] == "curl" and words[2:4] == ["-H", "Content-Type: application/json"]
        body = json.loads(words[words.index("-d") + 1]) | {"model": "tale", "temperature": 0}
        headers = {"Authorization": words[5].removeprefix("Authorization: ").replace("KEY", "beta")}
        got = httpx.post(words[1], json=body, headers=headers)
        assert got.json()["choices"][0]["message"]["content"]
        assert httpx.post(words[1], json=body).status_code == 401
        assert httpx.post(words[1], json={**body, "n": 3}, headers=headers).json()["error"]["param"] == "n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr.read() == "reading weights\nstopped\n"


def test_what_it_refuses_is_said_without_a_traceback(tmp_path: Path):
    taken = bind("127.0.0.1", 0)
    taken.listen()
    with taken:
        cases: list[tuple[list[str], str]] = [
            (["--port", str(taken.getsockname()[1])], "in use; give another with --port"),
            (["--port", "70000"], "not in the range"),
            (["--host", "no.such.host.invalid"], "is no address"),
            (["--port", "0", "--api-key", "a=b"], "the weight must be a positive number"),
            (["--max-body", "4X"], "expected e.g. 65536, 512K or 4M"),
            (["--chat-template", str(tmp_path / "none")], "does not exist"),
        ]
        for options, words in cases:
            result = CliRunner().invoke(main, ["serve", *options])
            assert result.exit_code and words in result.output and "Traceback" not in result.output, options


@pytest.mark.parametrize(
    ("host", "keys", "shown", "warns"),
    [
        ("127.0.0.1", (), "http://127.0.0.1:80/", False),
        ("::1", (), "http://[::1]:80/", False),
        ("0.0.0.0", (), "http://127.0.0.1:80/", True),
        ("0.0.0.0", ("k",), "http://127.0.0.1:80/", False),
    ],
)
def test_an_open_port_without_keys_is_warned_of(
    host: str, keys: tuple[str, ...], shown: str, warns: bool, capsys: pytest.CaptureFixture[str]
):
    service = SimpleNamespace(options=Options(keys=frozenset(keys)), template=None, names=("story",))
    app: Any = SimpleNamespace(state=SimpleNamespace(service=service))
    listener: Any = SimpleNamespace(getsockname=lambda: (host, 80))
    _greet(app, listener, 1.0)
    told = capsys.readouterr()
    assert shown in told.out and ("Bearer" in told.out) == bool(keys)
    assert ("anyone" in told.err) == warns


@pytest.mark.parametrize(
    ("text", "size"), [("65536", 65536), ("512K", 512 << 10), ("4M", 4 << 20), ("1GB", 1 << 30)]
)
def test_sizes(text: str, size: Any):
    assert Size().convert(text, None, None) == size
