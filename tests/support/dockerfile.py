"""The steps of a Dockerfile, as far as ours need it."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """A stage: what it is made of, and its steps as (instruction, arguments), without those of what it is made of."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [arguments for each, arguments in self.steps if each == instruction]


def stages_of(path: Path) -> dict[str, Stage]:
    text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.strip() for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]
    stages: dict[str, Stage] = {}
    stage = Stage("", "")
    for line in lines:
        instruction, _, arguments = line.partition(" ")
        if instruction == "FROM":
            base, _, name = arguments.partition(" AS ")
            stage = stages[name] = Stage(name, base)
        else:
            stage.steps.append((instruction, arguments.strip()))
    return stages


def environment_of(stage: Stage) -> dict[str, str]:
    """Its ENV and the defaults of its ARG."""
    pairs = [pair for line in (*stage.all("ARG"), *stage.all("ENV")) for pair in line.split()]
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def command_of(arguments: str) -> list[str]:
    """The words of a CMD, or of a HEALTHCHECK's, in JSON form."""
    return json.loads(arguments[arguments.index("[") :])
