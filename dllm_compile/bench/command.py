"""What the commands share: one sentence for a mistake, before anything is computed."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from dllm_compile.interface.mechanism import nearest


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one sentence, exit status 2, with the nearest flag for one that there is not."""

    def parse_args(self, argv: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As ``argparse``, but an unknown flag is answered with the nearest."""
        given, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            wrong = unknown[0].partition("=")[0]
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            self.error(
                f"there is no argument {wrong!r}; did you mean {nearest(wrong, flags)}? Flags: {', '.join(flags)}"
            )
        return given

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and leave."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def whole(least: int = 1) -> Callable[[str], int]:
    """A type of flags: a whole number of at least ``least``."""

    def read(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return read


def share(text: str) -> float:
    """A type of flags: a share from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 to 1")
    return value


def interval(text: str) -> int:
    """A type of flags: steps between refreshes."""
    if text != "-1" and not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of steps of at least 1, nor -1 for every step")
    return int(text)


def target(text: str) -> str:
    """A type of flags: a file that can be written."""
    folder = os.path.dirname(text) or "."
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"{text!r} is in no folder that there is; make {folder!r} first")
    if os.path.isdir(text) or not os.path.basename(text):
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; give the name of a file")
    if not os.access(text if os.path.exists(text) else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written; give a file of yours")
    return text


def picture(text: str) -> str:
    """A type of flags: a PNG file that can be written."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} is no PNG file; give a name that ends with .png")
    return target(text)


def require(parser: Parser, extra: str, *packages: str) -> None:
    """Leave with a sentence where a package is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            parser.error(f"this needs {package}, which is not installed: pip install 'dllm-compile[{extra}]'")


def dispatch(commands: Mapping[str, tuple[Callable[[list[str]], None], str]], argv: list[str]) -> None:
    """Run a command by name.

    Args:
        commands: functions of the words behind the name, and what each is for.
        argv: the name and those words.
    """
    usage = "usage: python -m dllm_compile COMMAND [OPTIONS]"
    if argv and argv[0] in ("-h", "--help"):
        about = "\n".join(f"  {name:<8} {what}" for name, (_, what) in commands.items())
        print(f"{usage}\n\ncommands, each with --help:\n{about}")
        return
    if not argv:
        leave(2, f"{usage}\ncommands: {', '.join(commands)}; each has --help")
    if argv[0] not in commands:
        near = nearest(argv[0], commands)
        leave(2, f"there is no command {argv[0]!r}; did you mean {near!r}? Commands: {', '.join(commands)}")
    commands[argv[0]][0](argv[1:])


def leave(status: int, sentence: str) -> NoReturn:
    """Say a sentence and end with a status."""
    print(sentence, file=sys.stderr)
    raise SystemExit(status)
