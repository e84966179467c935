"""What networks are: where their parts live, how they are loaded, what a proxy and an adapter put into them."""
