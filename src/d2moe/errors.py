"""One base error and one class per cause. Every message names the file and the item, what was found,
what was expected, and what to do next."""

from __future__ import annotations


class D2MoeError(Exception):
    """Base of every error this package raises on purpose; the command line prints it as one sentence."""


class ConfigError(D2MoeError):
    """A configuration (model config, engine option, sampling parameter) has an unknown key or a value out of range."""


class CheckpointError(D2MoeError):
    """A source checkpoint is incomplete, malformed or of a kind that is not supported."""


class ContainerError(D2MoeError):
    """A d2moe container is corrupt, of another version, or does not agree with its own index."""


class MemoryBudgetError(D2MoeError):
    """The memory allowed is less than the least that would do; the message says how much that is."""


class StorageError(D2MoeError):
    """Reading or writing failed: I/O error, short read, disk full."""


class BusyError(D2MoeError):
    """As many requests are waiting as may; `retry_after_s` is a guess of when one will fit."""

    def __init__(self, message: str, retry_after_s: int):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoppingError(D2MoeError):
    """The engine is being stopped and takes nothing new."""


class TraceError(D2MoeError):
    """A recorded trace is corrupt, of another version, or of another model than it is used with."""


class RequestError(D2MoeError):
    """A request cannot be served: empty prompt, prompt longer than the context, a width outside the file."""
