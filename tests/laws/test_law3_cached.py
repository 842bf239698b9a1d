"""Law 3, cached equals uncached: --no-cache, which encodes at every step, is the reference."""

import model
from runs import adapter


def test_training_from_the_cache_equals_encoding_at_every_step(train, tmp_path):
    options = ("--random-crop", "--caption-dropout", "0.5", "--resolution", "56")
    assert train("cached", *options, "--cache-dir", str(tmp_path / "new")) == 0
    assert train("warm", *options, "--cache-dir", str(tmp_path / "new")) == 0
    assert train("uncached", *options, "--no-cache") == 0
    cached, warm, uncached = (adapter(tmp_path / name) for name in ("cached", "warm", "uncached"))
    assert cached == warm == uncached


def test_a_second_run_loads_no_encoder(train, monkeypatch):
    assert train("first") == 0

    def never(*_):
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(model, "load_vae", never)
    monkeypatch.setattr(model, "load_text_encoders", never)
    assert train("second") == 0
