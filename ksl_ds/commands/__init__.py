"""One file per command, short, read like the paper's method section."""
