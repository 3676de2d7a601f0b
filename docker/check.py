"""Check the Dockerfile without Docker: what can be read from it, and, with --run, its CPU image in a clean Debian.

    python docker/check.py                                  reads: instructions, stages, pins, users, copied files
    python docker/check.py --run                            as root, with debootstrap: every RUN line, then the demo

The clean Debian is what debootstrap makes of the release that the base image is built on, with Debian's own Python in a
virtual environment on the PATH: the base image has a Python compiled from source instead. Each stage is a copy of the
one it starts from, each RUN line is run by chroot in namespaces of its own, USER, WORKDIR, ENV and ARG as Docker has
them. The GPU stage is read, not run.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dockerfile_parse import DockerfileParser


ROOT = Path(__file__).resolve().parents[1]
KNOWN = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "WORKDIR"}  # all that the file uses
PATH = "/opt/python/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MIRROR = "http://deb.debian.org/debian"
DEMO = ["compress", "blip-tiny", "--ratio", "0.9", "--export", "onnx", "--output", "demo"]
SHORT = ["--samples", "20", "--max-steps", "2", "--bench-batch", "1"]  # minutes less


@dataclass
class Stage:
    """One stage of the file.

    Attributes:
        name: of the stage.
        base: image or stage that it starts from, ARGs filled in.
        steps: its instructions after FROM: (instruction, value, number of its first line).
    """

    name: str
    base: str
    steps: list[tuple[str, str, int]] = field(default_factory=list)


def read(path: Path) -> list[Stage]:
    """Split a Dockerfile into its stages.

    Args:
        path: the file.

    Returns:
        list[Stage]: in order.

    Raises:
        ValueError: an instruction that this script does not know, or a stage without a name.
    """
    with path.open("rb") as file:
        parsed = DockerfileParser(fileobj=file, cache_content=True).structure
    given: dict[str, str] = {}
    stages: list[Stage] = []
    for line in parsed:
        instruction, value, number = line["instruction"], line["value"], line["startline"] + 1
        if instruction == "COMMENT":
            continue
        if instruction not in KNOWN:
            raise ValueError(f"line {number}: {instruction} is no instruction this file should need")
        if instruction == "FROM":
            found = re.fullmatch(r"(\S+)\s+AS\s+(\S+)", value, re.IGNORECASE)
            if found is None:
                raise ValueError(f"line {number}: FROM {value} does not name its stage")
            stages.append(Stage(found[2], fill(found[1], given)))
        elif not stages:
            if instruction != "ARG":
                raise ValueError(f"line {number}: {instruction} stands before FROM")
            name, _, default = value.partition("=")
            given[name] = default
        else:
            stages[-1].steps.append((instruction, value, number))
    return stages


def fill(text: str, values: dict[str, str]) -> str:
    """Replace ${NAME} and $NAME, as Docker does in FROM, ENV, COPY, USER and WORKDIR.

    Args:
        text: a value.
        values: name -> its value.

    Returns:
        str: the value, unknown names gone.
    """
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: values.get(found[1] or found[2], ""), text)


def problems(path: Path, context: Path) -> Iterator[str]:
    """Find what is wrong with a Dockerfile as far as reading it tells.

    Args:
        path: the file.
        context: the folder it is built in.

    Yields:
        str: one line each.
    """
    try:
        stages = read(path)
    except ValueError as error:
        yield str(error)
        return
    names = [stage.name for stage in stages]
    if stages and stages[-1].name != "cpu":
        yield "the last stage, which docker builds by default, is not cpu"
    for wanted in ("cpu", "gpu"):
        if wanted not in names:
            yield f"there is no stage {wanted}"
    for place, stage in enumerate(stages):
        if stage.base not in names[:place] and not re.search(r":\d+\.\d+\.\d+\S*$|@sha256:[0-9a-f]{64}$", stage.base):
            yield f"stage {stage.name}: the base image {stage.base} is not pinned to a version"
        for instruction, value, number in stage.steps:
            where = f"line {number} ({stage.name})"
            if instruction == "RUN":
                yield from (f"{where}: {what}" for what in shell_problems(value))
            elif instruction == "COPY":
                yield from (f"{where}: {what}" for what in copy_problems(value, names[:place], context))
            elif instruction in ("ENTRYPOINT", "CMD"):
                try:
                    json.loads(value)
                except ValueError:
                    yield f"{where}: {instruction} is no JSON list, so that a shell would stand between"
        if stage.name in ("cpu", "gpu"):
            users = [value for instruction, value, _ in stage.steps if instruction == "USER"]
            if not users or users[-1] in ("root", "0"):
                yield f"stage {stage.name} runs as root"


def shell_problems(command: str) -> Iterator[str]:
    """Find what is wrong with a RUN line.

    Args:
        command: for the shell.

    Yields:
        str: one line each.
    """
    checked = subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True)
    if checked.returncode:
        yield f"the shell does not read it: {checked.stderr.strip()}"
    if "apt-get install" in command:
        if "--no-install-recommends" not in command:
            yield "apt-get installs recommended packages, too"
        if "rm -rf /var/lib/apt/lists/*" not in command:
            yield "apt's lists stay in the layer"
    if "pip install" in command and "--constraint" not in command:
        yield "pip installs whatever versions are newest"


def copy_problems(value: str, earlier: Sequence[str], context: Path) -> Iterator[str]:
    """Find what is wrong with a COPY line.

    Args:
        value: what follows COPY.
        earlier: names of the stages before.
        context: the folder the file is built in.

    Yields:
        str: one line each.
    """
    origin, sources, _ = copied(value)
    if origin is not None:
        if origin not in earlier:
            yield f"it copies from {origin}, which is no earlier stage"
        return
    there = context_files(context)
    for source in sources:
        if source != "." and not any(name == source or name.startswith(f"{source.rstrip('/')}/") for name in there):
            yield f"it copies {source}, which is not in the context, or is ignored"


def copied(value: str) -> tuple[str | None, list[str], str]:
    """Split a COPY line.

    Args:
        value: what follows COPY.

    Returns:
        tuple[str | None, list[str], str]: the stage it copies from, None for the context; sources; target.
    """
    words = shlex.split(value)
    origin = next((word.removeprefix("--from=") for word in words if word.startswith("--from=")), None)
    *sources, target = [word for word in words if not word.startswith("--")]
    return origin, sources, target


def context_files(context: Path) -> list[str]:
    """List the files that Docker would send: those that git knows, less those of .dockerignore.

    Args:
        context: the folder of the repository.

    Returns:
        list[str]: paths in it.
    """
    command = ["git", "-C", str(context), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    ignored = (context / ".dockerignore").read_text(encoding="utf-8").split()
    return [name for name in listed if (context / name).is_file() and not _ignored(name, ignored)]


def _ignored(name: str, patterns: Sequence[str]) -> bool:
    parts = name.split("/")
    for pattern in patterns:
        anywhere, bare = pattern.startswith("**/"), pattern.removeprefix("**/")
        heads = range(1, len(parts) + 1)
        if any(fnmatch.fnmatchcase("/".join(parts[:end]), bare) for end in heads):
            return True
        if anywhere and any(fnmatch.fnmatchcase(part, bare) for part in parts):
            return True
    return False


# --- the CPU image in a clean Debian ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """The files of a stage, and how its commands are run.

    Attributes:
        root: its files.
        env: environment, without ARGs.
        folder: WORKDIR.
        user: USER.
        entry: ENTRYPOINT.
    """

    root: Path
    env: dict[str, str]
    folder: str = "/"
    user: str = "root"
    entry: tuple[str, ...] = ()


class Builder:
    """Builds stages one after the other, as Docker would.

    Args:
        stages: of the file.
        work: an empty folder for their files.
        given: build arguments.
        env: more environment of every command: where this machine has its packages.
        shared: files and folders of this machine that commands see, read-only: certificates, packages on the disk.
    """

    def __init__(
        self, stages: Sequence[Stage], work: Path, given: dict[str, str], env: dict[str, str], shared: Sequence[Path]
    ) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.work = work
        self.given = given
        self.env = env
        self.shared = shared
        self.done: dict[str, Image] = {}

    def build(self, name: str) -> Image:
        """Build a stage, and those that it needs.

        Args:
            name: of the stage, or the base image.

        Returns:
            Image: the result.
        """
        if name not in self.done:
            self.done[name] = self._stage(self.stages[name]) if name in self.stages else self._debian(name)
        return self.done[name]

    def _debian(self, image: str) -> Image:
        """Make what comes nearest to an official image of Python."""
        release = image.rpartition("-")[2]
        root = self.work / "debian"
        print(f"== {image}: Debian {release} by debootstrap", flush=True)
        packages = "--include=ca-certificates,python3,python3-venv"
        subprocess.run(
            ["debootstrap", "--variant=minbase", packages, release, str(root), MIRROR],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        made = Image(root, {"PATH": PATH, "LANG": "C.UTF-8"})
        self.run(made, ["python3", "-m", "venv", "/opt/python"])
        return made

    def _stage(self, stage: Stage) -> Image:
        base = self.build(stage.base)
        root = self.work / stage.name
        subprocess.run(["cp", "--archive", "--reflink=auto", str(base.root), str(root)], check=True)
        image = replace(base, root=root)
        arguments: dict[str, str] = {}
        for instruction, value, number in stage.steps:
            known = image.env | arguments
            if instruction == "ARG":
                name, _, default = value.partition("=")
                arguments[name] = self.given.get(name, fill(default, known))
            elif instruction == "ENV":
                pairs = (pair.partition("=") for pair in shlex.split(value))
                image = replace(image, env=image.env | {name: fill(text, known) for name, _, text in pairs})
            elif instruction == "WORKDIR":
                image = replace(image, folder=value)
                (root / value.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif instruction == "USER":
                image = replace(image, user=value)
            elif instruction == "ENTRYPOINT":
                image = replace(image, entry=tuple(json.loads(value)))
            elif instruction == "COPY":
                self._copy(value, root)
            elif instruction == "RUN":
                print(f"== line {number} ({stage.name}): {value}", flush=True)
                seconds = self.run(replace(image, env=known), ["/bin/sh", "-c", value])
                print(f"== {seconds:.0f} s", flush=True)
        return image

    def _copy(self, value: str, root: Path) -> None:
        """Copy files of the context or of another stage; a folder's content, as Docker does."""
        origin, sources, target = copied(value)
        there = root / target.lstrip("/")
        for source in sources:
            if origin is not None:
                found = self.build(origin).root / source.lstrip("/")
                names = [path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()]
            else:
                found = ROOT / source
                prefix = "" if source == "." else f"{source.rstrip('/')}/"
                names = [name.removeprefix(prefix) for name in context_files(ROOT) if name.startswith(prefix)]
            if found.is_file():
                there.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(found, there / found.name if target.endswith("/") else there)
            for name in names if found.is_dir() else ():
                (there / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(found / name, there / name)

    def run(self, image: Image, command: Sequence[str], offline: bool = False) -> float:
        """Run a command in the files of a stage, in mount and process namespaces of its own.

        Args:
            image: whose.
            command: the command.
            offline: without any network.

        Returns:
            float: seconds it took.

        Raises:
            CalledProcessError: it failed.
        """
        root = image.root
        steps = [["mount", "-t", "proc", "proc", str(root / "proc")]]
        steps += [["mount", "-t", "tmpfs", "tmpfs", str(root / "dev" / "shm")]]
        for path in self.shared:
            there = root / path.relative_to("/")
            (there if path.is_dir() else there.parent).mkdir(parents=True, exist_ok=True)
            if not path.is_dir():
                there.touch()
            steps += [["mount", "--bind", str(path), str(there)], ["mount", "-o", "remount,bind,ro", str(there)]]
        home = "/root" if image.user == "root" else f"/home/{image.user}"
        env = {"HOME": home, **image.env, **self.env}
        inside = f"cd {shlex.quote(image.folder)} && exec {shlex.join(command)}"
        variables = [f"{name}={value}" for name, value in env.items()]
        user = f"--userspec={image.user}:{image.user}"
        steps += [["exec", "chroot", user, str(root), "/usr/bin/env", "-i", *variables, "/bin/sh", "-c", inside]]
        isolated = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            *(["--net"] if offline else []),
            "sh",
            "-c",
        ]
        start = time.perf_counter()
        subprocess.run([*isolated, " && ".join(map(shlex.join, steps))], check=True)
        return time.perf_counter() - start


def try_out(stages: Sequence[Stage], options: argparse.Namespace) -> None:
    """Build the CPU image and run the demo in it.

    Args:
        stages: of the file.
        options: of the command line.
    """
    pairs = {name: dict(pair.split("=", 1) for pair in getattr(options, name)) for name in ("build_arg", "env")}
    with tempfile.TemporaryDirectory(prefix="vlprune-image-", dir=options.work) as folder:
        builder = Builder(stages, Path(folder), pairs["build_arg"], pairs["env"], options.share)
        image = builder.build("cpu")
        if options.freeze:
            with options.freeze.open("w", encoding="utf-8") as file:
                file.write(frozen(image.root))
        demo = [*image.entry, *DEMO, *([] if options.full_demo else SHORT)]
        print(f"== as {image.user} in {image.folder}, without network: {shlex.join(demo)}", flush=True)
        seconds = builder.run(image, demo, offline=True)
        report = image.root / image.folder.lstrip("/") / DEMO[-1] / "report.html"
        if report.stat().st_uid != 1000:
            raise SystemExit("the demo did not run as the image's user")
        size = subprocess.run(
            ["du", "-sm", str(image.root)], capture_output=True, text=True, check=True
        ).stdout.split()[0]
        print(f"== demo: {seconds:.0f} s; report.html has {report.stat().st_size:,} bytes; the image's files {size} MB")


def frozen(root: Path) -> str:
    """List the packages that were installed, for docker/constraints.txt.

    Args:
        root: files of the CPU image.

    Returns:
        str: a line per package; local versions ("+cpu") are cut, as other images have others.
    """
    python = ["chroot", str(root), "/opt/python/bin/python", "-m", "pip", "freeze", "--exclude", "vlprune"]
    listed = subprocess.run(python, capture_output=True, text=True, check=True).stdout
    lines = [line.partition(" @ ")[0].partition("+")[0] for line in listed.splitlines()]
    gpu = [line.replace("onnxruntime==", "onnxruntime-gpu==") for line in lines if line.startswith("onnxruntime==")]
    return "\n".join(sorted([*lines, *gpu], key=str.lower)) + "\n"


def main() -> int:
    """Check the file, and with --run the image.

    Returns:
        int: 0, or 1 when something is wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="build the CPU image in a clean Debian, too (as root)")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as of docker build")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="of every command")
    parser.add_argument(
        "--share", action="append", default=[], type=Path, metavar="PATH", help="what commands see of this machine"
    )
    parser.add_argument("--work", type=Path, help="where the images are made (3 GB), removed at the end")
    parser.add_argument("--freeze", type=Path, metavar="FILE", help="write the installed versions")
    parser.add_argument("--full-demo", action="store_true", help="make demo's, which takes minutes longer")
    options = parser.parse_args()

    found = list(problems(ROOT / "Dockerfile", ROOT))
    for line in found:
        print(f"Dockerfile: {line}", file=sys.stderr)
    if found:
        return 1
    stages = read(ROOT / "Dockerfile")
    counts = ", ".join(f"{stage.name} ({sum(step[0] == 'RUN' for step in stage.steps)} RUN)" for stage in stages)
    print(f"Dockerfile reads well: {counts}")
    if options.run:
        if os.geteuid() != 0 or shutil.which("debootstrap") is None:
            print("--run needs root and debootstrap", file=sys.stderr)
            return 1
        try_out(stages, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
