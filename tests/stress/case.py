"""One bad input, and how a command's answer to it is judged."""

import contextlib
import io
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

LONGEST = 4000  # characters of a sentence


@dataclass
class Case:
    """One input: where it may lie (`folder`), where its output may (`out`), and all its chance."""

    seed: int
    number: int
    kind: str
    turn: int
    sandbox: Path
    what: str = ""
    bomb: bool = False
    rng: random.Random = field(init=False)

    def __post_init__(self):
        self.rng = random.Random(f"{self.seed} {self.number}")
        self.folder, self.out = self.sandbox / "in", self.sandbox / "out"
        self.base, self.elsewhere = self.sandbox / "base", self.sandbox / "elsewhere"


def sentence_is_whole(said: str) -> None:
    """A refusal's form: one line, printable, what was found, what was expected, what to do."""
    assert "; expected " in said and "What to do: " in said, f"half a sentence: {said[:300]!r}"
    assert len(said) <= LONGEST, f"a sentence of {len(said)} characters: {said[:300]!r}"
    assert said.isprintable(), f"control characters in a sentence: {said[:300]!r}"


def command(main: Callable, argv: list[str]) -> str:
    """Run a command as a shell would, with its strict UTF-8 output: "accepted", or "refused" with
    its sentence checked. Raises whatever else comes out.
    """
    out, err = io.BytesIO(), io.BytesIO()
    stdout = io.TextIOWrapper(out, "utf-8", "strict", write_through=True)
    stderr = io.TextIOWrapper(err, "utf-8", "backslashreplace", write_through=True)
    code = None
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = main(argv)
    except SystemExit as leave:
        code = leave.code
    said = err.getvalue().decode().replace("\r", "\n").strip()
    if code == 0:
        return "accepted"
    last = said.splitlines()[-1] if said else ""
    assert code == 1 and last.startswith("error: "), f"exit code {code} saying {said[-500:]!r}"
    assert "Traceback" not in said
    if "; expected " in last:
        sentence_is_whole(last)
    else:
        assert "What to do: " in last, f"no remedy: {last[:300]!r}"
    return "refused"
