"""`python -m fewstep`, the same as the `fewstep` command."""

from fewstep.cli.main import app

app(prog_name="fewstep")
