"""What tests ask of a refusal."""

import pytest

from inputs.files import Refusal
from stress.case import sentence_is_whole


def refused(act, *words: str) -> None:
    """A Refusal that is a whole, printable sentence and has all the words."""
    with pytest.raises(Refusal) as refusal:
        act()
    sentence_is_whole(str(refusal.value))
    for word in words:
        assert word in str(refusal.value)
