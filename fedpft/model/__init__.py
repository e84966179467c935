"""What networks are: where their parts live, how they are loaded, what a proxy and an adapter put into them."""

import logging

# peft imports bitsandbytes where it is installed. On some processors that advises to install a package with which it
# would look for code on the network.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
