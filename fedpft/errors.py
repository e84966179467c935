"""Errors that end a command: each names the place, and carries the remedy and the exit code.

docs/errors.md lists the exit codes; `fedpft.wire.status` maps the same classes to gRPC status codes.
"""


class FedPFTError(Exception):
    """A fault that a person can mend.

    Args:
        message: what is wrong and where (file and line, key, silo, tensor), one line.
        remedy: what to do about it, one line.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} -> {self.remedy}"


class ConfigError(FedPFTError):
    """A YAML file or a command-line option does not say what it must."""

    exit_code = 3


class DataError(FedPFTError):
    """A data file is missing, empty, mis-encoded or mis-labelled."""

    exit_code = 4


class ModelError(FedPFTError):
    """A model, proxy or adapter directory cannot be used as asked."""

    exit_code = 5


class CertificateError(FedPFTError):
    """A key or certificate is missing, expired, or does not fit the other side."""

    exit_code = 6


class ServerUnreachable(FedPFTError):
    """The server did not answer within the time the silo was told to wait."""

    exit_code = 7


class RefusedByServer(FedPFTError):
    """The server answered, and said no."""

    exit_code = 8


class NotEnrolled(RefusedByServer):
    """The server does not know the silo since it started; the silo enrols again by itself, so no command ends so."""


class RoundOver(RefusedByServer):
    """A silo asks for, or answers, a round that has ended; it goes on with the next one, so no command ends so."""


class StaleProxy(RefusedByServer):
    """A silo trained on another version of the proxy than the one the server holds."""

    exit_code = 9


class InvalidUpdate(FedPFTError):
    """An update has a wrong shape, name, round or a value that is not finite."""

    exit_code = 10


class PortInUse(FedPFTError):
    """The server cannot listen where its configuration says."""

    exit_code = 11


class QuorumLost(FedPFTError):
    """Fewer silos answered a round than the federation needs."""

    exit_code = 12


class TransferCorrupt(FedPFTError):
    """A file did not arrive as it was sent, again and again."""

    exit_code = 13


class CheckpointError(FedPFTError):
    """What a run left on disk, or was begun with, is torn, changed or of another version."""

    exit_code = 14


class LedgerUnusable(CheckpointError):
    """The ledger cannot be read or written now; once its disk is mended the run goes on."""


class InternalFault(FedPFTError):
    """An exception that fedpft did not foresee; its traceback is in the file that is named."""

    exit_code = 15


class OutOfMemory(FedPFTError):
    """This machine, or its GPU, has too little memory for what was asked of it."""

    exit_code = 16


class RankLost(FedPFTError):
    """One of the processes that torchrun started together has ended; the same command goes on, as after a kill."""

    exit_code = 17


class PrivacyViolation(FedPFTError):
    """Going on would show more of a silo than was agreed on, or the server does not keep what the silo demands."""

    exit_code = 18


class PrivacySpent(FedPFTError):
    """What a silo was asked to train would take more of its samples' privacy than its institution allows."""

    exit_code = 19
