"""``qat doctor``."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

from qat.commands.parser import Commands


def add_doctor(commands: Commands) -> None:
    commands.add("doctor", run_doctor, "Check which parts are installed and work on this machine.")


def run_doctor(options: Namespace) -> Any:
    from qat.doctor import examine

    return examine()
