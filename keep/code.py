"""Which code a run's numbers come from: one digest for each function or class that makes them, and
the commit. A run that went on with other code would be of two makings, and no file would tell.
"""

import ast
import functools
import subprocess
from collections.abc import Iterable
from pathlib import Path

from inputs.files import digest

ROOT = Path(__file__).parent.parent
NUMBERS = {  # what makes the numbers, by module
    "lora": "LoRALinear inject",
    "loop": "diffusion_loss snr_weight learning_rate LossScale step_batches micro_step "
    "gradient_norm unscale_and_clip optimizer_step make_optimizer",
    "data": "Examples drawn_timesteps offset_noise views",
    "model": "predict encode_prompts encode_unconditional encode_images add_time_ids add_noise "
    "training_target rescale_zero_terminal_snr",
}
parsed = functools.lru_cache(maxsize=8)(ast.parse)  # a module's text is asked for many names
DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def digests(further: Iterable[tuple[str, str]] = (), root: Path = ROOT) -> dict[str, str]:
    """{"lora.LoRALinear": digest, ...} of the tree in `root`; an empty digest where there is no
    such function or class any more.

    further: (module, name) of what an option plugs in that makes it another run.
    """
    pairs = [(module, name) for module, names in NUMBERS.items() for name in names.split()]
    return {
        f"{module}.{name}": of_one((root / f"{module.replace('.', '/')}.py").read_bytes(), name)
        for module, name in (*pairs, *further)
    }


def of_one(source: bytes, name: str) -> str:
    """The digest of the function or class `name` in a module's text."""
    found = [
        each for each in parsed(source).body if isinstance(each, DOCUMENTED) and each.name == name
    ]
    return digest(written_out(found)) if found else ""


def written_out(node) -> str:
    """A syntax tree as text, without docstrings, and so without comments and layout. Not by
    ast.dump(), which writes empty fields in one version of Python and not in another.
    """
    if isinstance(node, list):
        return f"[{' '.join(map(written_out, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = fields["body"][1:]
    told = (f"{key}={written_out(v)}" for key, v in fields.items() if v is not None and v != [])
    return f"{type(node).__name__}({' '.join(told)})"


def changed(mine: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """The names of what has not the same digest in both."""
    return sorted(name for name in mine | theirs if mine.get(name) != theirs.get(name))


@functools.cache  # as the run began: files may change while it goes on
def commit() -> str:
    """The commit of this tree, with "+" where its Python files differ from it; "" where there is no
    git or no repository of its own.
    """
    git = lambda *words: subprocess.run(  # noqa: E731
        ["git", "-C", ROOT, *words], capture_output=True, text=True, timeout=20
    )
    try:
        # Without a repository of its own, git would go up to whatever lies around this folder.
        head = git("rev-parse", "HEAD").stdout.strip() if (ROOT / ".git").exists() else ""
        return head and head + "+" * bool(git("diff", "--quiet", "HEAD", "--", "*.py").returncode)
    except (OSError, subprocess.SubprocessError):
        return ""
