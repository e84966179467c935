"""The FM owner's process: `python -m fedpft.server`."""

import fedpft.wire  # noqa: F401  (before any module here imports grpc, whose environment it sets)
