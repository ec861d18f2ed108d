"""Entry point: finds subcommands without importing them, turns errors into one line and an exit code."""

from __future__ import annotations

import gc
import importlib
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import click

from graphopt.errors import GraphoptError
from graphopt.interrupts import end_all, watch_signals

# name -> (module, one-line help). The help stands here so that `graphopt --help` imports nothing.
COMMANDS: dict[str, tuple[str, str]] = {
    "optimize": ("graphopt.cli.optimize", "Rewrite a model, verify it, write it."),
    "export": ("graphopt.cli.export", "Export a torch module to ONNX and compare the two."),
    "import": ("graphopt.cli.import_", "Write the factors of a checkpoint into the graph of its network."),
    "verify": ("graphopt.cli.verify", "Compare what two models compute."),
    "bench": ("graphopt.cli.bench", "Time models against each other."),
    "inspect": ("graphopt.cli.inspect", "Show what is in a model."),
    "bundle": ("graphopt.cli.bundle", "Make a bundle one file again."),
    "passes": ("graphopt.cli.passes", "List the passes, or explain one."),
    "bisect": ("graphopt.cli.bisect", "Find the rewrite that breaks a tolerance."),
    "build": ("graphopt.cli.build", "Build an engine, on a machine with or without a GPU."),
    "package": ("graphopt.cli.package", "Write a model or an engine as a Triton Inference Server repository."),
    "selftest": ("graphopt.cli.selftest", "Build, run and compare every plugin on this machine's GPU."),
    "profile-target": ("graphopt.cli.profile_target", "Measure this machine's cost profile."),
}


class LazyGroup(click.Group):
    """A click group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="graphopt")
def graphopt() -> None:
    """Rewrite ONNX models, prove that they still compute the same, build engines.

    \b
    Start here:   graphopt optimize model.onnx
    Then:         graphopt bench model.onnx model.opt.onnx
    Exit codes:   0 done   1 nothing written, or a check failed   2 bad input
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code; never raises for a user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    verbose = "--verbose" in arguments or "-v" in arguments
    try:
        result = graphopt.main(args=arguments, prog_name="graphopt", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except GraphoptError as error:
        if verbose:
            import traceback

            traceback.print_exc()
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        return 1
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "graphopt"
        click.echo(f"error: {error.format_message()} (see: {where} --help)", err=True)
        return 2
    except BrokenPipeError:
        return 1
    except Exception as error:
        if verbose:
            raise
        click.echo(
            f"error: internal: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            " (this is a bug in graphopt; --verbose shows where)",
            err=True,
        )
        return 1


def _end(number: int, frame: FrameType | None) -> None:
    """End as an interrupt does: what was begun is taken back, and child processes are ended."""
    sys.exit(128 + number)


def run() -> None:
    """Console-script entry point."""
    signal.signal(signal.SIGTERM, _end)
    watch_signals()
    code = main()
    end_all()
    gc.freeze()  # the process ends: no need to look through every graph for what is dead
    sys.exit(code)
