"""Which code a run's numbers come from: one digest for each function, class and constant that
makes them, and the commit. A run that went on with other code would be of two makings, and no file
would tell.
"""

import ast
import functools
import subprocess
from collections.abc import Iterable
from pathlib import Path

from inputs.files import digest

ROOT = Path(__file__).parent.parent
# The modules that make the numbers, and what in them makes none: files, kernels, ways of loading.
MODULES = {
    "lora": "FILE_NAME set_strength refuse_merged merge unmerge unwrap peft_bytes save AdapterFile "
    "read load",
    "model": "READERS free_memory load_unet build_unet check_passes fill_unet use_attention "
    "use_gradient_checkpointing checkpointable load_text_encoders load_vae load_tokenizers",
    "data": "in_batches send",
    "loop": "CONFIG train_plain",
    # Of inputs/ all else either says no, or gives what is told by its content: the files of the
    # base, the pictures and captions, the options.
    "inputs.pictures": "LONGEST_SIDE check_pictures all_damaged_named refuse_small made_to_fit "
    "table_of_sizes changes warnings",
}
parsed = functools.lru_cache(maxsize=8)(ast.parse)  # a module's text is asked for many names
DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def makers(module: str, root: Path = ROOT) -> list[str]:
    """The functions, classes and constants of one of MODULES that make numbers, by full name."""
    names = named(root, module).keys() - set(MODULES[module].split())
    return [f"{module}.{name}" for name in sorted(names)]


def digests(further: Iterable[str] = (), root: Path = ROOT) -> dict[str, str]:
    """{"lora.LoRALinear": digest, ...} of all that makes numbers in the tree in `root`.

    further: full names of what an option plugs in that makes it another run.
    """
    names = [name for module in MODULES for name in makers(module, root)]
    return {name: of_one(root, name) for name in [*names, *further]}


def together(*names: str) -> str:
    """One digest of "module.name" of each of `names`: of what a cached file was made by."""
    return digest(*(of_one(ROOT, name) for name in names))


def named(root: Path, module: str) -> dict[str, list[ast.stmt]]:
    """The statements of a module's top level that give a name something, or an attribute of it, by
    that name; and those that call one of its functions, as torch.manual_seed(0) does.
    """
    found: dict[str, list[ast.stmt]] = {}
    for each in parsed((root / f"{module.replace('.', '/')}.py").read_bytes()).body:
        if isinstance(each, DOCUMENTED):
            names = {each.name}
        else:  # of A, B = 1, 2 both
            nodes = [n for n in ast.walk(each) if isinstance(getattr(n, "ctx", None), ast.Store)]
            if isinstance(each, ast.Expr) and isinstance(each.value, ast.Call):
                nodes.append(each.value.func)
            names = {*map(first_name, nodes)} - {""}
        for name in names:
            found.setdefault(name, []).append(each)
    return found


def first_name(node: ast.AST) -> str:
    """The name that a.b, a[0] or a begin with; "" where there is none."""
    while hasattr(node, "value"):
        node = node.value
    return getattr(node, "id", "")


def of_one(root: Path, name: str) -> str:
    """The digest of "module.name"; empty where the module has no such thing any more."""
    module, _, own = name.rpartition(".")
    found = named(root, module).get(own)
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

    def git(*words: str) -> subprocess.CompletedProcess:
        command = ["git", "-C", ROOT, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=20)

    try:
        # Without a repository of its own, git would go up to whatever lies around this folder.
        head = git("rev-parse", "HEAD").stdout.strip() if (ROOT / ".git").exists() else ""
        return head and head + "+" * bool(git("diff", "--quiet", "HEAD", "--", "*.py").returncode)
    except (OSError, subprocess.SubprocessError):
        return ""
