"""`autopar serve`: a model behind HTTP."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autopar.core.errors import BadInput

if TYPE_CHECKING:
    from autopar.serve.http.options import Options

SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
NEEDS = (
    "serving needs more packages: pip install 'autopar[serve]' (with the small default model: autopar[demo])"
)


class Size(click.ParamType):
    """Bytes, such as 4M."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        number, unit = value.rstrip("KMGB").strip(), value.rstrip("B")[-1:].lstrip("0123456789")
        if not number.isdigit() or unit not in SIZES:
            self.fail(f"{value!r} is no size; expected e.g. 65536, 512K or 4M", param, ctx)
        return int(number) * SIZES[unit]


@click.command()
@click.argument("model", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on; 0.0.0.0 is all")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 picks one")
@click.option(
    "--api-key",
    "keys",
    multiple=True,
    metavar="KEY[=WEIGHT]",
    help="let in only who sends this key; may be repeated, each gets its share by weight",
)
@click.option("--api-key-file", type=click.Path(exists=True, dir_okay=False), help="such keys, one a line")
@click.option(
    "--cluster",
    "-c",
    "cluster_text",
    metavar="FILE",
    help="a cluster file (*.yaml) or e.g. 8xA100-40GB,4xT4; the default is this machine",
)
@click.option("--ray", is_flag=True, help="run on the Ray cluster this machine belongs to")
@click.option("--ray-address", metavar="ADDRESS", help="run on the Ray cluster at this address")
@click.option(
    "--emulate", is_flag=True, help="make up the cluster's nodes on this machine (Ray, host devices)"
)
@click.option("--weights", type=click.Choice(["random"]), help="random weights, for any known model")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="of weights and KV cache"
)
@click.option("--int8", is_flag=True, help="weights in int8, a scale per channel; quantised while read")
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    help="tokens of the longest sequence, prompt and answer together",
)
@click.option(
    "--cache-tokens",
    type=click.IntRange(min=1),
    help="tokens that the KV cache holds; the default fills memory",
)
@click.option(
    "--stages", type=click.IntRange(min=1), help="exactly so many pipeline stages; the default chooses"
)
@click.option("--chat-template", type=click.Path(exists=True, dir_okay=False), help="a Jinja file for chats")
@click.option(
    "--served-as", multiple=True, metavar="NAME", help="a further name of the model; may be repeated"
)
@click.option(
    "--max-waiting",
    default=1024,
    show_default=True,
    type=click.IntRange(min=1),
    help="requests in the queue; one more is answered 429",
)
@click.option("--max-waiting-tokens", type=click.IntRange(min=1), help="tokens that these may need together")
@click.option("--max-body", default="4M", show_default=True, type=Size(), help="bytes of a request's body")
@click.option(
    "--max-n", default=16, show_default=True, type=click.IntRange(min=1), help="of n, best_of, num_beams"
)
@click.option("--max-prompts", default=256, show_default=True, type=click.IntRange(min=1), help="per request")
@click.option("--max-logprobs", default=20, show_default=True, type=click.IntRange(1, 100), help="per token")
@click.option(
    "--prefix-cache/--no-prefix-cache", default=True, show_default=True, help="keep prompts' KV blocks"
)
@click.option(
    "--drain",
    default=30.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="seconds that requests under way get to finish after SIGTERM",
)
@click.option(
    "--allow-origin", multiple=True, metavar="URL", help="a web origin whose pages may call; * is all"
)
@click.option(
    "--compiled",
    metavar="FOLDER",
    help="where compiled programs are kept for the next start; the default is in your cache folder",
)
@click.option("--forget-compiled", is_flag=True, help="do not keep compiled programs")
@click.option("--access-log", is_flag=True, help="log every request")
def serve(model: str | None, host: str, port: int, access_log: bool, **options: Any) -> None:  # fmt: skip
    """Serves MODEL over HTTP, as OpenAI's API does, with a page to try it at /.

    MODEL is a directory in Hugging Face's format or the name of a known one; without it the small model of
    autopar[demo] is served.
    """
    try:
        from autopar.serve.http.app import create_app
        from autopar.serve.http.server import bind, run
    except ImportError as error:
        raise BadInput(f"{NEEDS} ({error.name} is missing)") from None
    settings = _service_options(options)
    with bind(host, port) as listener:  # before loading: a port in use is cheap to find out
        started = time.monotonic()
        with _spinner("loading") as say:
            loaded = _load(model, say, **options)
        try:
            app = create_app(loaded, settings)
            took = time.monotonic() - started
            run(app, listener, lambda: _greet(app, listener, took), "info" if access_log else "warning")
        finally:
            loaded.close()
    click.echo("stopped", err=True)


def _service_options(options: dict[str, Any]) -> Options:
    from autopar.serve.http.options import Limits, Options

    return Options(
        limits=Limits(
            body=options["max_body"],
            prompts=options["max_prompts"],
            choices=options["max_n"],
            logprobs=options["max_logprobs"],
        ),
        keys=frozenset(_keys(options)),
        drain=options["drain"],
        origins=options["allow_origin"],
        served_as=options["served_as"],
    )


def _keys(options: dict[str, Any]) -> dict[str, float]:
    from autopar.serve.http.options import parse_keys

    file = options["api_key_file"]
    lines = Path(file).read_text(encoding="utf-8").split("\n") if file else []
    return dict(parse_keys([*options["keys"], *(line.strip() for line in lines if line.strip())]))


def _load(model: str | None, say: Callable[[str], None], **options: Any) -> Any:
    """The model, loaded."""
    from autopar.serve.engine import Options as EngineOptions
    from autopar.serve.model import load

    template = options["chat_template"]
    return load(
        model,
        cluster=options["cluster_text"],
        backend=_backend(options),
        dtype=options["dtype"],
        quantise="int8" if options["int8"] else None,
        compiled=_compiled(options),
        weights=options["weights"],
        max_length=options["max_length"],
        tokens=options["cache_tokens"],
        stages=options["stages"],
        chat_template=Path(template).read_text(encoding="utf-8") if template else None,
        options=EngineOptions(
            queue_requests=options["max_waiting"],
            queue_tokens=options["max_waiting_tokens"],
            weights=_keys(options),
            most_answers=options["max_n"],
            prefix_cache=options["prefix_cache"],
        ),
        progress=say,
    )


def _backend(options: dict[str, Any]) -> Any:
    if not (options["ray"] or options["ray_address"] or options["emulate"]):
        return None
    from autopar.runtime.ray_backend import Ray

    cache = _compiled(options)
    return Ray(
        address=options["ray_address"],
        emulate=options["emulate"],
        cache=None if cache is None else str(cache),
    )


def _compiled(options: dict[str, Any]) -> Path | None:
    """The folder of compiled programs."""
    from autopar.runtime.cache import user_folder

    if options["forget_compiled"]:
        if options["compiled"]:
            raise BadInput("--forget-compiled keeps nothing in --compiled FOLDER; give one of them")
        return None
    return Path(options["compiled"]) if options["compiled"] else user_folder()


def _greet(app: Any, listener: socket.socket, seconds: float) -> None:
    """Says where it is and how to try it."""
    service = app.state.service
    host, port, *_ = listener.getsockname()
    here = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{here}:{port}"
    if not service.options.keys and not ipaddress.ip_address(host).is_loopback:
        click.echo(
            "anyone who can reach this port may use the model; --api-key lets in only who has a key", err=True
        )
    key = " -H 'Authorization: Bearer KEY'" if service.options.keys else ""
    if service.template:
        path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": "What is JAX?"}]}
    else:
        path, body = "/v1/completions", {"prompt": "The capital of France is", "temperature": 0}
    click.echo(f"{service.names[0]} is ready after {seconds:.1f} s: {url}/")
    kind = "-H 'Content-Type: application/json'"
    click.echo(f"  curl {url}{path} {kind}{key} -d '{json.dumps(body)}'")


@contextlib.contextmanager
def _spinner(first: str) -> Iterator[Callable[[str], None]]:
    """What is going on, on standard error: a live line on a terminal, else a line for each step."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: click.echo(text, err=True)
        return
    with console.status(first) as status:
        yield lambda text: status.update(text)
