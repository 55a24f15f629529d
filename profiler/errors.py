"""Errors a user can act on; the command line prints them in one line and exits with 2."""


class MoescopeError(Exception):
    """Base of every error that names what is wrong and what would be right."""


class PromptError(MoescopeError):
    """A prompt set cannot be read or does not fit the model."""


class ModelError(MoescopeError):
    """A model cannot be loaded or its routing cannot be recorded exactly."""


class ProfileError(MoescopeError):
    """A profile file cannot be read, written or merged."""


class InvariantError(MoescopeError):
    """Recorded counts do not add up to what the requests' own lengths say."""


class OutputError(MoescopeError):
    """Results cannot be written where they were asked for."""


class TraceError(MoescopeError):
    """A trace cannot be read or written."""


class OptionError(MoescopeError):
    """An option has a value that cannot be used."""


class EngineError(MoescopeError):
    """An engine failed while it ran; what had been drained before is kept."""
