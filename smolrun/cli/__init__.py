"""The command line: one file per verb, imported when it is called: `smolrun --help` imports no NumPy and no Numba.

Exit codes: 0 done; 1 an error, told in one line on stderr; 2 wrong usage; 130 Ctrl-C. Answers go to stdout, all else to
stderr.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Sequence

import click

from smolrun.cli.options import Settings, verbose_option
from smolrun.errors import OptionError, SmolrunError

VERBS = (
    *("chat", "generate", "batch", "info", "train", "quantize", "compile", "verify", "bench"),
    *("pull", "list", "rm", "warmup", "cache", "doctor"),
)


class _Verbs(click.Group):
    """`smolrun NAME` is the `command` of smolrun/cli/NAME.py."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        there = {module.name for module in pkgutil.iter_modules(__path__)}  # in a bundle some of them
        return [name for name in VERBS if name in there]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"smolrun.cli.{name}").command
        return command


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        import smolrun

        click.echo(f"smolrun {smolrun.__version__}")
        ctx.exit()


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print it.")
@verbose_option
def cli() -> None:
    """Run SmolLM2 on this CPU.

    MODEL is a .gguf file, a folder with safetensors, a Hub name (owner/repo, owner/repo@revision, owner/repo:file.gguf,
    owner/repo:Q4_K_M) or one of 135m, 360m, 1.7b, each also with -base. Without one the default model is taken.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit code."""
    settings = Settings()
    for stream in (sys.stdout, sys.stderr):  # an answer may hold what a legacy code page has no letter for
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = cli.main(args=arguments, prog_name="smolrun", standalone_mode=False, obj=settings)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:
        # the reader left; without this the interpreter would complain about it once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SmolrunError, OSError) as error:
        if settings.verbose:
            traceback.print_exc()
        click.echo(f"smolrun: {' '.join(str(error).split())}", err=True)
        return 2 if isinstance(error, OptionError) else 1
