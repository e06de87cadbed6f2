"""Compare an environment with the requirements that setup.py states, without installing or importing anything heavy.

Used by tools/setup_env.sh before it installs. Exit status 0: everything is there. Exit status 1: one line on standard
output for each requirement that is not met. Needs the standard library and pip (or ``packaging``) only.
"""

import argparse
import ast
import importlib.metadata
import re
import sys
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def stated(setup_py: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The literals ``REQUIREMENTS`` and ``EXTRAS`` of a setup.py."""
    literals = {}
    for node in ast.parse(setup_py.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("REQUIREMENTS", "EXTRAS"):
                literals[name] = ast.literal_eval(node.value)
    return literals["REQUIREMENTS"], literals["EXTRAS"]


def installed_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def unmet(extras: list[str], setup_py: Path = ROOT / "setup.py") -> list[str]:
    """What this environment lacks, one readable line a requirement.

    Raises:
        ValueError: an extra that setup.py does not declare.
    """
    requirements, known = stated(setup_py)
    for extra in extras:
        if extra not in known:
            raise ValueError(f"got the extra {extra!r}; setup.py declares {', '.join(sorted(known))}")
        requirements = requirements + known[extra]
    lines = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        version = installed_version(requirement.name)
        if version is None:
            lines.append(f"{text} (not installed)")
        elif not requirement.specifier.contains(version, prereleases=True):
            lines.append(f"{text} (installed: {version})")
    return lines


def respectful_constraints(constraints: Path) -> str:
    """The tested pins, less those of packages that are installed already; an installed torch is kept exactly."""
    kept = []
    for line in constraints.read_text(encoding="utf-8").splitlines():
        match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line)
        if match is None or installed_version(match.group()) is None:
            kept.append(line)
    torch_version = installed_version("torch")
    if torch_version is not None:
        kept.append(f"torch=={torch_version}")
    return "\n".join(kept) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--extras", default="", help="Extras of setup.py to check too, separated by commas.")
    parser.add_argument(
        "--write-constraints", type=Path, metavar="FILE",
        help="Write constraints for pip: the tested versions, but what is installed here stays, torch exactly.",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.write_constraints is not None:
        arguments.write_constraints.write_text(respectful_constraints(ROOT / "constraints.txt"), encoding="utf-8")
    lines = unmet([extra for extra in arguments.extras.split(",") if extra])
    print("\n".join(lines), end="\n" if lines else "")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
