"""`hetero-glm5 COMMAND`: each command is a file of its own; `hetero-glm5 --help` lists them."""

from hetero_glm5.cli.app import app

__all__ = ["app"]
