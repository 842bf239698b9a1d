"""Law 3, cached equals uncached: --no-cache, which encodes at every step, is the reference."""

import pytest

import model
from runs import adapter


def test_training_from_the_cache_equals_encoding_at_every_step(train, tmp_path, monkeypatch):
    """And a second run, which finds its pictures in the cache, loads no encoder."""
    options = ("--random-crop", "--caption-dropout", "0.5", "--resolution", "56")
    options += ("--max-train-steps", "2")
    assert train("cached", *options, "--cache-dir", str(tmp_path / "new")) == 0
    with monkeypatch.context() as patch:
        for part in ("load_vae", "load_text_encoders"):
            patch.setattr(model, part, lambda *_: pytest.fail("an encoder was loaded"))
        assert train("warm", *options, "--cache-dir", str(tmp_path / "new")) == 0
    assert train("uncached", *options, "--no-cache") == 0
    cached, warm, uncached = (adapter(tmp_path / name) for name in ("cached", "warm", "uncached"))
    assert cached == warm == uncached
