"""`python -m hetero_glm5.launch_server --model FOLDER|demo [flags]`: flags, a port, then the server.

What costs seconds to import (torch, fastapi) is imported when the flags are known to be right and the port is ours.
"""

from __future__ import annotations

import argparse
import errno
import re
import socket
import sys
from dataclasses import replace
from typing import NoReturn

from hetero_glm5.config import EngineConfig, ServerConfig
from hetero_glm5.core import UserError
from hetero_glm5.flags import add_flags, from_args, nearest_flag
from hetero_glm5.model_config import DEMO, ModelConfig, checkpoint_folder

_KINDS = {"int": "a whole number", "float": "a number"}


class _Parser(argparse.ArgumentParser):
    """argparse that says one sentence, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {_sentence(message)}\n")


def _sentence(message: str) -> str:
    """argparse's `argument --port: invalid int value: 'x'` in this project's words."""
    about = re.fullmatch(r"argument ([^:/]+)[^:]*: (.*)", message)
    if about is None:
        return f"{message}."
    name, complaint = about.groups()
    invalid = re.fullmatch(r"invalid (\w+) value: (.*)", complaint)
    if invalid is not None:
        return f"{name} is {invalid[2]}; it must be {_KINDS.get(invalid[1], invalid[1])}."
    if complaint.startswith("expected "):
        return f"{name} needs a value."
    if complaint.startswith("ignored explicit argument"):
        return f"{name} takes no value."
    return f"{name}: {complaint}."


def parse_flags(argv: list[str] | None) -> tuple[EngineConfig, ServerConfig]:
    """The configs that the command line asks for. Exits with 2 on a flag that does not exist; raises UserError."""
    parser = _Parser("python -m hetero_glm5.launch_server", description="Serves GLM-5.", allow_abbrev=False)
    add_flags(parser, EngineConfig, "model and engine")
    add_flags(parser, ServerConfig, "server")
    args, rest = parser.parse_known_args(argv)
    unknown = next((word for word in rest if word.startswith("-")), None)
    if unknown is not None:
        parser.exit(2, f"error: {nearest_flag(unknown, list(parser._option_string_actions))}\n")
    if rest:
        parser.exit(2, f"error: {rest[0]!r} belongs to no flag. --help lists them all.\n")
    return from_args(EngineConfig, args), from_args(ServerConfig, args)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UserError(f"--host {host} cannot be used: {error.strerror}.") from error
    except UnicodeError as error:  # an empty or too long part between dots, or bytes that are no text
        raise UserError(f"--host {host} cannot be used: it is no host name and no address.") from error
    try:
        listening = socket.socket(family, kind, protocol)
    except OSError as error:  # such as an IPv6 address without IPv6
        raise UserError(f"--host {host} cannot be used: {error.strerror}.") from error
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"Port {port} on {host} is already in use. Stop what listens there, or choose another with --port."
            ) from error
        raise UserError(f"Cannot listen on {host}, port {port}: {error.strerror}.") from error
    return listening


def main(argv: list[str] | None = None) -> int:
    try:
        engine, server = parse_flags(argv)
        if not engine.model:
            raise UserError("--model is missing: give the folder of a checkpoint in Hugging Face format, or demo.")
        if engine.model == DEMO and server.served_model_name is None:
            server = replace(server, served_model_name=DEMO)
        engine = replace(engine, model=checkpoint_folder(engine.model))
        ModelConfig.load(engine.model)  # a wrong folder is told before anything slow happens
        listening = listen(server.host, server.port)
        from hetero_glm5.server.serve import serve

        return serve(engine, server, listening)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
