"""An edit of the book takes effect: whoever edits it trains, with all that is plugged in, the same
bytes as --plain does with the same edit. In a copy of the tree, as a reader would.
"""

import pytest

from tree import copied, python

pytestmark = pytest.mark.slow  # each is runs in a process of its own

BRANCH = "return self.base(x) + scale * self.up(self.down(x))"
# What is edited: the module, the old text and the new. Then what else is asked of the product (its
# fused layers round otherwise, where they are used), and what it says.
EDITS = {
    "the branch five times as strong": (
        [("lora.py", BRANCH, BRANCH.replace("+ scale", "+ 5 * scale"))],
        (),
        ("by the book's lines, since", "its files will act otherwise in other programs"),
    ),
    "tanh": (
        [("lora.py", BRANCH, "return self.base(x) + torch.tanh(scale * self.up(self.down(x)))")],
        (),
        ("by the book's lines, since", "its files will act otherwise in other programs"),
    ),
    "relu after A": (
        [("lora.py", "self.up(self.down(x))", "self.up(F.relu(self.down(x)))")],
        (),
        ("by the book's lines, since", "its files will act otherwise in other programs"),
    ),
    "another parameter": (
        [
            ("lora.py", BRANCH, BRANCH.replace("+ scale", "+ self.gain * scale")),
            (
                "lora.py",
                "        self.strength = 1.0",
                "        self.gain = nn.Parameter(torch.ones(1))\n        self.strength = 1.0",
            ),
        ],
        (),
        ("by the book's lines, since", "have no place in an adapter file"),
    ),
    "Huber": (
        [("loop.py", "F.mse_loss(", "F.huber_loss(")],
        ("--no-fused",),
        (),
    ),
    "another learning rate": (
        [
            (
                "loop.py",
                '"cosine": (1 + math.cos(math.pi * done)) / 2',
                '"cosine": 1 - done',
            )
        ],
        ("--no-fused", "--lr-scheduler", "cosine"),
        (),
    ),
    "each matrix clipped by itself": (
        [
            (
                "loop.py",
                "parameter.grad.mul_(shrink)",
                "parameter.grad.mul_(min(1.0, 0.01 / (parameter.grad.norm().item() + 1e-6)))",
            )
        ],
        ("--no-fused",),
        ("matrix by matrix, since loop.unscale_and_clip is edited",),
    ),
    "other examples": (
        [
            (
                "loop.py",
                "range(step * n, (step + 1) * n)",
                "range(run.step // 2 * n, (run.step // 2 + 1) * n)",
            )
        ],
        ("--no-fused",),
        (),
    ),
    "another clip": (
        [("loop.py", "shrink = min(1.0, ", "shrink = min(0.5, ")],
        ("--no-fused",),
        (),
    ),
    "feed-forward layers": (
        [("lora.py", '"to_v", "to_out.0")', '"to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")')],
        ("--no-fused",),
        (),
    ),
}
BOTH = """
import sys
import lora, loop, torch
from inputs import options
from keep import training
argv = sys.argv[1:]
loop.train_plain(options.parse([*argv, "--output-dir", "plain", "--plain"]))
assert training.main([*argv, "--output-dir", "product"]) == 0
plain, product = (lora.read(folder).matrices for folder in ("plain", "product"))
same = [torch.equal(plain[name], product[name]) for name in plain]
print("EQUAL" if plain.keys() == product.keys() and all(same) else "DIFFERENT", len(same))
"""


def edit(tree, changes):
    for name, old, new in changes:
        text = (tree / name).read_text()
        assert old in text, f"{name} has no longer {old!r}"
        (tree / name).write_text(text.replace(old, new))


@pytest.mark.parametrize("name", EDITS)
def test_the_product_trains_what_plain_trains(train, tmp_path, name):
    changes, more, sentences = EDITS[name]
    tree = copied(tmp_path / "tree")
    edit(tree, changes)
    argv = train.argv("unused", "--max-train-steps", "5", *more)
    done = python(tree, "-c", BOTH, *argv)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("EQUAL"), done.stdout
    assert all(sentence in done.stdout for sentence in sentences), done.stdout
    if not sentences:
        assert "by the book's lines" not in done.stdout and "other programs" not in done.stdout


def test_an_adapted_feed_forward_layer_trains_exports_and_draws(train, tmp_path):
    """By the constant alone, with all that is fast about it."""
    tree = copied(tmp_path / "tree")
    edit(tree, EDITS["feed-forward layers"][0])
    drawn = ("--validation-prompts", "red apple", "--num-inference-steps", "2")
    argv = train.argv("ff", "--max-train-steps", "4", *drawn)
    done = python(tree, "loop.py", *argv)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved, read back and compared") == 2
    assert (tmp_path / "ff" / "pictures" / "before-after.png").is_file()


# ---- the code is part of what a run is -----------------------------------------------------------


def test_a_begun_run_goes_on_with_reworded_code_and_not_with_other_code(train, tmp_path):
    tree = copied(tmp_path / "tree")

    def start(steps, *more):
        return python(tree, "loop.py", *train.argv("run", "--max-train-steps", str(steps), *more))

    assert start(2).returncode == 0
    edit(
        tree,
        [
            (
                "loop.py",
                "    (scaling_factor, shift_factor), t, noise =",
                "    # reworded\n    (scaling_factor, shift_factor), t, noise =",
            ),
            ("loop.py", '"""One step over n examples.', '"""A step over n examples.'),
            (
                "lora.py",
                "scale = self.strength * self.scale\n",
                "scale = (self.strength\n            * self.scale)\n",
            ),
        ],
    )
    assert start(4).returncode == 0
    edit(tree, [("loop.py", "F.mse_loss(", "F.l1_loss(")])
    finished = start(4)
    assert (
        finished.returncode == 0
        and "finished, by other code (loop.diffusion_loss)" in finished.stdout
    )
    refused = start(6)
    assert refused.returncode == 1
    assert "its code has changed: loop.diffusion_loss;" in refused.stderr
    assert "--accept-code-change" in refused.stderr
    accepted = start(6, "--accept-code-change")
    said = "code changed after step 4: loop.diffusion_loss"
    assert accepted.returncode == 0 and said in accepted.stdout
    assert said in (tmp_path / "run" / "config.json").read_text()
    header = (tmp_path / "run" / "pytorch_lora_weights.safetensors").read_bytes()[:4000]
    assert said.encode() in header
