"""`regard serve`: serve a language model with OpenAI's HTTP API."""

from __future__ import annotations

import errno
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from regard.cli.arguments import only_beside, read_integers
from regard.cli.console import console, emit, errors
from regard.cli.options import DEVICE, JSON, PLUGINS
from regard.contract import Unsupported, one_of
from regard.workbench.plugins import enter_plugins

if TYPE_CHECKING:
    from regard.serving.bench import Load

KEY = "REGARD_API_KEY"
LOOPBACK = "127.0.0.1"


OF_BENCH = ("clients", "requests", "prompt_tokens", "new_tokens", "shared_tokens", "url", "output")


def serve(
    given: typer.Context,
    folder: Annotated[
        Path | None,
        typer.Argument(help="Folder of regard train, compress or retrofit, a folder of transformers, or a .gguf file."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all addresses of this machine.")
    ] = LOOPBACK,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name by which clients call the model; the folder's name when not given.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Answers that are generated at the same time.")] = 16,
    waiting: Annotated[
        int, typer.Option(help="Requests that may wait; further ones are rejected with status 429.")
    ] = 128,
    context: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of tokens of a prompt and its answer together; the model's limit when not given."
        ),
    ] = None,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens whose keys and values are kept; when not given, as many as all rows may need, up to a quarter of the memory."
        ),
    ] = None,
    chunk: Annotated[
        int, typer.Option(help="Tokens of a new prompt to read between two tokens of the answers in progress.")
    ] = 256,
    prefix_cache: Annotated[
        bool,
        typer.Option(
            "--prefix-cache/--no-prefix-cache", help="Read the beginning that prompts have in common only once."
        ),
    ] = True,
    offload: Annotated[
        int,
        typer.Option(
            help="Processes that keep keys and values and attend to them, in addition to the model's; 0 for none.",
            min=0,
        ),
    ] = 0,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a Jinja template for chats, instead of the model's own.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Maximum seconds for an answer, including waiting.")] = 600.0,
    drain: Annotated[int, typer.Option(help="Maximum seconds to finish answers after SIGTERM.", min=0)] = 30,
    max_body: Annotated[int, typer.Option(help="Maximum size of a request in bytes.")] = 4 << 20,
    dtype: Annotated[str, typer.Option(help="Type of the weights: float32 or bfloat16.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="Threads of torch; torch chooses when not given.")] = None,
    bench: Annotated[bool, typer.Option("--bench", help="Measure under load instead, and exit.")] = False,
    clients: Annotated[
        str, typer.Option(help="With --bench: numbers of simultaneous clients, tried one after the other.")
    ] = "1,4,16",
    requests: Annotated[int, typer.Option(help="With --bench: requests per client.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(help="With --bench: tokens in a prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="With --bench: tokens in an answer.")] = 128,
    shared_tokens: Annotated[
        int, typer.Option(help="With --bench: tokens at the beginning that all prompts share.")
    ] = 0,
    url: Annotated[
        str | None, typer.Option(help="With --bench: another OpenAI-compatible server, instead of a folder.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="With --bench: folder for the picture and the figures.")] = None,
    plugins: PLUGINS = None,
    device: DEVICE = "cpu",
    as_json: JSON = False,
) -> None:
    """Serve a language model over HTTP with OpenAI's API: completions and chats, whole or streamed.

    Requests are batched together, and join and leave the batch at every token. Only this machine can connect unless
    --host says otherwise; if the environment variable REGARD_API_KEY is set, clients must send its value as their key.

    Examples:

    \b
        regard serve my_model
        REGARD_API_KEY=secret regard serve smollm2/ --host 0.0.0.0 --rows 32
        curl localhost:8000/v1/completions -d '{"prompt": "Once", "max_tokens": 20}'
        regard serve my_model --bench --clients 1,4,16 --output runs/load
    """
    enter_plugins(plugins)
    if folder is None and url is None:
        raise Unsupported("no model to serve", supported="regard serve FOLDER, or --bench --url URL")
    if folder is not None and url is not None:
        raise Unsupported("a folder together with --url", supported="one of them")
    if not bench:
        only_beside(given, "--bench", OF_BENCH)
    import torch

    one_of("dtype", dtype, ("float32", "bfloat16"))
    if threads is not None:
        torch.set_num_threads(threads)
    load: Load | None = None
    if bench:
        from regard.core.files import check_folder
        from regard.serving.bench import Load

        if output is not None:
            check_folder(output)
        load = Load(read_integers("--clients", clients), requests, prompt_tokens, new_tokens, shared_tokens)
    if folder is None:
        assert url is not None and load is not None
        _measure(url, load, None, name, output, as_json)
        return
    from regard.serving.app import Server, ServerLimits
    from regard.serving.engine import Engine, Limits
    from regard.serving.opened import open_model
    from regard.serving.run import Running, run
    from regard.serving.service import Service

    limits = Limits(rows=rows, waiting=waiting, chunk=chunk, context=context, prefix_cache=prefix_cache)
    server_limits = ServerLimits(body=max_body, seconds=timeout)
    template = None if chat_template is None else _read(chat_template)
    sizes: dict[str, Any] = {"rows": rows, "context": context, "cache_tokens": cache_tokens}
    with listen(host, 0 if bench else port) as listening:
        opened = open_model(
            folder, device=device, template=template, dtype=getattr(torch, dtype), offload=offload, **sizes
        )
        try:
            engine = Engine(opened.reader, limits)
            key = os.environ.get(KEY)
            server = Server(Service(engine), opened.text, name or opened.name, limits=server_limits, key=key)
            address = f"http://{host}:{listening.getsockname()[1]}"
            if load is not None:
                with Running(server, listening):
                    _measure(address, load, engine.reader.vocab_size, server.name, output, as_json)
                return
            listening.listen()  # clients that read the address may connect at once and wait for the little that is left
            if as_json:
                emit(
                    {
                        "url": f"{address}/v1",
                        "model": server.name,
                        "described": opened.described,
                        "context": engine.context,
                    }
                )
                sys.stdout.flush()
            else:
                said = f"{address}/v1 · model {server.name} · {opened.described} · up to {engine.context} tokens"
                errors.print(Text(f"serving {said}"), soft_wrap=True)
            run(server, listening, drain)
        finally:
            opened.close()


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket to an address before anything slow is done; it starts listening once the model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise Unsupported(
            f"listening at {host}:{port} ({error.strerror or error})",
            supported="an address of this machine and a port that is free",
            nearest=f"--host {LOOPBACK}" if error.errno == errno.EADDRNOTAVAIL else f"--port {(port + 1) % 65536}",
        ) from None
    return made


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Unsupported(f"the chat template {path} ({error})", supported="a text file") from None


def _measure(
    url: str, load: Load, vocab_size: int | None, model: str | None, output: Path | None, as_json: bool
) -> None:
    from regard.serving.bench import measure, save

    rows: list[dict[str, Any]] = []
    for row in measure(url, load, vocab_size=vocab_size, model=model, key=os.environ.get(KEY)):
        rows.append(row)
        if not as_json:
            errors.print(f"{row['clients']} clients: {row['tokens_per_second']:.1f} tokens/s", soft_wrap=True)
    saved = None if output is None else save(rows, load, output, model or url)
    if as_json:
        emit({"load": load.as_record(), "rows": rows, "picture": None if saved is None else str(saved)})
        return
    console.print(table_of(rows))
    if saved is not None:
        console.print(Text(f"picture: {saved}"))


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Figures for each number of clients: tokens per second, milliseconds before the first token and between tokens."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("clients", "tokens/s", "first p50", "first p99", "between p50", "between p99", "errors"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = [row[f"{kind}_{p}"] for kind in ("first", "between") for p in ("p50", "p99")]
        table.add_row(
            str(row["clients"]),
            f"{row['tokens_per_second']:.1f}",
            *("—" if t is None else f"{1e3 * t:.0f} ms" for t in times),
            str(row["errors"]),
        )
    return table
