"""`utune-deploy`: the front door. Each verb is a file in `verbs/`; errors end here, with their code.

0 ok   1 unexpected   2 usage   3 numeric check failed   4 incompatible artefact
5 dependency or device missing   6 engine build failed
"""

from __future__ import annotations

import sys
from importlib import import_module
from keyword import iskeyword
from typing import Any

import click

from ..merge.errors import UtuneError
from .verbs import GROUPS

EXIT_CODES = """\
Exit codes: 0 ok, 1 unexpected, 2 usage, 3 numeric check failed, 4 incompatible artefact,
5 dependency or device missing, 6 engine build failed.
"""
ERROR = click.style("error:", fg="red", bold=True)


class Verbs(click.Group):
    """The verbs, loaded when they are called or listed, shown by what they are for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs, in the order of the help."""
        return [verb for verbs in GROUPS.values() for verb in verbs]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A verb by name."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = f"{cmd_name}_" if iskeyword(cmd_name) else cmd_name.replace("-", "_")
        return import_module(f".verbs.{module}", __package__).command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The verbs under their headings."""
        for heading, verbs in GROUPS.items():
            with formatter.section(heading):
                formatter.write_dl(list(verbs.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The exit codes."""
        formatter.write_paragraph()
        formatter.write(EXIT_CODES)


def _print_versions(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if not asked:
        return
    from .versions import versions

    width = max(map(len, versions()))
    click.echo("\n".join(f"{name:{width}}  {found}" for name, found in versions().items()))
    ctx.exit()


@click.command(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_versions,
    help="Versions of every library that matters.",
)
@click.option("-v", "--verbose", count=True, help="Say more; twice for tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but the result and errors.")
@click.pass_context
def main_group(ctx: click.Context, verbose: int, quiet: bool) -> None:
    """Merge, export and serve parameter-efficient tuners over one shared frozen backbone."""
    from .console import Console

    ctx.obj = Console(verbosity=verbose, quiet=quiet)


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line and leave with an exit code."""
    try:
        code = main_group.main(args=arguments, prog_name="utune-deploy", standalone_mode=False)
    except UtuneError as error:
        click.echo(f"{ERROR} {error}", err=True)
        if "-vv" in (arguments or sys.argv):
            raise
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        usage = getattr(error, "ctx", None)
        if usage is not None:
            click.echo(usage.get_usage(), err=True)
        click.echo(f"{ERROR} {error.format_message()}", err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
