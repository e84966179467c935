"""What a run came to: a table, a page, figures."""
