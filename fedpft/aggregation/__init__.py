"""The next adapter out of a round's updates: means that weigh, means that resist, steps of the server's optimizer."""
