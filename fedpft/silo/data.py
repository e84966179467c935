"""A silo's own data before it enrols: looked at alone, then against what the server says; the doctor does the same."""

import logging

from fedpft.config import SiloConfig, SiloPrivacyTerms
from fedpft.data.batches import describe_cut
from fedpft.data.samples import Examination, Samples
from fedpft.errors import FedPFTError, ModelError, PrivacyViolation, RefusedByServer
from fedpft.model import loading
from fedpft.silo.connection import SAME_VERSION
from fedpft.silo.work import Work
from fedpft.tasks import FORMS, TASKS
from fedpft.wire.hello import Terms, greet

log = logging.getLogger(__name__)

WAY_OUT = "; or set data.bad_rows: skip in silo.yaml to go on without them"
REPORT_SECONDS = 5.0  # for the server's labels, where rows are bad anyhow and all that is wrong should be said at once


def examine(config: SiloConfig) -> Examination:
    """Looks at all that can be known without the server; DataError if the file as a whole cannot be used."""
    data = config.data
    return Examination(data.path, data.columns, FORMS, first_counts=False, encoding=data.encoding)


def fit(examination: Examination, config: SiloConfig, terms: Terms) -> Samples:
    """The samples, with the server's classes; DataError, of everything that is wrong with the file."""
    data, task = config.data, TASKS[terms.task]
    if examination.form not in task.forms:  # the file has other columns, or those of several forms
        examination = Examination(data.path, data.columns, task.forms, encoding=data.encoding)
    examination.resolve(task.reader(terms.labels))
    return examination.samples(data.bad_rows, WAY_OUT)


def prepare(config: SiloConfig) -> tuple[Samples, Terms]:
    """What a silo brings when it enrols, and what the server said of it; waits for a server that is away.

    Raises:
        DataError: this silo's data is not in order, or does not fit.
        FedPFTError: what the server answered, or that it does not answer.
    """
    examination = examine(config)
    fault = examination.fault(config.data.bad_rows, WAY_OUT)
    patience = config.connect_timeout_seconds if fault is None else REPORT_SECONDS
    try:
        greeting = greet(config.server, config.tls, name=config.insecure_name, timeout_seconds=patience)
        greeting.check_version(config.server)
        if greeting.terms is None:
            raise RefusedByServer(f"{config.server} does not say what the data must be like", SAME_VERSION)
        check_required(config, secure=greeting.terms.secure_aggregation, private=greeting.terms.silo_privacy)
    except FedPFTError as error:
        raise fault or error from None
    samples = fit(examination, config, greeting.terms)
    for warning in samples.warnings:
        log.warning("%s", warning)
    return samples, greeting.terms


def check_required(config: SiloConfig, *, secure: bool, private: SiloPrivacyTerms | None) -> None:
    """Raises PrivacyViolation if a federation lacks what the silo demands of it."""
    if "secure_aggregation" in config.require and not secure:
        raise PrivacyViolation(
            f"{config.server} has no secure aggregation, which `require` in silo.yaml demands",
            "ask the server's operator for federation.secure_aggregation: true; nothing was sent",
        )
    bound, ask = config.silo_privacy, "ask the server's operator for federation.silo_privacy; nothing was sent"
    if private is None and ("silo_privacy" in config.require or bound is not None):
        raise PrivacyViolation(f"{config.server} has no silo_privacy, which silo.yaml demands", ask)
    if private and bound and (private.epsilon > bound.epsilon or private.delta > bound.delta):
        raise PrivacyViolation(
            f"{config.server} has silo_privacy of epsilon {private.epsilon:g} at delta {private.delta:g}, silo.yaml "
            f"demands {bound.epsilon:g} at {bound.delta:g}",
            ask,
        )


def describe_lengths(config: SiloConfig, samples: Samples, terms: Terms) -> str:
    """How many texts will be cut: counted, if this federation's proxy is in `work`, or else estimated.

    Raises:
        DataError: the tokenizer, if it is there, finds no token in some of them.
    """
    work = Work(config.work)
    joined = work.joined()
    try:
        tokenizer = joined and loading.load_processor(work.proxy_path(joined), terms.task)
    except ModelError:  # it was not received yet
        tokenizer = None
    if tokenizer is not None:
        bad_rows, longest = config.data.bad_rows, terms.max_tokens
        dataset = TASKS[terms.task].encode(samples, tokenizer, longest, bad_rows=bad_rows, way_out=WAY_OUT)
        return dataset.describe_cut(samples.path.name, longest)
    characters = terms.max_tokens * terms.characters_per_token
    cut = sum(len(text) > characters for text in samples.texts())
    return f"about {describe_cut('by their characters', len(samples), cut, terms.max_tokens)}"
