"""The Hub's clients as a person needs them: they wait for a while and not for ever, the first error
is the one that is told, and it is said how far a download is.

The clients answer a failure with a retry, then with a look at the disk, and tell the last error,
which is seldom the reason. Every request of theirs goes through send() here.
"""

import functools
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inputs.files import Refusal, first_line
from inputs.progress import on_terminal, quiet

# Seconds: to connect and for each piece of an answer; until it is said that no byte came, and until
# that ends it; between the lines that say how far a download is where no bar can be shown.
CONNECT, READ, QUIET, GIVE_UP, SAY = 10, 30, 60, 300, 30
NO_XET = "HF_HUB_DISABLE_XET=1 before the same command (plain HTTP often passes where Xet does not)"
PORTAL = "open any page in a browser and log in to this network"
STATUS = {  # what to do about an answer; others are the Hub's own trouble
    401: "check the name; for a private or gated one ask for access on {page}, then hf auth login "
    "with a valid token (HF_TOKEN, where set, is taken before that one)",
    403: "ask for access (a licence to accept) on {page}, then hf auth login",
    404: "correct the name, or --revision",
    429: "wait some minutes, or hf auth login, which is allowed more",
}
ERROR = {  # what to do about an error, by what it says
    "OfflineMode|Offline mode": "unset HF_HUB_OFFLINE (or HF_DATASETS_OFFLINE)",
    "(?i)certificate": f"{PORTAL}; behind a company's proxy, SSL_CERT_FILE=its certificate",
    "": "check the network, and HTTPS_PROXY where it is set",
}
# What the clients ask on their own account, about themselves and not about any repository.
ASIDE = re.compile("/api/(agent-|telemetry)")
# What went wrong first in each thread since its last good answer, in words, and what to do: several
# threads download at once, and each tries again.
failures: dict[int, tuple[str, str]] = {}
received = [0]  # bytes and rows; the clients' bars count them, shown or not, Xet's too


class Unanswered(Exception):
    """The Hub's clients would try again; the first of failures is the reason."""


def of_answer(request, response) -> tuple[str, str] | None:
    """What is wrong with an answer, and what to do; None for a good one."""
    head, status, url = response.headers, response.status_code, f"{request.url}".partition("?")[0]
    if status < 400 and "text/html" in head.get("Content-Type", ""):
        return f"a web page answers in the Hub's place, at {url}", PORTAL
    # What may be in a repository is asked for, to see whether it is there.
    if status < 400 or (status == 404 and head.get("X-Error-Code") == "EntryNotFound"):
        return None
    said = head.get("X-Error-Message") or response.reason_phrase
    later = "try again in some minutes (status.huggingface.co tells of disturbances)"
    return f"the Hub answers {status} {said} for {url}", STATUS.get(status, later)


def of_error(error: BaseException) -> tuple[str, str]:
    """What an error says that kept a request from being answered, and what to do."""
    said = f"the Hub gives no answer: {type(error).__name__}: {first_line(error)}"
    return said, next(remedy for cause, remedy in ERROR.items() if re.search(cause, said))


def watched(plain: Callable) -> Callable:
    """An HTTP client's send() within the time, which notes what goes wrong and tries twice."""

    def send(request, **options):
        if ASIDE.search(f"{request.url}"):
            return plain(request, **options)
        times = {"connect": CONNECT, "pool": CONNECT, "read": READ, "write": READ}
        request.extensions["timeout"] = times
        me = threading.get_ident()
        tried = me in failures
        try:
            response = plain(request, **options)
        except Exception as error:
            failures.setdefault(me, of_error(error))
            if tried:
                raise Unanswered from error
            raise
        if trouble := of_answer(request, response):
            failures.setdefault(me, trouble)
            if response.status_code < 400 or tried:
                raise Unanswered
        else:
            failures.pop(me, None)
        return response

    return send


@functools.cache
def watch_clients() -> None:
    """Have all requests go through send(), and all bytes be counted."""
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars, tqdm

    if not on_terminal():
        disable_progress_bars()
    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 2**18  # or a slow line seems to stand still
    count(tqdm)
    usual = huggingface_hub.get_session()

    def client():
        made = type(usual)(event_hooks=usual.event_hooks, follow_redirects=True)
        made.send = watched(made.send)
        return made

    huggingface_hub.set_client_factory(client)


@functools.cache  # once a class
def count(bar: type) -> None:
    """Have what a client's class of bars is told be counted as received."""
    begin, shown = bar.__init__, bar.update

    def init(self, *args, **options):
        # Client 2 tells two bars what comes: as it came, and as it is written.
        self.told_twice = str(options.get("name")).endswith(".transfer")
        begin(self, *args, **options)

    def update(self, n=1):
        received[0] += 0 if self.told_twice else n or 0
        return shown(self, n)

    bar.__init__, bar.update = init, update


def asked(kind: str, name: str, what: str, way_out: str, call: Callable, total: int = 0) -> Any:
    """call(), which asks the Hub for `what` of `name`. kind: "model" or "dataset"; way_out: what
    else there is to do; total: bytes that are to come, 0 where nobody knows.

    Raises Refusal with the first error, and where no byte comes for GIVE_UP seconds. What is no
    fault of the Hub is raised as it is.
    """
    import huggingface_hub

    watch_clients()
    failures.clear()
    result: list[tuple[Any, BaseException | None]] = []
    thread = threading.Thread(target=lambda: result.append(attempt(call)), daemon=True)
    try:
        thread.start()
        wait_for(thread, name, total)
    finally:
        if not result:  # atexit's own functions would come too late
            code = 130 if sys.exc_info()[0] else 1
            threading._register_atexit(leave_anyway, result, code)
    answer, error = result[0] if result else (None, TimeoutError(f"no byte in {GIVE_UP} s"))
    if not error:
        return answer
    if result and not failures and not isinstance(error, ConnectionError):
        raise error
    found, remedy = next(iter(failures.values()), of_error(error))
    page = f"{huggingface_hub.constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{name}"
    remedy = f"{'' if result else NO_XET + '; '}{remedy.format(page=page)}; or {way_out}"
    raise Refusal(f"{what} did not come: {found}", "an answer of the Hub", remedy) from error


def attempt(call: Callable) -> tuple[Any, BaseException | None]:
    try:
        return call(), None
    except BaseException as error:  # it is raised in the thread that waits
        return None, error


def wait_for(thread: threading.Thread, name: str, total: int) -> None:
    """Until the thread has ended, or no byte has come for GIVE_UP seconds. Says where it stands."""
    began, life, warned = received[0], -1, False
    changed = said = time.monotonic()
    while thread.is_alive() and time.monotonic() - changed < GIVE_UP:
        thread.join(min(1, SAY / 4))
        now = time.monotonic()
        if life != received[0]:
            changed, life, warned = now, received[0], False
        elif now - changed > QUIET and not warned:
            warned = True
            say(f"{name}: no byte came for {QUIET} s; if it stays so: {NO_XET}")
        if total and now - said > SAY and not (quiet[0] or on_terminal()):  # else bars
            said = now
            say(f"{name}: {(life - began) / 1e9:.2f} of {total / 1e9:.2f} GB are here")


def say(line: str) -> None:
    """On stderr, since on stdout generate.py names its pictures; of several processes the first."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def listing(
    kind: str, name: str, revision: str, what: str, way_out: str
) -> tuple[str, dict[str, int]]:
    """The commit that a revision of a repository means now, and the size in bytes of each of its
    files. Raises as asked() does.
    """
    from huggingface_hub import HfApi

    own = {"repo_type": kind, "revision": revision, "files_metadata": True}
    found = asked(kind, name, what, way_out, lambda: HfApi().repo_info(name, **own))
    return found.sha, {each.rfilename: each.size or 0 for each in found.siblings}


def check_room(size: int, what: str, way_out: str) -> None:
    """Say that so many bytes come, and where to. Raises Refusal where they have no room."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    said = f"{size / 1e9:.2f} GB of {what} into {folder}, where {free / 1e9:.2f} GB are free"
    if size > free:
        remedy = f"free some space, or HF_HUB_CACHE=FOLDER on a larger disk; or {way_out}"
        raise Refusal(f"this needs {said}", "room for the download", remedy)
    say(f"downloading {said}")


def leave_anyway(result: list, code: int) -> None:
    """End the process, whose last line is said, where there still is no result: the interpreter
    waits for threads that the clients start, some in Rust, for ever.
    """
    if not result:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
