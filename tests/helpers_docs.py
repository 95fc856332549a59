"""The pages for users, taken apart: code blocks, code in sentences, commands, links."""

import ast
import os
import re
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "miniature" / "README.md",
         *sorted((ROOT / "docs").rglob("*.md"))]  # fmt: skip
"""Every page, also one that is added to docs/."""
HEADERS = [*sorted((ROOT / "conf" / "experiment").glob("*.yaml")),
           *sorted((ROOT / "examples").glob("*.py"))]  # fmt: skip
"""Files whose headers have commands: experiments in comments, examples in docstrings."""
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAMS = ("make", "python", "torchrun", "srun", "deepspeed")
"""Programs whose command lines can be checked without running them."""
UNCHECKED = {
    "apt-get": "installs on the machine",
    "cat": "of an archive that is downloaded",
    "git": "needs a clone with large files",
    "gunzip": "of an archive that is downloaded",
    "hf": "downloads a model",
    "ln": "test_whole_way links the scores of another run",
    "mkdir": "the same",
    "pre-commit": "writes into .git",
    "python3": "another machine's Python: test_gpu_day has what it is asked",
    "sbatch": "hands its settings on to the page's script, whose line with srun is checked",
    "tensorboard": "a server of its own",
    ".venv/bin/uv": "downloads a package",
}
"""Programs on the pages whose command lines are not checked, and why."""
OTHERS = (
    "accelerate", "bash", "cp", "curl", "docker", "git", "kill", "mpirun", "mypy", "pip", "pytest",
    "python3", "rsync", "ruff", "scp", "ssh", "sudo", "tar", "unzip", "uv", "wget",
)  # fmt: skip
"""Programs that a new page may use; whoever writes it adds them to one of the two above."""
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)((?:    .*\n|\n(?=    ))+)")
SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced blocks of these languages."""
    return [body for language, body in FENCED.findall(page.read_text()) if language in languages]


def spans(page: Path) -> list[str]:
    """Code in sentences and tables, each in one line."""
    text = INDENTED.sub("\n", FENCED.sub("", page.read_text()))
    return [" ".join(span.split()).replace("<40 digits>", COMMIT) for span in SPAN.findall(text)]


def shell_lines(page: Path) -> list[str]:
    """Lines of a page that a shell would run; continued ones are joined."""
    indented = INDENTED.findall(FENCED.sub("", page.read_text()))
    text = "\n".join([*blocks(page, "sh", "bash", ""), *indented]).replace("\\\n", " ")
    return _commands_among([*text.splitlines(), *spans(page)])


def _commands_among(lines: list[str]) -> list[str]:
    stripped = [line.strip() for line in lines]
    return [line for line in stripped if line and not line.startswith("#") and _is_command(line)]


def program_of(line: str) -> str:
    """The first word of a command, after its variables."""
    return re.sub(r"^(?:[A-Z_]+=\S+ )*", "", line).partition(" ")[0]


def _is_command(line: str) -> bool:
    program = program_of(line)
    if program == line:  # a word
        return False
    return program in (*PROGRAMS, *UNCHECKED, *OTHERS)


def commands(page: Path) -> list[str]:
    """The command lines of a page, with something for what they leave open (`...`)."""
    if page.suffix == ".yaml":
        header = re.sub(r"\n# +", " ", page.read_text())
        lines = re.findall(r"make [a-z]+(?: [A-Z]+=(?:\"[^\"]*\"|\w+))+", header)
    elif page.suffix == ".py":
        header = ast.get_docstring(ast.parse(page.read_text())) or ""
        lines = _commands_among(header.replace(".venv/bin/", "").splitlines())
    else:
        lines = shell_lines(page)
    lines = [re.sub(r"\s*\bEXP=\.\.\.", "", line) for line in lines]
    lines = [re.sub(r"(?<=[\" ])\.\.\.(?=\")", "pairs.root=/x", line) for line in lines]
    return list(dict.fromkeys(lines))


def links(page: Path) -> list[str]:
    """Where a page points to in this repository: `path` or `path#heading`."""
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text()))
    return [target for target in targets if not re.match(r"\w+:", target)]


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dry_run(*words: str) -> subprocess.CompletedProcess[str]:
    """The commands that make would run, independent of a make that may have started the tests."""
    inherited = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES"}
    inherited |= {"ARGS", "EXP", "GATE", "NPROC", "RUN", "VOTE"}  # make hands its variables on
    ours = {name: value for name, value in os.environ.items() if name not in inherited}
    command = ["make", "--no-print-directory", "-n", "-o", ".venv/.ready", *words]
    return subprocess.run(command, cwd=ROOT, env=ours, capture_output=True, text=True, check=False)


def started(command: str) -> list[list[str]]:
    """The modules of ours that a command line starts, with the arguments each one gets.

    Raises:
        ValueError: make does not know the target or a variable.
    """
    command = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", command).replace('"$@"', "")
    words = shlex.split(command, comments=True)
    given = [word for word in words if re.match(r"[A-Z]+=", word)]
    if "make" not in words:
        lines = [words]
    else:
        done = dry_run(*[word for word in words if word != "make" and word not in given], *given)
        if done.returncode:
            raise ValueError(done.stderr)
        lines = [shlex.split(line) for line in done.stdout.splitlines() if " -m " in line]
    modules = [(line, flag) for line in lines for flag in ("-m", "--module") if flag in line]
    return [line[line.index(flag) + 1 :] for line, flag in modules]
