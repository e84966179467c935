"""Keys of secure aggregation as messages, which name nobody: whose they are, the certificate says."""

from cryptography import x509

from fedpft.errors import CertificateError
from fedpft.privacy.secagg import Keys
from fedpft.wire.certificates import common_name
from fedpft.wire.v1 import federation_pb2 as pb


def message_of(keys: Keys) -> pb.Keys:
    """As they travel."""
    return pb.Keys(**{name: value for name, value in vars(keys).items() if name != "silo"})


def keys_of(message: pb.Keys) -> Keys:
    """As they arrived; nothing is believed yet. CertificateError if their certificate is none."""
    try:
        shown = x509.load_pem_x509_certificate(message.certificate)
    except ValueError:
        raise CertificateError("keys came without a certificate", "run the same version of fedpft everywhere") from None
    return Keys(
        silo=common_name(shown, "a certificate that came with keys"),
        certificate=message.certificate,
        seal_key=message.seal_key,
        mask_key=message.mask_key,
        commitment=message.commitment,
        signature=message.signature,
    )
