"""One table: error class <-> gRPC status code. What a peer reads is sanitised here, on its way out and in."""

import contextlib
import logging
import re
from collections.abc import Iterator

import grpc

from fedpft.errors import (
    CertificateError,
    FedPFTError,
    InvalidUpdate,
    NotEnrolled,
    RefusedByServer,
    RoundOver,
    ServerUnreachable,
    StaleProxy,
    TransferCorrupt,
)

log = logging.getLogger(__name__)

CODES: dict[type[FedPFTError], grpc.StatusCode] = {
    RefusedByServer: grpc.StatusCode.PERMISSION_DENIED,
    NotEnrolled: grpc.StatusCode.ABORTED,
    RoundOver: grpc.StatusCode.OUT_OF_RANGE,
    StaleProxy: grpc.StatusCode.FAILED_PRECONDITION,
    InvalidUpdate: grpc.StatusCode.INVALID_ARGUMENT,
    TransferCorrupt: grpc.StatusCode.DATA_LOSS,
    CertificateError: grpc.StatusCode.UNAUTHENTICATED,
    ServerUnreachable: grpc.StatusCode.UNAVAILABLE,
}
CLASSES = {code: kind for kind, code in CODES.items()} | {
    grpc.StatusCode.DEADLINE_EXCEEDED: ServerUnreachable,
    grpc.StatusCode.CANCELLED: ServerUnreachable,  # a server that shuts down ends the calls that are open
}

REMEDY_KEY = "fedpft-remedy-bin"
LONGEST_TEXT = 500  # characters; gRPC allows 8 KiB for all metadata of a reply
ABSOLUTE_PATH = re.compile(r"(?<![\w./])(?:[A-Za-z]:)?[/\\](?:[^\s/\\:;,'\"()]+[/\\])*([^\s/\\:;,'\"()]+)")


def sanitised(text: str) -> str:
    """One printable line of bounded length, in which of an absolute path only the last part is left."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return ABSOLUTE_PATH.sub(r"\1", line)[:LONGEST_TEXT]


@contextlib.contextmanager
def answering(context: grpc.ServicerContext) -> Iterator[None]:
    """Server side, around an RPC: ends it with the status of the error that its body raises.

    An error outside of the table says nothing to the peer but that there was one; it is logged with its traceback.
    """
    try:
        yield
        return
    except FedPFTError as error:
        fault = error
    except grpc.RpcError:  # the silo went away in the middle of its own stream: nobody is left to be answered
        context.abort(grpc.StatusCode.CANCELLED, "")
    except Exception:
        if not context.is_active():  # gRPC raises plain exceptions at a stream whose other end is gone
            raise
        log.exception("an RPC failed")
        context.abort(grpc.StatusCode.INTERNAL, "the server failed")
    code = CODES.get(type(fault))
    if code is None:
        log.error("an RPC failed: %s", fault)
        context.abort(grpc.StatusCode.INTERNAL, "the server failed")
    context.set_trailing_metadata(((REMEDY_KEY, sanitised(fault.remedy).encode()),))
    context.abort(code, sanitised(fault.message))


def answered(error: grpc.RpcError) -> bool:
    """Whether the server itself ended the RPC with this status, and not the connection to it."""
    return REMEDY_KEY in dict(error.trailing_metadata() or ())


def error_of(error: grpc.RpcError) -> FedPFTError:
    """Silo side: the error that the server's status stands for."""
    kind = CLASSES.get(error.code())
    message = sanitised(error.details() or "")
    if kind is None:
        return RefusedByServer(
            f"the server answered {error.code().name}: {message or 'no reason given'}",
            "ask the server's operator to look into its log",
        )
    metadata = dict(error.trailing_metadata() or ())
    remedy = metadata.get(REMEDY_KEY, b"").decode(errors="replace")
    return kind(message, sanitised(remedy) or "ask the server's operator")
