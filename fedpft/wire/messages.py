"""Keys of secure aggregation as messages."""

from fedpft.privacy.secagg import Keys
from fedpft.wire.v1 import federation_pb2 as pb


def message_of(keys: Keys) -> pb.Keys:
    """As they travel."""
    return pb.Keys(**vars(keys))


def keys_of(message: pb.Keys) -> Keys:
    """As they arrived; nothing is looked at."""
    return Keys(
        silo=message.silo,
        certificate=message.certificate,
        seal_key=message.seal_key,
        mask_key=message.mask_key,
        commitment=message.commitment,
        signature=message.signature,
    )
