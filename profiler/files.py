"""Files a run writes: profiles, whole or not at all, in a folder that one run owns."""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from moescope.profiler.errors import MoescopeError, OutputError, ProfileError
from moescope.profiler.profile import BUFFERS, RoutingProfile, header, parse_header

METADATA_KEY: Final = "moescope"
WEIGHTS_KEY: Final = "moescope_weights"
PART_KEY: Final = "moescope_part"
PROFILE_NAME: Final = "profile.safetensors"
PARTIAL_NAME: Final = "profile.partial.safetensors"
WEIGHTS_NAME: Final = "weights.safetensors"
PARTIAL_WEIGHTS_NAME: Final = "weights.partial.safetensors"
LOCK_NAME: Final = ".moescope.lock"
#: Names of the safetensors format for what is written.
_DTYPES: Final = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "float32": "F32", "float64": "F64",
}  # fmt: skip


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; renamed to it if the block succeeds, removed if it fails.

    Raises:
        OutputError: The disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:  # takes the mode that files get here; writers may choose a narrower one
            mode = os.fstat(file.fileno()).st_mode
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_profile(profile: RoutingProfile, path: str | os.PathLike[str]) -> None:
    """Check `profile` and write it to `path` in one step: a reader sees the old file or the new one, never half.

    Raises:
        InvariantError: Counts do not add up; nothing is written.
        OutputError: The file cannot be written.
    """
    profile.check()
    write_tensors(profile.arrays(), Path(path), {METADATA_KEY: header(profile)})


def write_tensors(arrays: Mapping[str, NDArray[Any]], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file in one step.

    The format's own library copies each tensor while it holds the interpreter's lock, for milliseconds where they are
    large: a server that saves would hold up its engine. This hands them to the disk as they are.

    Raises:
        OutputError: The file cannot be written.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in contiguous.items():
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    parts: list[Any] = [len(text).to_bytes(8, "little"), text, *(array.reshape(-1) for array in contiguous.values())]
    with atomic_path(path) as temporary, open(temporary, "wb", buffering=0) as file:
        for part in parts:
            left = memoryview(part).cast("B")
            while len(left):  # one call writes 2 GiB at most
                left = left[file.write(left) :]


def load_profile(path: str | os.PathLike[str]) -> RoutingProfile:
    """Read a profile file and assert that its counts add up.

    Raises:
        ProfileError: No such file, not a profile, damaged, or written by a newer moescope.
        InvariantError: Counts do not add up.
    """
    file = Path(path)
    if not file.exists():
        raise ProfileError(f"No such file: {file}")
    if file.is_dir():
        if any(file.glob("part-*.safetensors")):
            raise ProfileError(
                f"{file} holds what a server recorded; first join it: moescope merge {file} -o {PROFILE_NAME}"
            )
        raise ProfileError(f"{file} is a folder; name the file, e.g. {file / PROFILE_NAME}")
    try:
        profile = RoutingProfile(**_read(file))
        profile.check()
    except SafetensorError as error:
        raise ProfileError(f"{file} is not a safetensors file, or is cut short ({error})") from error
    except OSError as error:
        raise ProfileError(f"cannot read {file}: {error.strerror or error}") from error
    except MoescopeError as error:
        raise type(error)(f"{file}: {error}") from error
    return profile


def _read(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="numpy") as reader:
        metadata = reader.metadata() or {}
        if WEIGHTS_KEY in metadata:
            raise ProfileError("holds weights and no profile; `moescope report` and `moescope info` take it")
        if PART_KEY in metadata:
            raise ProfileError("holds what one rank of a server counted; `moescope merge` takes its folder")
        if METADATA_KEY not in metadata:
            raise ProfileError("a safetensors file, but not a moescope profile")
        fields = parse_header(metadata[METADATA_KEY])
        names = set(reader.keys())
        for required in (buffer.name for buffer in BUFFERS if not buffer.optional):
            if required not in names:
                raise ProfileError(f"tensor {required!r} is missing")
        try:
            return fields | {b.name: reader.get_tensor(b.name) for b in BUFFERS if b.name in names}
        except (TypeError, KeyError, AttributeError) as error:  # a dtype that numpy does not have
            raise ProfileError(f"its tensors are not those of a profile ({error})") from error


class OutputFolder:
    """A folder that one run owns: created, locked, and left as it was if nothing was written.

    Args:
        path: The folder.
        force: Write into a folder that already holds results.
        resume: Go on from `profile.partial.safetensors` in it.
        option: The option that names the folder, in errors.

    Raises:
        OutputError: The folder exists and neither `force` nor `resume` was given, belongs to another run that is
            still going on, is a file, or cannot be written.
    """

    def __init__(self, path: Path, *, force: bool = False, resume: bool = False, option: str = "--output-dir") -> None:
        self.path = path
        self._created: list[Path] = []
        self._lock: IO[str] | None = None
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; {option} needs a folder")
        if resume and not path.is_dir():
            raise OutputError(f"No such folder: {path}; --resume goes on in the folder of the interrupted run")
        try:
            self._created = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / LOCK_NAME, "a+", encoding="utf-8")  # noqa: SIM115 - held until close
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            self.close()
            raise OutputError(f"cannot write into {path}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._lock.fileno()), os.stat(path / LOCK_NAME)):
                raise OSError("the lock was released and removed meanwhile")
        except OSError as error:
            self._lock.close()
            self._lock = None
            raise OutputError(f"{path} is in use by another run; choose another {option}") from error
        for rest in path.glob(".*.safetensors.*.tmp"):  # of a run that was killed while it saved
            rest.unlink(missing_ok=True)
        others = [entry for entry in path.iterdir() if entry.name != LOCK_NAME]
        if others and not force and not resume:
            partial = (
                " (or --resume to go on with the interrupted run)" if any(path.glob("*.partial.safetensors")) else ""
            )
            self.close()
            raise OutputError(
                f"{path} exists and is not empty; choose another folder, or --force to overwrite{partial}"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder; remove it if this run created it and left nothing in it."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                (self.path / LOCK_NAME).unlink()
            self._lock.close()
            self._lock = None
        for folder in self._created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._created = []

    def load_partial(self) -> RoutingProfile:
        """What an interrupted run left here.

        Raises:
            OutputError: It left nothing, or the run had come to its end.
        """
        file = self.path / PARTIAL_NAME
        if not file.exists():
            why = f"; {PROFILE_NAME} there is complete" if (self.path / PROFILE_NAME).exists() else ""
            raise OutputError(f"{self.path} holds no {PARTIAL_NAME}, so there is nothing to resume{why}")
        return load_profile(file)

    def save_partial(self, profile: RoutingProfile) -> None:
        """Keep what has been drained so far."""
        save_profile(profile, self.path / PARTIAL_NAME)

    def save_final(self, profile: RoutingProfile) -> Path:
        """Write the finished profile under its final name and drop the partial one."""
        final = self.path / PROFILE_NAME
        save_profile(profile, final)
        (self.path / PARTIAL_NAME).unlink(missing_ok=True)
        return final
