"""How the ``gradagree`` command ends where what it prints finds no room, or no reader."""

import os
import sys
from contextlib import suppress
from typing import Any

import typer
from typer.core import TyperGroup


class Command(TyperGroup):
    """The command, which says in one sentence that it cannot print, and ends with status 1."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        try:
            try:
                return super().main(*arguments, **options)
            finally:
                if sys.stdout is not None:  # as where it was closed
                    sys.stdout.flush()
        except (OSError, SystemExit) as end:
            # Where nobody reads on, Click has ended it by then, without a word.
            failure = end.__context__ if isinstance(end, SystemExit) else end
            if not isinstance(failure, OSError) or failure.filename is not None:
                raise
            with suppress(OSError):  # there may be no room for the sentence either
                typer.echo(
                    f"gradagree: what it prints cannot be written: {failure.strerror}; the files "
                    "that it has written are whole",
                    err=True,
                )
            discard_output()
            sys.exit(1)


class Errors:
    """Standard error; what finds no room there is left out, and is no reason to end a study."""

    @property
    def stream(self) -> Any:
        """The real one, where Rich has put another in its place to print above a moving bar."""
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    def write(self, text: str) -> int:
        with suppress(OSError):
            if self.stream is not None:
                self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            if self.stream is not None:
                self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        if name == "rich_proxied_file":  # which is asked of what has taken its place
            raise AttributeError(name)
        return getattr(self.stream, name)


def discard_output() -> None:
    """Has what Python still holds of it, and writes at its end, go nowhere."""
    with suppress(OSError):  # no file, as in a test
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
