"""From the FM to its proxy: what is kept, how the rest is made up for, and what is sent."""
