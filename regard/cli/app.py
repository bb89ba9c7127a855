"""The command-line application: its commands by name, and its entry point."""

from __future__ import annotations

import errno
import inspect
import os
import re
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from regard.cli.advise import advise_command
from regard.cli.catalogue import list_command, show
from regard.cli.compare import compare
from regard.cli.compress import compress
from regard.cli.console import errors, plain
from regard.cli.detect_patterns import detect_patterns
from regard.cli.doctor import doctor
from regard.cli.evaluate import evaluate
from regard.cli.explain import explain
from regard.cli.generate import generate
from regard.cli.new import new
from regard.cli.offload import offload
from regard.cli.predict import predict
from regard.cli.profile import profile_command
from regard.cli.report import report
from regard.cli.reproduce import reproduce
from regard.cli.retrofit import retrofit
from regard.cli.search import search
from regard.cli.serve import serve
from regard.cli.sparse import sparse
from regard.cli.study import study
from regard.cli.train import train
from regard.cli.verify import verify
from regard.contract import Unsupported, out_of_memory
from regard.measurement import units
from regard.measurement.memory import keep_freed_memory
from regard.version import VERSION

COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_command,
    "show": show,
    "new": new,
    "verify": verify,
    "detect-patterns": detect_patterns,
    "profile": profile_command,
    "advise": advise_command,
    "compare": compare,
    "report": report,
    "search": search,
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "serve": serve,
    "offload": offload,
    "predict": predict,
    "explain": explain,
    "compress": compress,
    "sparse": sparse,
    "retrofit": retrofit,
    "reproduce": reproduce,
    "study": study,
    "doctor": doctor,
}
"""The commands, in the order of the help."""

GO_ON = frozenset({"compare", "search", "train", "compress", "sparse", "retrofit", "reproduce", "study"})
"""Commands that resume where they were interrupted."""


class Commands(TyperGroup):
    """The group of commands; handles Ctrl-C, on which typer would exit silently."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            further = "; give the same command again to resume" if ctx.invoked_subcommand in GO_ON else ""
            errors.print(f"regard: interrupted{further}")
            raise SystemExit(130) from None


app = typer.Typer(
    name="regard",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

SECONDS_FOR_THE_FIRST = 5.0
"""Time for the first of several processes to report an error and to be seen to exit."""


def _flowing(docstring: str) -> str:
    """A command's docstring, one line per paragraph for the terminal to wrap, with examples right below their
    heading."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    flowing = (part.removeprefix("\b\n") if part.startswith("\b") else part.replace("\n", " ") for part in paragraphs)
    return "\n\n".join(flowing).replace("Examples:\n\n", "Examples:\n")


for name, command in COMMANDS.items():
    app.command(name, help=_flowing(command.__doc__ or ""))(command)


def _version(asked: bool) -> None:
    if asked:
        print(f"regard {VERSION}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The attention workbench: list, verify, profile, advise on and compare attention mechanisms on your data and machine."""


parser = typer.main.get_command(app)
"""Built once: building it takes longer than many commands."""


def main() -> None:
    """Run the command line. A request that cannot be honoured ends with exit code 2 and one clear line.

    Running out of memory or disk space ends the same way. When torchrun starts several processes on a machine, most
    fail with the same error: the first one reports it, upon which torchrun ends the others; a process that is still
    alive after a while reports it too.
    """
    keep_freed_memory()
    try:
        parser(standalone_mode=True)
    except Unsupported as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(SECONDS_FOR_THE_FIRST)
        errors.print(plain(f"regard: {error}"), soft_wrap=True)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" for {error.filename}" if error.filename else ""
        errors.print(plain(f"regard: no space left on the device{where}"), soft_wrap=True)
        raise SystemExit(2) from None
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        asked = re.search(r"tried to allocate (\d+) bytes", str(error))
        wanted = f" ({units.size(int(asked[1]))} at once)" if asked else ""
        errors.print(f"regard: not enough memory{wanted}: take less at a time, or something smaller", soft_wrap=True)
        raise SystemExit(2) from None
