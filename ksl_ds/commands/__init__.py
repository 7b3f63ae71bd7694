"""One short file per command: fetch, call, show. The command line is parsed in cli.py."""
