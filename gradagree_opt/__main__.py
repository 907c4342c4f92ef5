"""``python -m gradagree_opt`` is the ``gradagree`` command."""

from gradagree_opt.cli import app

app(prog_name="gradagree")
