"""Command lines of the scripts: fire, except that text stays as it was typed and a wrong flag stops everything.

fire by itself would read "a, b" as a pair, take the text after a switch for the switch's value, and run the whole
script before it misses a flag that does not exist.
"""

import inspect
import re
import sys
from collections.abc import Callable

import fire
from fire.decorators import SetParseFn
from fire.parser import DefaultParseValue


def run(main: Callable) -> None:
    """Call `main` with the arguments of the command line; an error ends the script with its one sentence."""
    sys.tracebacklimit = 0
    sys.stdout.reconfigure(errors="replace")  # a console that lacks a character shows "?"
    sys.stdin.reconfigure(errors="replace")
    parameters, known = inspect.signature(main).parameters, defaults(main)
    others = [name for name, parameter in parameters.items() if "str" not in str(parameter.annotation)]
    main = SetParseFn(DefaultParseValue, *others)(SetParseFn(str)(main))
    fire.Fire(main, command=check(sys.argv[1:], known))


def defaults(main: Callable) -> dict[str, object]:
    """The flags of a script, which are the parameters of its `main`, with their defaults."""
    return {name: parameter.default for name, parameter in inspect.signature(main).parameters.items()}


def check(arguments: list[str], known: dict[str, object]) -> list[str]:
    """The arguments with each switch spelled out as `--switch=True`; exits on a flag that is not known."""
    checked = []
    for argument in arguments:
        flag, given, _ = argument.partition("=")
        name = flag[2:].replace("-", "_")
        if argument in ("True", "False") and checked and checked[-1].endswith("=True"):
            checked[-1] = checked[-1].removesuffix("True") + argument
        elif name != "help" and (argument == "--" or re.fullmatch(r"-[A-Za-z]\w*", argument)):
            sys.exit(f"{argument} is not a flag of this script; --help lists them.")
        elif not flag.startswith("--") or name == "help":
            checked.append(argument)
        elif name not in known:
            sys.exit(f"{flag} is not a flag of this script; --help lists them.")
        else:
            checked.append(argument if given or known[name] is not False else f"{flag}=True")
    return checked
