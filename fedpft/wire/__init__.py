"""What crosses the wire, and how: messages, files in chunks, tensors, TLS, and errors as gRPC status codes.

gRPC reads two settings from the environment when it is first imported, so this package sets them before any of its
modules imports it (and `fedpft.server` and `fedpft.silo` import this package first):

- TLS 1.3 only. grpcio has no switch for the lowest TLS version, but it can be told which TLS 1.2 ciphers to offer. The
  one named here needs a pre-shared key, which neither side has, so that no TLS 1.2 handshake can succeed; the ciphers
  of TLS 1.3 are not subject to this list.
- Silence from gRPC's C core, which would print a line of its own for each failed handshake. The reasons reach the
  user as errors with a remedy; set GRPC_VERBOSITY=INFO to see the core's view.
"""

import os

os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-AES128-CBC-SHA"
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
