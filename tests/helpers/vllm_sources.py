"""Python sources of released vLLM versions, read from a package index without installing or downloading them whole.

Of each wheel only the table of contents and the files asked for are fetched, by HTTP range requests; where the server
does not answer those, the source distribution is streamed. What was fetched is kept in a cache folder.
"""

import ast
import functools
import gzip
import html.parser
import http.client
import io
import json
import os
import tarfile
import urllib.parse
import urllib.request
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

#: Where the index is, unless the environment says so.
INDEX = "https://pypi.org/simple"
#: Of several wheels of a version, the one with names that end like this.
WHEEL = "x86_64.whl"
_BLOCK = 1 << 16
_TIMEOUT = 30.0

Function = ast.FunctionDef | ast.AsyncFunctionDef


class UnreachableError(Exception):
    """The index or its files cannot be had from here."""


class NoRangesError(Exception):
    """The server sends whole files only."""


class RemoteFile(io.RawIOBase):
    """A file behind HTTP, read in blocks that are kept; counts the bytes that it fetched.

    Raises:
        NoRangesError: The server does not answer range requests.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._position = 0
        self._blocks: dict[int, bytes] = {}
        self.fetched = 0
        self.size = 0
        self._fetch(0, 1)

    def _fetch(self, first: int, stop: int) -> None:
        """Fetch the blocks from `first` up to `stop`."""
        span = f"bytes={first * _BLOCK}-{stop * _BLOCK - 1}"
        with _open(self._url, {"Range": span}) as response:
            if response.status != 206:
                raise NoRangesError(f"{self._url} answers a range request with {response.status}")
            self.size = int(response.headers["Content-Range"].rpartition("/")[2])
            data = response.read()
        self.fetched += len(data)
        for block in range(first, stop):
            self._blocks[block] = data[(block - first) * _BLOCK : (block - first + 1) * _BLOCK]

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        start = self._position
        stop = self.size if size < 0 else min(start + size, self.size)
        if stop <= start:
            return b""
        first, last = start // _BLOCK, (stop - 1) // _BLOCK + 1
        missing = [block for block in range(first, last) if block not in self._blocks]
        if missing:
            self._fetch(missing[0], missing[-1] + 1)
        data = b"".join(self._blocks[block] for block in range(first, last))
        self._position = stop
        return data[start - first * _BLOCK : stop - first * _BLOCK]


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _open(url: str, headers: dict[str, str]) -> Any:
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)


@functools.cache
def _files() -> dict[str, str] | str:
    """Addresses of vLLM's files on the index, by file name; or why they cannot be had, so that this is tried once."""
    page = f"{os.environ.get('PIP_INDEX_URL', INDEX).rstrip('/')}/vllm/"
    try:
        with _open(page, {"Accept": "text/html"}) as response:
            text = response.read().decode()
    except (OSError, http.client.HTTPException) as error:
        return f"{page}: {error}"
    links = _Links()
    links.feed(text)
    addresses = [urllib.parse.urldefrag(urllib.parse.urljoin(page, link)).url for link in links.found]
    return {urllib.parse.unquote(address.rpartition("/")[2]): address for address in addresses}


def _fetch(version: str, paths: Collection[str]) -> tuple[dict[str, str | None], int]:
    """Texts of files of one version, None for those that it lacks, and the bytes that this took.

    A path that ends with a slash is a folder: all Python files below it come, and its own text lists them.

    Raises:
        UnreachableError: The index cannot be had.
        LookupError: The index has no such version.
    """
    files = _files()
    if isinstance(files, str):
        raise UnreachableError(files)
    wheels = [name for name in files if name.startswith(f"vllm-{version}-") and name.endswith(WHEEL)]
    source = f"vllm-{version}.tar.gz"
    if not wheels and source not in files:
        raise LookupError(f"the index has no vLLM {version}")
    try:
        if wheels:
            try:
                return _from_wheel(files[wheels[0]], paths)
            except NoRangesError:
                if source not in files:
                    raise
        return _from_source(files[source], paths)
    except (OSError, http.client.HTTPException, NoRangesError) as error:
        raise UnreachableError(f"vLLM {version}: {error}") from error


def _from_wheel(url: str, paths: Collection[str]) -> tuple[dict[str, str | None], int]:
    with RemoteFile(url) as remote, zipfile.ZipFile(remote) as archive:
        places = {entry.filename: entry.header_offset for entry in archive.infolist()}
        texts: dict[str, str | None] = dict.fromkeys(paths)
        wanted = [path for path in places if _is_wanted(path, paths)]
        for path in sorted(wanted, key=places.__getitem__):  # in file order: neighbours share blocks
            texts[path] = archive.read(path).decode()
        return texts | _listings(texts), remote.fetched


def _from_source(url: str, paths: Collection[str]) -> tuple[dict[str, str | None], int]:
    texts: dict[str, str | None] = dict.fromkeys(paths)
    with _open(url, {}) as response, tarfile.open(fileobj=response, mode="r|gz") as archive:
        size = int(response.headers.get("Content-Length", 0))
        for member in archive:
            path = member.name.partition("/")[2]  # below the folder that is named for the version
            content: IO[bytes] | None = archive.extractfile(member) if _is_wanted(path, paths) else None
            if content is not None:
                texts[path] = content.read().decode()
    return texts | _listings(texts), size


def _is_wanted(path: str, paths: Collection[str]) -> bool:
    folders = tuple(one for one in paths if one.endswith("/"))
    return path in paths or (path.endswith(".py") and path.startswith(folders))


def _listings(texts: Mapping[str, str | None]) -> dict[str, str | None]:
    """The texts of folders."""
    return {
        folder: "\n".join(sorted(path for path in texts if path != folder and path.startswith(folder)))
        for folder in texts
        if folder.endswith("/")
    }


class Sources:
    """What there is in some files of one vLLM version.

    Args:
        version: Version of vLLM.
        paths: The files, by their path in the wheel; with a slash at the end, folders.
        cache: Folder for what was fetched.

    Attributes:
        fetched: Bytes that had to be fetched.

    Raises:
        UnreachableError: They are neither in the cache nor to be had.
    """

    def __init__(self, version: str, paths: Collection[str], cache: Path) -> None:
        self.version = version
        self.fetched = 0
        kept = cache / f"vllm-{version}.json.gz"
        self._texts: dict[str, str | None] = {}
        if kept.exists():
            self._texts = json.loads(gzip.decompress(kept.read_bytes()))
        missing = set(paths) - set(self._texts)
        if missing:
            texts, self.fetched = _fetch(version, missing)
            self._texts |= texts
            draft = kept.with_suffix(f".{os.getpid()}")
            draft.write_bytes(gzip.compress(json.dumps(self._texts).encode(), 5))
            draft.replace(kept)
        self._trees: dict[str, ast.Module] = {}

    def has(self, path: str) -> bool:
        """Whether the version has this file."""
        return self._texts[path] is not None

    def files(self, path: str) -> list[str]:
        """The Python files below a folder, or the one file."""
        return (self._texts[path] or "").splitlines() if path.endswith("/") else [path] if self.has(path) else []

    def mentions(self, path: str, words: Collection[str]) -> bool:
        """Whether a file holds one of some words."""
        return any(word in (self._texts[path] or "") for word in words)

    def tree(self, path: str) -> ast.Module:
        """A file, parsed; empty if there is none."""
        if path not in self._trees:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # vLLM's own
                self._trees[path] = ast.parse(self._texts[path] or "", path)
        return self._trees[path]

    def owner(self, path: str, name: str | None) -> ast.Module | ast.ClassDef | None:
        """A class of a file, or the file itself."""
        tree = self.tree(path)
        if name is None:
            return tree
        return next((node for node in _statements(tree) if isinstance(node, ast.ClassDef) and node.name == name), None)

    def function(self, path: str, owner: str | None, name: str) -> Function | None:
        """A function or method; the last of that name, as overloads come first."""
        scope = self.owner(path, owner)
        found = [node for node in _statements(scope) if isinstance(node, Function) and node.name == name]
        return found[-1] if found else None

    def members(self, path: str, owner: str | None) -> set[str]:
        """Names that a module or a class has: functions, classes, fields, imports, and what methods set on `self`."""
        scope = self.owner(path, owner)
        found: set[str] = set()
        for node in _statements(scope):
            if isinstance(node, (Function, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                found |= {alias.asname or alias.name for alias in node.names}
        if isinstance(scope, ast.ClassDef):
            for inner in ast.walk(scope):
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and _is_self(inner.value):
                    found.add(inner.attr)
        return found

    def bases(self, path: str, owner: str) -> list[str]:
        """Base classes as they are written."""
        scope = self.owner(path, owner)
        return [ast.unparse(base) for base in scope.bases] if isinstance(scope, ast.ClassDef) else []

    def decorators(self, path: str, owner: str) -> list[str]:
        """Decorators of a class as they are written."""
        scope = self.owner(path, owner)
        return [ast.unparse(one) for one in scope.decorator_list] if isinstance(scope, ast.ClassDef) else []

    def occurrences(self, path: str, owner: str | None, function: str | None, expression: str) -> int:
        """How often an expression occurs in a function, a class or a file; one that ends with "(" means a call."""
        scope = self.function(path, owner, function) if function else self.owner(path, owner)
        called, wanted = expression.endswith("("), ast.parse(expression.removesuffix("("), mode="eval").body
        count = 0
        for node in ast.walk(scope) if scope is not None else ():
            one = node.func if called and isinstance(node, ast.Call) else None if called else node
            count += type(one) is type(wanted) and isinstance(one, ast.expr) and ast.dump(one) == ast.dump(wanted)
        return count


def parameters(function: Function) -> list[str]:
    """Names of a function's parameters in order, `self` or `cls` left out."""
    arguments = function.args
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args)]
    return [name for name in names if name not in ("self", "cls")] + [one.arg for one in arguments.kwonlyargs]


def positional(function: Function) -> list[str]:
    """Those that can be given by position."""
    keywords = {one.arg for one in function.args.kwonlyargs}
    return [name for name in parameters(function) if name not in keywords]


def _statements(scope: ast.AST | None) -> list[ast.stmt]:
    """Statements of a module or class, those under `if` and `try` too."""
    found: list[ast.stmt] = []
    for node in getattr(scope, "body", []):
        if isinstance(node, (ast.If, ast.Try)):
            found += _statements(node)
            for branch in (*getattr(node, "handlers", []), ast.Module(body=node.orelse, type_ignores=[])):
                found += _statements(branch)
        else:
            found.append(node)
    return found


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
