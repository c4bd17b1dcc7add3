"""The command line: `mmaccel demo | ask | generate | bench | list | explain | probe`."""

from __future__ import annotations

from mmaccel.cli.app import main

__all__ = ["main"]
