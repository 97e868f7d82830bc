"""`python -m grail_hf`: the same as the `grail-hf` command."""

from grail_hf.cli import app

app()
