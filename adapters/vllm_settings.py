"""What a vLLM worker is asked to record, handed over through the environment to every process of the engine."""

import json
import os
import re
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, Self

from moescope import __version__
from moescope.profiler.errors import OptionError

#: Set by `moescope profile --engine vllm`: the settings, as JSON.
VARIABLE: Final = "MOESCOPE_VLLM"
#: Set by the user of a server: the folder to record into.
SERVER_VARIABLE: Final = "MOESCOPE_RECORD"
#: Optional for a server: off, sample or all; off by default.
PROBABILITIES_VARIABLE: Final = "MOESCOPE_PROBABILITIES"
#: Optional for a server: how many domains are counted, names reserved for known ones, or both: "32,code,chat".
DOMAINS_VARIABLE: Final = "MOESCOPE_DOMAINS"
#: Identity of a server's run, made in the front end and inherited by every process of the server. On several nodes that
#: are started one by one, set it to the same value on all of them.
RUN_VARIABLE: Final = "MOESCOPE_RUN"
#: vLLM's variable that lists which environment variables it copies to the workers of a Ray cluster, by prefix.
RAY_VARIABLE: Final = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"

#: Prefix of this package's variables.
_PREFIX: Final = "MOESCOPE_"
_RUN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: Longest name of a domain that a request may bring.
LONGEST_NAME: Final = 64
#: Domain of requests that name none, and of those whose name does not fit any more.
DEFAULT_DOMAIN: Final = "default"
OTHER_DOMAIN: Final = "other"
#: Domains that a server counts by default.
_DOMAINS: Final = 16

#: Keys of a request's `extra_args`: domain (index, or name on a server) and split.
DOMAIN_KEY: Final = "moescope_domain"
SPLIT_KEY: Final = "moescope_split"
VERIFY_KEY: Final = "moescope_verify"
#: Number of a request that is traced.
TRACE_KEY: Final = "moescope_trace"

Probabilities = Literal["off", "sample", "all"]
CHOICES: Final = ("off", "sample", "all")


@dataclass(frozen=True, slots=True)
class Settings:
    """What to record.

    Attributes:
        folder: Where workers write: each rank its own file.
        probabilities: Which rows' full distributions are summed.
        coactivation: Count pairs of experts.
        domains: Number of domains.
        reserved: Names of domains for which a server keeps room.
        seed: Of the splits and of the sample.
        serving: A server, which records from start to stop and saves by itself.
        run: Identity of a server's run.
        version: Version of the command that asks.
    """

    folder: str
    probabilities: Probabilities = "off"
    coactivation: bool = False
    domains: int = 1
    reserved: tuple[str, ...] = ()
    seed: int = 0
    serving: bool = False
    run: str = ""
    version: str = __version__

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> Self | None:
        """What the environment asks for; None if nothing.

        Raises:
            OptionError: A variable holds what it cannot, or the settings come from another version.
        """
        text = os.environ.get(VARIABLE)
        if text:
            fields = json.loads(text)
            if fields.get("version") != __version__:
                raise OptionError(
                    f"the moescope plug-in in vLLM's environment is {__version__}, but the command that asks is "
                    f"{fields.get('version')}; install one version of moescope in both"
                )
            return cls(**(fields | {"reserved": tuple(fields["reserved"])}))
        folder = os.environ.get(SERVER_VARIABLE)
        if not folder:
            return None
        probabilities = os.environ.get(PROBABILITIES_VARIABLE, "off")
        if probabilities not in CHOICES:
            raise OptionError(f"{PROBABILITIES_VARIABLE}={probabilities!r} is unknown; choose {', '.join(CHOICES)}")
        domains, reserved = _domains(os.environ.get(DOMAINS_VARIABLE, str(_DOMAINS)))
        run = os.environ.get(RUN_VARIABLE, "")
        if not _RUN.fullmatch(run):
            raise OptionError(f"{RUN_VARIABLE}={run!r}: give 1 to 64 letters, digits, dots, dashes and underscores")
        return cls(
            os.path.abspath(folder),
            probabilities,  # type: ignore[arg-type]
            domains=domains,
            reserved=reserved,
            serving=True,
            run=run,
        )


def _domains(text: str) -> tuple[int, tuple[str, ...]]:
    """Number of domains and reserved names, from the value of `DOMAINS_VARIABLE`."""
    from moescope.profiler.tokens import MAX_DOMAINS

    first, *names = [part.strip() for part in text.split(",")]
    if not first.isdecimal():
        names.insert(0, first)
    for name in names:
        if not is_domain_name(name):
            raise OptionError(f"{DOMAINS_VARIABLE}={text!r}: {name!r} is no name of 1 to {LONGEST_NAME} characters")
    reserved = tuple(dict.fromkeys(name for name in names if name not in (DEFAULT_DOMAIN, OTHER_DOMAIN)))
    needed = len(reserved) + 2 if reserved else 1
    count = int(first) if first.isdecimal() else max(_DOMAINS, needed)
    if not needed <= count <= MAX_DOMAINS:
        room = f"; these names, {DEFAULT_DOMAIN!r} and {OTHER_DOMAIN!r} need {needed}" if reserved else ""
        raise OptionError(f"{DOMAINS_VARIABLE}={text!r}: give a number from 1 to {MAX_DOMAINS}{room}")
    return count, reserved


def is_domain_name(name: object) -> bool:
    """Whether a request may call its domain so."""
    return isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name.isprintable()


def name_run() -> None:
    """Name the run of a server, unless the environment names it.

    The front end does it first; the processes that it starts inherit the name.
    """
    if not os.environ.get(RUN_VARIABLE):
        started = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        os.environ[RUN_VARIABLE] = f"{started}-{uuid.uuid4().hex[:8]}"


def share_with_ray() -> None:
    """Ask vLLM to copy this package's variables to the workers of a Ray cluster."""
    prefixes = [part for part in os.environ.get(RAY_VARIABLE, "").split(",") if part.strip()]
    if _PREFIX not in prefixes:
        os.environ[RAY_VARIABLE] = ",".join([*prefixes, _PREFIX])


def trigger_path(settings: Settings) -> Path:
    """File that asks a run for a save when it is touched; SIGUSR1 to any process of the server touches it."""
    return Path(settings.folder, f"save-{settings.run}")


def refusal_path(settings: Settings) -> Path:
    """File in which a worker says why it refuses."""
    return Path(settings.folder, f"refused-{settings.run}.txt" if settings.run else "refused.txt")


def log() -> Any:
    """The logger of vLLM for this package."""
    from vllm.logger import init_logger

    return init_logger("vllm.moescope")
