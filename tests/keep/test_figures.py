"""The figures that a run begins with: memory and captions that are cut."""

import contextlib
import mmap
import time

import model
from conftest import POCKET
from keep import report


def test_host_memory_sees_what_the_block_took_and_gave_back():
    size = 200 * 2**20
    with report.HostMemory() as before:
        time.sleep(0.05)
    with report.HostMemory() as host:
        with contextlib.closing(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)) as block:
            for page in range(0, size, mmap.PAGESIZE):
                block[page] = 1
            time.sleep(0.1)
        time.sleep(0.05)
    assert 190 < (host.own - before.own) * 1024 < 260


def test_host_memory_reports_mapped_files_apart(tmp_path):
    size = 200 * 2**20
    with open(tmp_path / "weights", "wb") as file:
        file.truncate(size)
    with report.HostMemory() as before:
        time.sleep(0.05)
    with report.HostMemory() as host, open(tmp_path / "weights", "rb") as file:
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as block:
            assert sum(block[page] for page in range(0, size, mmap.PAGESIZE)) == 0
            time.sleep(0.1)
    assert (host.mapped - before.mapped) * 1024 > 190
    assert (host.own - before.own) * 1024 < 50


def test_a_prompt_is_counted_as_cut_when_its_tokens_exceed_the_tokenizers_length():
    tokenizer, _ = model.load_tokenizers(str(POCKET))
    length = tokenizer.model_max_length  # with begin and end
    word = "a"
    assert len(tokenizer(word).input_ids) == 3
    fits, too_long = " ".join([word] * (length - 2)), " ".join([word] * (length - 1))
    assert report.count_cut([fits], str(POCKET)) == 0
    assert report.count_cut([too_long], str(POCKET)) == 1
    assert report.count_cut(["", fits, too_long, too_long], str(POCKET)) == 2
    assert report.count_cut([], str(POCKET)) == 0
