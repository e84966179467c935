"""Version 1 of the protocol: code generated from protos/fedpft/wire/v1/federation.proto."""
