"""FP8 checkpoints converted once, scales applied, to a type that every CPU runs; kept in a folder of caches."""

import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from moescope.adapters.checkpoints import PACKED, Fp8Tensors, find_folder, open_checkpoint, quantisation
from moescope.adapters.shards import BITS, Shards, StoredTensor, shown
from moescope.profiler.errors import OptionError, OutputError
from moescope.profiler.files import OutputFolder, atomic_path

#: Types of a cache, and their names in the files.
CACHE_DTYPES: Final = {"bfloat16": "BF16", "float32": "F32"}
MANIFEST_NAME: Final = "moescope_cache.json"

_VERSION: Final = 1  # of what a conversion writes; another one is converted again
_FP8: Final = "F8_E4M3"
_PIECE: Final = 1 << 22  # elements that are converted at once
_SAMPLE: Final = 1 << 16  # bytes
_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_COPIED: Final = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
_NOT_COPIED: Final = ("config.json", "hf_quant_config.json", MANIFEST_NAME)
_MAX_COPIED: Final = 256 << 20
#: Told bytes that are there and bytes of the whole cache.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Output:
    """A tensor of the cache: where it comes from, and its element type there."""

    source: StoredTensor
    dtype: str

    @property
    def elements(self) -> int:
        return self.source.size * 8 // BITS[self.source.dtype]

    @property
    def size(self) -> int:
        return self.elements * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class _File:
    """A finished file: its bytes and their CRC-32."""

    size: int
    crc32: int


@dataclass(frozen=True)
class _Manifest:
    """What is finished of a cache. It is `complete` only when every file is there."""

    version: int
    model: str = field(compare=False)  # one checkpoint goes by many names
    fingerprint: str
    dtype: str
    complete: bool
    files: dict[str, _File]

    def save(self, folder: Path) -> None:
        _write(folder / MANIFEST_NAME, [json.dumps(asdict(self), indent=1, sort_keys=True).encode()])


@dataclass(frozen=True)
class _Plan:
    """All that a cache will hold, known from headers before anything is written."""

    model: str
    name: str
    fingerprint: str
    dtype: str
    fp8: Fp8Tensors
    shards: dict[str, tuple[_Output, ...]]
    small: dict[str, bytes]

    def folder(self, cache_dir: str | Path) -> Path:
        return Path(cache_dir) / f"{self.name}-{self.fingerprint[:12]}-{self.dtype}"

    def sizes(self) -> dict[str, int]:
        """Bytes of every file of weights."""
        return {
            shard: len(_header(outputs)) + sum(output.size for output in outputs)
            for shard, outputs in self.shards.items()
        }

    def manifest(self, files: dict[str, _File], *, complete: bool = False) -> _Manifest:
        return _Manifest(_VERSION, self.model, self.fingerprint, self.dtype, complete, files)


def find_cache(model: str | Path, cache_dir: str | Path, dtype: str = "bfloat16") -> Path | None:
    """The finished cache of a checkpoint.

    Args:
        model: A folder, or the hub id of a model that is in the local cache of the hub.
        cache_dir: The folder of caches.
        dtype: A name in `CACHE_DTYPES`.

    Returns:
        A folder that transformers loads; None if there is none, or it is not finished.

    Raises:
        ModelError: The checkpoint cannot be read, or it is packed in a way that is not unpacked here.
        OptionError: An unknown dtype.
    """
    plan = _plan(model, dtype)
    return None if plan is None else _finished(plan, plan.folder(cache_dir))


def build_cache(
    model: str | Path,
    cache_dir: str | Path,
    dtype: str = "bfloat16",
    *,
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> Path | None:
    """Convert an FP8 checkpoint, file by file, and go on where an interrupted conversion stopped.

    Each FP8 weight is multiplied with its scale in float32 and rounded to `dtype`; the scales are left out. Other
    tensors stay as they are stored, but in a cache of float32 all BF16 and F16 become F32. Config, tokenizer and other
    small files go along, the config without its quantisation. The folder's name holds a fingerprint of the checkpoint:
    names, sizes and headers of its files, the small files, and samples of each file's weights.

    Args:
        model: A folder, or the hub id of a model that is in the local cache of the hub.
        cache_dir: The folder of caches.
        dtype: A name in `CACHE_DTYPES`.
        force: Convert again what is there.
        on_progress: Told bytes that are there and bytes of the whole cache, after each piece.

    Returns:
        A folder that transformers loads; None if the checkpoint is not FP8, so that there is nothing to convert.

    Raises:
        ModelError: The checkpoint cannot be read, or it is packed in a way that is not unpacked here.
        OptionError: An unknown dtype.
        OutputError: There is no room, the folder cannot be written, holds something else, or another run writes it.
    """
    plan = _plan(model, dtype)
    if plan is None:
        return None
    folder = plan.folder(cache_dir)
    if not force and _finished(plan, folder) is not None:
        return folder
    _refuse_foreign(folder)
    with OutputFolder(folder, force=True, option="--cache-dir"):
        _convert(plan, folder, force, on_progress or (lambda done, total: None))
    return folder


def _plan(model: str | Path, dtype: str) -> _Plan | None:
    """What is to be converted; None if nothing is FP8."""
    if dtype not in CACHE_DTYPES:
        raise OptionError(f"--dtype {dtype!r} is no type of a cache; choose one of {', '.join(CACHE_DTYPES)}")
    source, label = find_folder(model), str(model)
    shards = Shards(source, label)
    held = {shard: shards.held(shard) for shard in shards.files}
    tensors = [tensor for shard in held.values() for tensor in shard]
    converts = any(tensor.dtype == _FP8 for tensor in tensors)
    config = shards.read_json("config.json")
    if converts or quantisation(config):
        open_checkpoint(model)  # refuses what is packed, and contradictions between the files and the config
    if not converts:
        return None
    fp8 = Fp8Tensors(shards, label)
    dropped = {name for tensor in tensors for name in _scales(fp8, tensor)}
    small = {name: shards.read_bytes(name, _MAX_COPIED) for name in _small_files(source)}
    outputs = {
        shard: tuple(_output(tensor, dtype) for tensor in there if tensor.name not in dropped)
        for shard, there in held.items()
    }
    fingerprint = _fingerprint(shards, {**small, "config.json": shards.read_bytes("config.json")})
    outputs = {shard: there for shard, there in outputs.items() if there}
    small = {name: data for name, data in small.items() if not name.endswith(".index.json")}
    if list(outputs) != [_SINGLE]:
        small[_INDEX] = _index(outputs)
    small["config.json"] = _converted_config(config, dtype)  # last: nothing loads a folder without it
    name = source.resolve().name if Path(model).exists() else label
    name = re.sub(r"[^\w.-]+", "--", name).strip(".-")[:80] or "model"
    return _Plan(label, name, fingerprint, dtype, fp8, outputs, small)


def _scales(fp8: Fp8Tensors, tensor: StoredTensor) -> list[str]:
    """Names of the tensors that have no meaning once `tensor` is converted."""
    scale = fp8.scale(tensor)
    stem = tensor.name.removesuffix("weight")
    return [] if scale is None else [scale.name, f"{stem}input_scale", f"{stem}activation_scale"]


def _output(tensor: StoredTensor, dtype: str) -> _Output:
    if tensor.name.endswith(PACKED) and tensor.dtype not in ("F32", "F16", "BF16"):
        raise tensor.refuse("is packed, which this reader does not unpack")
    if tensor.dtype not in BITS or (tensor.dtype.startswith("F8_") and tensor.dtype != _FP8):
        raise tensor.refuse(f"is stored as {shown(tensor.dtype)}, which this reader does not convert")
    if tensor.dtype == _FP8 or (dtype == "float32" and tensor.dtype in ("BF16", "F16")):
        return _Output(tensor, CACHE_DTYPES[dtype])
    return _Output(tensor, tensor.dtype)


def _small_files(source: Path) -> list[str]:
    return sorted(
        file.name
        for file in source.iterdir()
        if file.suffix in _COPIED and file.name not in _NOT_COPIED and not file.name.startswith(".") and file.is_file()
    )


def _fingerprint(shards: Shards, small: dict[str, bytes]) -> str:
    """sha256 over names, sizes and headers of the files, samples of their weights, and the small files.

    A fine-tuned checkpoint has the headers of the one that it came from, so headers alone would not tell them apart.
    """
    digest = hashlib.sha256()
    for shard in shards.files:
        size, parts = shards.samples(shard, _SAMPLE)
        for part in (shard.encode(), str(size).encode(), *parts):
            digest.update(hashlib.sha256(part).digest())
    for name, data in sorted(small.items()):
        digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(data).digest())
    return digest.hexdigest()


def _index(outputs: dict[str, tuple[_Output, ...]]) -> bytes:
    where = {output.source.name: shard for shard, there in outputs.items() for output in there}
    total = sum(output.size for there in outputs.values() for output in there)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1).encode()


def _converted_config(config: dict[str, Any], dtype: str) -> bytes:
    """The config of what is no longer quantised."""
    nested = config.get("text_config")
    parts = [config, nested] if isinstance(nested, dict) else [config]
    for part in parts:
        part.pop("quantization_config", None)
        part.pop("compression_config", None)
        part.update({name: dtype for name in ("dtype", "torch_dtype") if name in part})
    config["dtype"] = dtype
    return json.dumps(config, indent=2).encode()


def _finished(plan: _Plan, folder: Path) -> Path | None:
    manifest = _read_manifest(folder)
    if manifest is None or manifest != plan.manifest(manifest.files, complete=True):
        return None
    if manifest.files.keys() != {*plan.shards, *plan.small}:
        return None
    return folder if all(_size(folder / name) == file.size for name, file in manifest.files.items()) else None


def _read_manifest(folder: Path) -> _Manifest | None:
    """The manifest in a folder; None if there is none that can be read."""
    try:
        fields = json.loads((folder / MANIFEST_NAME).read_bytes())
        files = {name: _File(**file) for name, file in fields.pop("files").items()}
        return _Manifest(**fields, files=files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _refuse_foreign(folder: Path) -> None:
    try:
        holds = {file.name for file in folder.iterdir() if not file.name.startswith(".")} if folder.is_dir() else set()
    except OSError as error:
        raise OutputError(f"cannot read {folder}: {error.strerror}") from error
    if holds and MANIFEST_NAME not in holds:
        raise OutputError(f"{folder} holds something else than a cache; move it away or choose another --cache-dir")


def _convert(plan: _Plan, folder: Path, force: bool, on_progress: OnProgress) -> None:
    before = _read_manifest(folder)
    for rest in folder.rglob(".*.tmp"):  # of a run that was killed while it wrote
        rest.unlink(missing_ok=True)
    same = before is not None and before == plan.manifest(before.files, complete=before.complete)
    kept = before.files if same and before is not None and not force else {}
    sizes = plan.sizes()
    done = {name: file for name, file in kept.items() if name in sizes and _intact(folder / name, file)}
    left = {name: outputs for name, outputs in plan.shards.items() if name not in done}
    try:
        for name in (*left, *plan.small):  # their room is needed again, and nothing may load a half of them
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write into {folder}: {error.strerror}") from error
    _check_room(folder, sum(sizes[name] for name in left) + sum(map(len, plan.small.values())))
    plan.manifest(done).save(folder)
    counter = _Counter(sum(sizes[name] for name in done), sum(sizes.values()), on_progress)
    try:
        for name, outputs in left.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            done[name] = _write(folder / name, counter.passing(_shard(outputs, plan.fp8)))
            plan.manifest(done).save(folder)
        for name, data in plan.small.items():
            done[name] = _write(folder / name, [data])
        plan.manifest(done, complete=True).save(folder)
    except OutputError as error:
        raise OutputError(f"{error}; finished files are kept, and the same command goes on with them") from error


class _Counter:
    """Tells how much is there, as pieces pass."""

    def __init__(self, there: int, total: int, tell: OnProgress) -> None:
        self._there, self._total, self._tell = there, total, tell
        tell(there, total)

    def passing(self, pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        for piece in pieces:
            yield piece
            self._there += len(piece)
            self._tell(self._there, self._total)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder} needs {size_text(needed)}, but its disk has {size_text(free)} free; "
            f"choose another --cache-dir or make room"
        )


def size_text(size: int) -> str:
    """Bytes for people, e.g. `1.4 TB`."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("KB", 3)):
        if size >= 10**power:
            return f"{size / 10**power:.1f} {unit}"
    return f"{size} bytes"


def _header(outputs: Iterable[_Output]) -> bytes:
    """The start of a safetensors file: length of the header, and the header padded to eight bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in _ordered(outputs):
        begin, end = end, end + output.size
        shape = list(output.source.shape)
        entries[output.source.name] = {"dtype": output.dtype, "shape": shape, "data_offsets": [begin, end]}
    data = json.dumps(entries, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def _ordered(outputs: Iterable[_Output]) -> list[_Output]:
    """Wide elements first, so that each tensor begins at a multiple of its element; then as they lie in the source."""
    return sorted(outputs, key=lambda output: (-BITS[output.dtype], output.source.offset))


def _shard(outputs: tuple[_Output, ...], fp8: Fp8Tensors) -> Iterator[bytes | memoryview]:
    """The bytes of a file of the cache."""
    yield _header(outputs)
    for output in _ordered(outputs):
        for piece in _pieces(output, fp8):
            yield piece.contiguous().flatten().view(torch.uint8).numpy().data


def _pieces(output: _Output, fp8: Fp8Tensors) -> Iterator[Tensor]:
    tensor = output.source
    if tensor.dtype == _FP8:
        to = torch.bfloat16 if output.dtype == CACHE_DTYPES["bfloat16"] else torch.float32
        yield from (piece.to(to) for piece in fp8.pieces(tensor, _PIECE))
        return
    for first in range(0, output.elements, _PIECE):
        count = min(_PIECE, output.elements - first)
        if output.dtype == tensor.dtype:
            yield tensor.raw(first, count)
        else:
            yield tensor.read(first, count).to(torch.float32)


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> _File:
    size = crc = 0
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        for piece in pieces:
            stream.write(piece)
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return _File(size, crc)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _intact(path: Path, file: _File) -> bool:
    """Whether a finished file still holds what was written."""
    if _size(path) != file.size:
        return False
    crc = 0
    try:
        with path.open("rb") as stream:
            while piece := stream.read(_PIECE):
                crc = zlib.crc32(piece, crc)
    except OSError:
        return False
    return crc == file.crc32
