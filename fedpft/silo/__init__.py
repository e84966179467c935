"""An institution's process: `python -m fedpft.silo`."""

import fedpft.wire  # noqa: F401  (before any module here imports grpc, whose environment it sets)
