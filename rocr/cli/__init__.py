"""The command line: `rocr COMMAND ...`; the only part of rocr that prints."""

from rocr.cli.main import main

__all__ = ["main"]
