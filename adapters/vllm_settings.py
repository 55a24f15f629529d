"""What a vLLM worker is asked to record, handed over through the environment to every process of the engine."""

import json
import os
from dataclasses import asdict, dataclass
from typing import Final, Literal, Self

from moescope import __version__
from moescope.profiler.errors import OptionError

#: Set by `moescope profile --engine vllm`: the settings, as JSON.
VARIABLE: Final = "MOESCOPE_VLLM"
#: Set by the user of a server: the folder to record into.
SERVER_VARIABLE: Final = "MOESCOPE_RECORD"
#: Optional for a server: off, sample or all; off by default.
PROBABILITIES_VARIABLE: Final = "MOESCOPE_PROBABILITIES"
#: Optional for a server: how many domains requests may name.
DOMAINS_VARIABLE: Final = "MOESCOPE_DOMAINS"

#: File in a server's folder: when it is touched, every worker saves at once. SIGUSR1 to any process of vLLM touches it.
TRIGGER_NAME: Final = "save"

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
        seed: Of the splits and of the sample.
        serving: A server, which records from start to stop and saves by itself.
        version: Version of the command that asks.
    """

    folder: str
    probabilities: Probabilities = "off"
    coactivation: bool = False
    domains: int = 1
    seed: int = 0
    serving: bool = False
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
            return cls(**fields)
        folder = os.environ.get(SERVER_VARIABLE)
        if not folder:
            return None
        probabilities = os.environ.get(PROBABILITIES_VARIABLE, "off")
        if probabilities not in CHOICES:
            raise OptionError(f"{PROBABILITIES_VARIABLE}={probabilities!r} is unknown; choose {', '.join(CHOICES)}")
        domains = os.environ.get(DOMAINS_VARIABLE, "16")
        if not domains.isdecimal() or not 1 <= int(domains) <= 64:
            raise OptionError(f"{DOMAINS_VARIABLE}={domains!r}: give a number from 1 to 64")
        return cls(folder, probabilities, domains=int(domains), serving=True)  # type: ignore[arg-type]
