"""Nothing is loaded that can run code of what it loads, unless the user asked for it: every such call is looked at."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    file
    for room in ("adapters", "profiler", "stats", "viz", "benchmarks", "docs")
    for file in (ROOT / room).rglob("*.py")
)
FILES += sorted(ROOT.glob("*.py"))

#: Names of calls that load a model, a tokenizer, a config, a dataset or an object, and can run code of theirs.
LOADERS = {
    "from_pretrained",
    "from_config",
    "pipeline",
    "load_dataset",
    "load_dataset_builder",
    "get_dataset_config_names",
    "get_class_from_dynamic_module",
    "get_kernel",
    "snapshot_download",
    "hf_hub_download",
    "LLM",
    "AsyncLLM",
}
#: Those that are told by their module, too: what `load` of another one does is its own affair.
OF_MODULES = {
    "pickle": {"load", "loads", "Unpickler"},
    "marshal": {"load", "loads"},
    "torch": {"load"},
    "np": {"load"},
    "numpy": {"load"},
    "yaml": {"load", "unsafe_load", "full_load"},
    "joblib": {"load"},
    "dill": {"load", "loads"},
    "cloudpickle": {"load", "loads"},
    "shelve": {"open"},
    "runpy": {"run_path", "run_module"},
}
#: Calls without `trust_remote_code`, and why they need none.
EXPECTED = {
    ("adapters/vllm.py", "GenerationConfig.from_pretrained"): "reads numbers from JSON; takes no such argument",
    ("adapters/vllm.py", "LLM"): "its arguments hold it: false, or what the user gave",
    ("adapters/checkpoints.py", "snapshot_download"): "of the local cache alone; gives the name of a folder",
    ("profiler/prompt_forms.py", "library.load_dataset"): "datasets runs no code from 4 on; older is refused",
    ("profiler/prompt_forms.py", "library.get_dataset_config_names"): "as above",
    ("profiler/prompt_parquet.py", "pickle.load"): "from a process of moescope's own, through its pipe",
    ("benchmarks/demo_model.py", "PreTrainedTokenizerFast.from_pretrained"): "a class by its name, none out of a file",
    ("benchmarks/vllm_overhead.py", "LLM"): "its model is the benchmark's own; vLLM's default is false",
}


def loads(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls that load something, by their name as it is written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            owner, _, last = name.rpartition(".")
            if last in LOADERS or name in ("eval", "exec") or last in OF_MODULES.get(owner, ()):
                yield name, node


def trusts(call: ast.Call) -> bool:
    """Whether a call says what it trusts: never None, which asks on standard input, nor true for all."""
    given = [word.value for word in call.keywords if word.arg == "trust_remote_code"]
    return bool(given) and not (isinstance(given[0], ast.Constant) and given[0].value is not False)


def test_a_call_that_does_not_say_is_noticed() -> None:
    text = """
        AutoTokenizer.from_pretrained(a)
        AutoModel.from_pretrained(a, trust_remote_code=None)
        AutoModel.from_pretrained(a, trust_remote_code=True)
        AutoModel.from_pretrained(a, trust_remote_code=False)
        AutoModel.from_config(a, trust_remote_code=trusted)
        torch.load(a); json.load(b); pickle.loads(c); library.load_dataset(d)
    """
    found = [(name, trusts(call)) for name, call in loads(ast.parse("if True:" + text))]
    assert found == [
        ("AutoTokenizer.from_pretrained", False),
        ("AutoModel.from_pretrained", False),
        ("AutoModel.from_pretrained", False),
        ("AutoModel.from_pretrained", True),
        ("AutoModel.from_config", True),
        ("torch.load", False),
        ("pickle.loads", False),
        ("library.load_dataset", False),
    ]


def test_every_call_says_what_it_trusts() -> None:
    silent = set()
    said = 0
    for file in FILES:
        for name, call in loads(ast.parse(file.read_text(encoding="utf-8"))):
            if trusts(call):
                said += 1
            else:
                silent.add((file.relative_to(ROOT).as_posix(), name))
    assert silent == set(EXPECTED)
    assert said >= 8


@pytest.mark.parametrize("name", ["transformers", "vllm", "datasets", "pickle", "torch"])
def test_the_names_that_are_looked_for_are_those_that_are_used(name: str) -> None:
    """A loader that is imported under another name, or taken without being called, would not be seen."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == name:
                for alias in node.names:
                    assert alias.asname is None or alias.name not in LOADERS | {"load", "loads"}, file
