"""The shape of the library: who imports whom, what only one module may know, how large anything may grow."""

import ast
import importlib
import inspect
import io
import textwrap
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest

import llama
from llama.generation import Llama
from llama.model import Transformer
from llama.tokenizer import Tokenizer

FOLDER = Path(llama.__file__).parent
FILES = {".".join(path.relative_to(FOLDER).with_suffix("").parts): path for path in sorted(FOLDER.rglob("*.py"))}
LINES = {name: path.read_text(encoding="utf-8").splitlines() for name, path in FILES.items()}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

# Imports point one way, from a level to lower ones alone: so no module imports another of its own level.
LEVELS = [
    "parallel device progress sampling formats.recognise formats.slicing",
    "args cache kernels packing options tokenizer formats.reading formats.writing formats.hf_layout",
    "model prompts rows formats.meta formats.hugging_face formats.lora",
    "slots compiling predictions formats.__init__",
    "engine loading",
    "generation",
    "__init__ convert",
    "terminal cli",
    "chat __main__",
]
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules.split()}

ONLY_PARALLEL = ("fairscale", "torch.distributed")
NO_TORCH = (
    "formats.__init__",
    "formats.recognise",
    "formats.writing",
    "tokenizer",
    "prompts",
    "slots",
)
FILES_AND_TEXT = ("os", "io", "json", "pathlib", "pickle", "sentencepiece", "safetensors")


def imported(tree: ast.AST) -> set[str]:
    """Full names of all that is imported anywhere in a module, relative imports resolved."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, ["llama" * bool(node.level), node.module]))
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def edges(tree: ast.AST) -> set[str]:
    """The modules of the library that a module imports; `import llama` itself counts as `__init__`."""
    parts = [name.split(".") for name in imported(tree) if within(name, "llama")]
    return {module(part[1:]) for part in parts}


def module(part: list[str]) -> str:
    """The file in which a dotted name of the library, without its `llama`, is found."""
    for length in (2, 1):
        for name in (".".join(part[:length]), ".".join([*part[:length], "__init__"])):
            if len(part) >= length and name in FILES:
                return name
    return "__init__"


def dotted(node: ast.AST) -> str:
    """An attribute chain as it is written, such as torch.cuda.is_available; else nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (origin := dotted(node.value)):
        return f"{origin}.{node.attr}"
    return ""


def mentions(tree: ast.AST) -> set[str]:
    """Every dotted name that is used or imported."""
    return {dotted(node) for node in ast.walk(tree)} | imported(tree)


def calls(tree: ast.AST, name: str) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and dotted(node.func).endswith(name)]


class Size(NamedTuple):
    lines: int
    tokens: int


def docstring_lines(tree: ast.AST) -> set[int]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def measure(source: str) -> Size:
    """Lines that hold code, and the tokens in them: blank lines, comments and docstrings do not count."""
    kinds = "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER ENCODING"
    silent = {getattr(tokenize, kind) for kind in kinds.split()}
    documented = docstring_lines(ast.parse(source))
    lines: set[int] = set()
    tokens = 0

    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent and token.start[0] not in documented:
            lines |= set(range(token.start[0], token.end[0] + 1))
            tokens += 1
    return Size(len(lines), tokens)


SIZES = {name: measure(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


# --- imports -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name):
    assert name in LEVEL, "a new module needs its place among the levels"
    for other in edges(TREES[name]):
        assert LEVEL[other] < LEVEL[name], f"{name} imports {other}"


@pytest.mark.parametrize("name", sorted(set(FILES) - {"parallel"}))
def test_only_parallel_knows_processes(name):
    used = mentions(TREES[name])
    assert not [u for u in used for package in ONLY_PARALLEL if within(u, package)]
    environment = {"environ", "environb", "getenv", "putenv"}
    if name == "device":
        environment.remove("putenv")  # one variable, for oneDNN: writing tells nobody who this process is
    assert not [u for u in used if u.split(".")[-1] in environment]


def test_parallel_is_where_processes_are_known():
    """If this fails, the test above has lost its eyes."""
    used = mentions(TREES["parallel"])
    assert all(any(within(u, package) for u in used) for package in ONLY_PARALLEL)
    assert "os.environ" in used


@pytest.mark.parametrize("name", [name for name in NO_TORCH if name in FILES])
def test_text_modules_know_no_torch(name):
    assert not [n for n in imported(TREES[name]) if within(n, "torch")]


def test_the_model_knows_no_files_and_no_text():
    assert not [n for n in imported(TREES["model"]) for package in FILES_AND_TEXT if within(n, package)]


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("formats.")])
def test_formats_know_no_modules(name):
    assert not [n for n in mentions(TREES[name]) if within(n, "torch.nn") or within(n, "nn")]


# --- habits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(FILES) - {"device"}))
def test_only_device_names_cuda(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value != "cuda" and not node.value.startswith("cuda:"), f"line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "cuda", f"line {node.lineno}"


@pytest.mark.parametrize("name", FILES)
def test_checkpoints_are_never_unpickled(name):
    for call in calls(TREES[name], "torch.load"):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        assert isinstance(given.get("weights_only"), ast.Constant) and given["weights_only"].value is True
    assert not calls(TREES[name], "pickle.load") and not calls(TREES[name], "pickle.loads")


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_printed_on_standard_output(name):
    for call in calls(TREES[name], "print"):
        assert "file" in {keyword.arg for keyword in call.keywords}, f"line {call.lineno}"


@pytest.mark.parametrize("name", FILES)
def test_no_bare_except_and_no_globals(name):
    for node in ast.walk(TREES[name]):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"line {node.lineno}"
        assert not isinstance(node, ast.Global), f"line {node.lineno}"


# --- sizes -------------------------------------------------------------------------------------------------------

# What runs when a checkpoint in Meta's layout completes a text: this is what a reader has to hold in his head.
ROAD = """args cache model tokenizer prompts sampling options rows slots engine predictions generation
parallel device loading formats.meta formats.slicing formats.recognise"""


def test_the_size_of_code_is_measured():
    source = '''"""Docstring
    of two lines."""

    # a comment
    x = 1  # counts

    def f():
        """Not counted."""
        text = """counted,
        twice"""
        return (
            text
        )
    '''
    assert measure(inspect.cleandoc(source)) == (7, 15)


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_too_long_or_too_dense(name):
    size = SIZES[name]
    assert size.lines <= 300
    assert size.tokens <= 10.5 * max(size.lines, 30)


def test_the_library_is_not_dense_on_average():
    lines = sum(size.lines for size in SIZES.values())
    tokens = sum(size.tokens for size in SIZES.values())
    assert tokens <= 9.5 * lines


def test_the_road_of_a_prompt_fits_in_a_head():
    sizes = {name: SIZES[name].tokens for name in ROAD.split()}
    assert sum(sizes.values()) <= 23_600, sizes


@pytest.mark.parametrize("name", FILES)
def test_no_function_is_too_long(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            source = textwrap.dedent("\n".join(LINES[name][node.lineno - 1 : node.end_lineno]))
            assert measure(source).lines <= 45, f"{node.name} at line {node.lineno}"


@pytest.mark.parametrize("name", FILES)
def test_every_module_says_what_it_is(name):
    assert ast.get_docstring(TREES[name])


# --- the public interface ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("llama", "Llama Dialog ModelArgs Transformer Tokenizer"),
        (
            "llama.generation",
            "Llama B_INST E_INST B_SYS E_SYS SPECIAL_TAGS UNSAFE_ERROR Message Dialog Role",
        ),
        ("llama.generation", "CompletionPrediction ChatPrediction sample_top_p"),
        ("llama.model", "ModelArgs Transformer precompute_freqs_cis apply_rotary_emb repeat_kv"),
        ("llama.model", "RMSNorm Attention FeedForward TransformerBlock"),
        ("llama.tokenizer", "Tokenizer"),
    ],
)
def test_what_existing_callers_import(module, names):
    for name in names.split():
        assert hasattr(importlib.import_module(module), name), name


def positional(function) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.name != "self"]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (
            Llama.build,
            "ckpt_dir tokenizer_path max_seq_len max_batch_size model_parallel_size seed",
        ),
        (Llama.__init__, "model tokenizer"),
        (Llama.generate, "prompt_tokens max_gen_len temperature top_p logprobs echo"),
        (Llama.text_completion, "prompts temperature top_p max_gen_len logprobs echo"),
        (Llama.chat_completion, "dialogs temperature top_p max_gen_len logprobs"),
        (Llama.score, "texts"),
        (Transformer.forward, "tokens start_pos"),
        (Tokenizer.__init__, "model_path"),
        (Tokenizer.encode, "s bos eos"),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_positional_arguments_are_those_of_the_release(function, names):
    assert positional(function) == names.split()


def test_defaults_are_those_of_the_release():
    defaults = {name: p.default for name, p in inspect.signature(Llama.chat_completion).parameters.items()}
    assert (defaults["temperature"], defaults["top_p"], defaults["max_gen_len"]) == (0.6, 0.9, None)
    defaults = {name: p.default for name, p in inspect.signature(Llama.build).parameters.items()}
    assert (defaults["max_seq_len"], defaults["max_batch_size"], defaults["seed"]) == (512, 4, 1)
