"""Command lines of the scripts: a script hands its `main` to `run`, which gives it the flags and texts typed.

fire reads the values and calls `main`. This module finds the flags itself and makes the help text of main's docstring,
because fire would read the text "a, b" as a pair, take the text after a switch for the switch's value, and run the
whole script before it notices a flag that does not exist.

Nothing here imports torch before a model is wanted, so help and errors in flags come at once. This module knows nothing
of the engine.
"""

from __future__ import annotations

import contextlib
import difflib
import dis
import functools
import inspect
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType

FLAG = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)
SHORT = re.compile(r"-[A-Za-z]\w*(=.*)?", re.DOTALL)
SWITCHES = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
KINDS = {int: "a whole number", float: "a number", bool: "yes or no"}
PLACEHOLDERS = {int: "NUMBER", float: "NUMBER", str: "TEXT"}
# Exit statuses, the last two as a shell gives them.
WRONG_USAGE, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
RULE = "\n==================================\n"


def run(main: Callable[..., None]) -> None:
    """Call `main` with the arguments of the command line.

    An error that the library or the script raises on purpose ends in its one sentence, any other in a traceback.
    Ctrl-C and a reader that went away end quietly.
    """
    open_streams()
    sys.excepthook = show_error
    try:
        flags, texts = parse(sys.argv[1:], main)
        if "help" in flags:
            print(help_text(main, os.path.basename(sys.argv[0])), file=sys.stdout, flush=True)
        else:
            call(main, flags, texts)
    except (KeyboardInterrupt, BrokenPipeError) as error:
        leave(BROKEN_PIPE if isinstance(error, BrokenPipeError) else INTERRUPTED)


def open_streams() -> None:
    """Give closed standard streams the null device, and let a console that lacks a character show "?"."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # Opened in this order, each gets the number of the stream that it stands for.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (for as long as the process lives)
    sys.stdin.reconfigure(errors="replace")
    sys.stdout.reconfigure(errors="replace")


def leave(status: int) -> None:
    """End at once: the usual clean-up would flush into a broken pipe, or wait for ranks that will not answer.

    One of several ranks ends as by an error that says nothing, so that the others keep quiet about their lost peer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if sys.excepthook is not show_error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        raise KeyboardInterrupt from None
    os._exit(status)


def wrong(sentence: str) -> typing.NoReturn:
    """End with the status of wrong usage."""
    print(sentence, file=sys.stderr)
    sys.exit(WRONG_USAGE)


# --- errors ------------------------------------------------------------------------------------------------------


def show_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print the sentence of an error that was meant for the user, the traceback of any other."""
    if meant_for_user(error, trace):
        print(error, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def meant_for_user(error: BaseException, trace: TracebackType | None) -> bool:
    """Whether a `raise` statement of the library or of the script made the error, rather than something it called."""
    if trace is None or not isinstance(
        error, (ValueError, FileNotFoundError, RuntimeError, ImportError)
    ):
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "")
    ours = module == "__main__" or module.partition(".")[0] == "llama"
    instruction = trace.tb_frame.f_code.co_code[trace.tb_lasti]
    return ours and dis.opname[instruction] == "RAISE_VARARGS"


# --- flags -------------------------------------------------------------------------------------------------------


class Flag(typing.NamedTuple):
    """A parameter of `main`: the type of its values, without None, and whether it takes None or repeats."""

    kind: object
    optional: bool
    repeats: bool
    default: object


def parameters_of(main: Callable) -> tuple[dict[str, Flag], str | None]:
    """The flags of a script by name, and the name of the parameter that takes texts typed without a flag."""
    flags = {}
    texts = None
    for name, parameter in inspect.signature(main, eval_str=True).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            texts = name
            continue
        kinds = [kind for kind in typing.get_args(parameter.annotation) if kind is not type(None)]
        optional = type(None) in typing.get_args(parameter.annotation)
        kind = kinds[0] if optional else parameter.annotation
        flags[name] = Flag(kind, optional, kind == list[str], parameter.default)
    return flags, texts


def parse(arguments: list[str], main: Callable) -> tuple[dict[str, list[str]], list[str]]:
    """The values typed for each flag, and the texts; exits with one sentence where something is wrong.

    `--name value` and `--name=value` are the same. A switch takes no value but after "=", or the word True or False.
    A lone `-` is the text on standard input; after a lone `--` everything is text.
    """
    known, texts_name = parameters_of(main)
    given: dict[str, list[str]] = {}
    texts: list[str] = []
    waiting = list(reversed(arguments))

    while waiting:
        argument = waiting.pop()
        matched = FLAG.fullmatch(argument)
        if argument in ("-h", "--help"):
            return {"help": []}, []
        if argument == "--":
            texts += reversed(waiting)
            break
        if matched:
            name = flag_name(matched[1], known, texts_name)
            value = flag_value(f"--{name}", matched[2], known[name], waiting)
            given.setdefault(name, []).append(value)
        elif SHORT.fullmatch(argument):
            wrong(
                f"{argument} is not a flag of this script; --help lists them. Put -- before a text that begins so."
            )
        else:
            texts.append(standard_input() if argument == "-" else argument)

    for text in texts:
        check_text(text, wanted=texts_name is not None)
    return given, texts


def flag_name(typed: str, known: Mapping[str, Flag], texts_name: str | None) -> str:
    """The parameter that a flag stands for; exits, naming the nearest flag, if there is none."""
    name = typed.replace("-", "_")
    if name in known:
        return name
    if texts_name is not None and name in (texts_name, texts_name.removesuffix("s")):
        wrong(
            f'--{typed} is not a flag of this script: type {texts_name} without one, each in quotes: "Once upon".'
        )
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean --{near[0]}? " if near else ""
    wrong(f"--{typed} is not a flag of this script; {hint}--help lists them.")


def flag_value(flag: str, attached: str | None, about: Flag, waiting: list[str]) -> str:
    """What was typed after "=", or else the next of the arguments that wait, last first; exits if there is none."""
    if attached is not None:
        return attached
    if about.kind is bool:
        return waiting.pop() if waiting and waiting[-1] in ("True", "False") else "True"
    if not waiting or waiting[-1] == "--" or FLAG.fullmatch(waiting[-1]):
        wrong(f"{flag} needs a value; --help tells which.")
    return waiting.pop()


def standard_input() -> str:
    """All of standard input without its last line break; on ranks beyond the first, which only follow, nothing."""
    from llama.parallel import world

    return sys.stdin.read().removesuffix("\n") if world()[0] == 0 else ""


def check_text(text: str, wanted: bool) -> None:
    """Exit on a text that the script has no use for, or that is not made of characters."""
    if not wanted:
        wrong(f"{text!r} is neither a flag of this script nor a flag's value; --help lists them.")
    try:
        text.encode()
    except UnicodeEncodeError:
        wrong(f"The text {text!r} holds bytes that are not UTF-8; save or type it as UTF-8.")


# --- values ------------------------------------------------------------------------------------------------------


def call(main: Callable, flags: Mapping[str, list[str]], texts: list[str]) -> None:
    """Let fire read the values and call `main`.

    Each value goes to fire behind a "=", which keeps fire from taking a text for a flag or a separator.
    """
    import fire
    from fire.decorators import SetParseFn

    known, _ = parameters_of(main)
    command = [f"={text}" for text in texts]
    for name, values in flags.items():
        value = json.dumps(values) if known[name].repeats else values[-1]
        command.append(f"--{name}=={value}")
    for name, about in known.items():
        main = SetParseFn(functools.partial(read, name, about), name)(main)
    fire.Fire(SetParseFn(lambda quoted: quoted[1:])(main), command=command)


def read(name: str, about: Flag, quoted: str) -> object:
    """The value of a flag from what was typed behind "="; exits if it is of another type."""
    from fire.parser import DefaultParseValue

    typed = quoted[1:]
    if about.repeats:
        return json.loads(typed)
    if about.optional and typed == "None":
        return None
    if about.kind is str:
        return typed

    value = SWITCHES.get(typed.lower()) if about.kind is bool else DefaultParseValue(typed)
    fits = {
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, (int, float)) and not isinstance(value, bool),
        bool: value is not None,
    }
    if not fits.get(about.kind, True):
        wrong(f"{name} is {typed!r}; it must be {KINDS[about.kind]}.")
    return value


def chosen(**options: object) -> dict[str, object]:
    """The options that were given a value, once that is checked: loading weights first may take minutes.

    Raises `ValueError` for a value out of range.
    """
    from llama.sampling import Sampling

    given = {name: value for name, value in options.items() if value is not None}
    Sampling(**given).checked()
    return given


# --- help --------------------------------------------------------------------------------------------------------


def help_text(main: Callable, script: str) -> str:
    """What `--help` prints: the docstring of `main`, its Args as a table of flags with the defaults of numbers."""
    flags, texts = parameters_of(main)
    about, _, arguments = inspect.getdoc(main).partition("\nArgs:\n")
    described = dict(re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", arguments, re.MULTILINE))
    width = max(40, min(shutil.get_terminal_size().columns, 100))
    usage = [
        script,
        *([f"[{texts.upper().removesuffix('S')} ...]"] if texts else []),
        "[--FLAG VALUE ...]",
    ]
    rows = [f"usage: {' '.join(usage)}", "", *textwrap.wrap(about, width), ""]

    for name, words in described.items():
        words = " ".join(words.split())
        label = f"  {name.upper()}"
        if name in flags:
            label = f"  --{name} {placeholder(flags[name])}".rstrip()
            if type(flags[name].default) in (int, float):
                words += f" Default: {flags[name].default}."
        rows.append(label)
        rows += textwrap.wrap(words, width, initial_indent=" " * 6, subsequent_indent=" " * 6)

    if texts:
        rows += [
            "",
            *textwrap.wrap(
                "A text that is - is read from standard input; after -- everything is text.", width
            ),
        ]
    return "\n".join(rows)


def placeholder(about: Flag) -> str:
    """What stands for a flag's value in the help."""
    if about.kind is bool:
        return ""
    return "TEXT ..." if about.repeats else PLACEHOLDERS.get(about.kind, "LIST")


# --- results -----------------------------------------------------------------------------------------------------


def show(text: str, end: str = "\n") -> None:
    """Print on the first rank only. Raises `RuntimeError` where that fails but for a reader that went away."""
    from llama.parallel import world

    if world()[0] != 0:
        return
    try:
        print(text, end=end, file=sys.stdout, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RuntimeError(f"Standard output cannot be written: {error.strerror}.") from None


def show_rows(
    pieces: Iterable, heading: Callable[[int], str] = lambda row: "", live: bool = False
) -> None:
    """Print each row of a stream, with its heading and a rule, as soon as it and all rows before it have ended.

    With `live`, the first row that has not ended is printed as it comes. Ctrl-C prints what has ended, whatever is
    missing between, and is raised again.
    """
    texts: dict[int, str] = {}
    ended: set[int] = set()
    current = 0  # the first row that is not wholly printed
    printed = ""  # what of it is

    try:
        for piece in pieces:
            texts[piece.row] = texts.get(piece.row, "") + piece.text
            if piece.finish_reason is not None:
                ended.add(piece.row)

            while current in ended:
                show_rest(heading(current), texts[current], printed)
                current += 1
                printed = ""
            if live and current in texts:
                whole = heading(current) + texts[current]
                show(whole.removeprefix(printed), end="")
                printed = whole
    except KeyboardInterrupt:
        if printed:
            show(" (interrupted)\n" + RULE)
        for row in sorted(row for row in ended if row >= current):
            show_rest(heading(row), texts[row], "")
        raise


def show_rest(heading: str, text: str, printed: str) -> None:
    show((heading + text).removeprefix(printed) + "\n" + RULE)
