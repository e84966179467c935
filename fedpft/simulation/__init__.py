"""A federation without its processes and sockets, for as many silos as one likes: `fedpft simulate`."""
