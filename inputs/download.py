"""The Hub's clients as a person needs them: they wait for a while and not for ever, the first error
is the one that is told, and what comes, from where to where, is said.

The clients answer a failure with a retry, then with a look at the disk, and tell the last error,
which is seldom the reason. Every request of theirs goes through send() here.
"""

import contextlib
import functools
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inputs.files import Refusal, first_line

# Seconds: to connect and for each piece of an answer; until it is said that no byte came, and until
# that ends it; between the lines that say how far a download is where no bar can be shown.
CONNECT, READ, QUIET, GIVE_UP, SAY = 10, 30, 60, 300, 30
NO_XET = "HF_HUB_DISABLE_XET=1 before the same command (plain HTTP often passes where Xet does not)"
AGAIN_LATER = "try again in some minutes (status.huggingface.co tells of disturbances)"
PORTAL = "open any page in a browser and log in to this network, or correct HTTPS_PROXY"
NETWORK = "check the network and HTTPS_PROXY"
OFFLINE = (
    "HF_HUB_OFFLINE is set (or HF_DATASETS_OFFLINE, TRANSFORMERS_OFFLINE)",
    "unset HF_HUB_OFFLINE (or that)",
)
# What went wrong since the last good answer: in words, and what to do.
failures: list[tuple[str, str]] = []
received = [0]  # bytes; the clients' bars count them, shown or not, Xet's too


class Unanswered(Exception):
    """The Hub's clients would try again; failures[0] is the reason."""


def of_answer(request, response) -> tuple[str, str] | None:
    """What is wrong with an answer, and what to do; None for a good one."""
    head, status, url = response.headers, response.status_code, f"{request.url}".partition("?")[0]
    code, said = head.get("X-Error-Code", ""), head.get("X-Error-Message", "")
    if code == "EntryNotFound":  # asked for to see whether it is there
        return None
    # A file's own page elsewhere is told with its commit; a page of others knows of none.
    elsewhere = head.get("Location", "").startswith("http") and "X-Repo-Commit" not in head
    if status < 400 and ("text/html" in head.get("Content-Type", "") or elsewhere):
        return f"a web page answers in the Hub's place, at {url}", PORTAL
    if status < 400:
        return None
    remedy = AGAIN_LATER
    if code == "GatedRepo" or status == 403:
        remedy = "ask for access (a licence to accept) on {page}, then hf auth login"
    elif status == 401:
        remedy = "check the name; for a private or gated one ask for access on {page}, then "
        remedy += "hf auth login with a valid token (HF_TOKEN, where set, is taken before that one)"
    elif status == 404:
        remedy = "correct --revision" if code == "RevisionNotFound" else "correct the name"
    elif status == 429:
        remedy = "wait some minutes, or hf auth login, which is allowed more"
    return f"the Hub answers {status} {said or response.reason_phrase} for {url}", remedy


def of_error(request, error: Exception) -> tuple[str, str]:
    """What an error says that kept a request from being answered, and what to do."""
    kind, said = type(error).__name__, first_line(error)
    remedy = NETWORK
    if kind == "OfflineModeIsEnabled":
        return OFFLINE
    if "CERTIFICATE" in said.upper():
        remedy = PORTAL + "; behind a company's proxy: SSL_CERT_FILE=its certificate"
    elif any(os.environ.get(each) for each in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        said, remedy = f"{said}, through HTTPS_PROXY", "correct or unset HTTPS_PROXY"
    return f"{request.url.host} gives no answer: {kind}: {said}", remedy


def watched(plain: Callable) -> Callable:
    """An HTTP client's send() within the time, which notes what goes wrong and tries twice."""

    def send(request, **options):
        read = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", READ))
        times = {"connect": CONNECT, "pool": CONNECT, "read": read, "write": read}
        request.extensions["timeout"] = times
        again = len(failures)
        try:
            response = plain(request, **options)
        except Exception as error:
            failures.append(of_error(request, error))
            if again:
                raise Unanswered from error
            raise
        if not (trouble := of_answer(request, response)):
            failures.clear()
            return response
        failures.append(trouble)
        if response.status_code < 400 or (again and response.status_code not in (401, 403, 404)):
            raise Unanswered
        return response

    return send


@functools.cache
def watch_clients() -> None:
    """Have all requests go through send(), and all bytes be counted."""
    import huggingface_hub
    from huggingface_hub.utils import tqdm

    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 2**18  # or a slow line seems to stand still
    shown = tqdm.update

    def update(self, n=1):
        received[0] += n or 0
        return shown(self, n)

    tqdm.update = update
    if hasattr(huggingface_hub, "set_client_factory"):  # from version 1 on
        usual = huggingface_hub.get_session()

        def client():
            made = type(usual)(event_hooks=usual.event_hooks, follow_redirects=True)
            made.send = watched(made.send)
            return made

        huggingface_hub.set_client_factory(client)


def asked(
    name: str, kind: str, what: str, way_out: str, call: Callable[[], Any], total: int = 0
) -> Any:
    """call(), which asks the Hub for `what` of `name`. kind: "models" or "datasets"; way_out: what
    else there is to do; total: bytes that are to come, 0 where nobody knows.

    Raises Refusal with the first error, and where no byte comes for GIVE_UP seconds. What is no
    fault of the Hub is raised as the error that caused it.
    """
    import huggingface_hub

    watch_clients()
    failures.clear()
    constants, result = huggingface_hub.constants, []
    watch = [(constants.HF_HUB_CACHE, f"{kind}--{name.replace('/', '--')}/**/*")]
    if kind == "datasets":  # it writes what came once more, as tables
        cache = sys.modules["datasets"].config.HF_DATASETS_CACHE
        watch.append((cache, f"{name.partition('/')[0]}*/**/*"))
    thread = threading.Thread(target=lambda: result.append(attempt(call)), daemon=True)
    try:
        thread.start()
        if os.path.isdir(name):  # nothing is asked for
            thread.join()
        wait_for(thread, name, watch, total)
    finally:
        if thread.is_alive():
            reason = sys.exc_info()[1]
            code = 128 + (reason.args or [2])[0] if isinstance(reason, KeyboardInterrupt) else 1
            threading.Thread(target=leave_anyway, args=(code,), daemon=True).start()
    answer, error = result[0] if result else (None, None)
    if result and not error:
        return answer
    if re.search("OfflineMode|Offline mode", str(error)):  # `datasets` then asks nobody
        failures.append(OFFLINE)
    found, remedy = failures[0] if failures else ("", NETWORK)
    if not result:
        found = f"no byte came for {GIVE_UP} s{', since ' * bool(found)}{found}"
        remedy = f"{NO_XET}; {remedy}"
    elif not failures:
        while error.__cause__:  # "an error occurred while generating the dataset"
            error = error.__cause__
        raise error
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'datasets' else ''}{name}"
    remedy = f"{remedy.format(page=page)}; or {way_out}"
    raise Refusal(f"{what} did not come: {found}", "an answer of the Hub", remedy) from error


def attempt(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return call(), None
    except BaseException as error:  # it is raised in the thread that waits
        return None, error


def wait_for(thread: threading.Thread, name: str, watch: list[tuple], total: int) -> None:
    """Until the thread has ended, or no byte has come for GIVE_UP seconds. Says where it stands.
    watch: folders and patterns of what it writes there.
    """
    began, life = size_of(*watch[0]), None
    changed = said = time.monotonic()
    warned = False
    while thread.is_alive() and time.monotonic() - changed < GIVE_UP:
        thread.join(min(1, SAY / 4))
        now, sizes = time.monotonic(), [size_of(*each) for each in watch]
        if life != (life := [*sizes, received[0]]):
            changed, warned = now, False
        elif now - changed > QUIET and not warned:
            warned = True
            say(f"{name}: no byte came for {QUIET} s; if it stays so: {NO_XET}")
        if now - said > SAY and sizes[0] > began and not sys.stderr.isatty():  # else there are bars
            said, of = now, f" of {total / 1e9:.2f}" if total else ""
            say(f"{name}: {(sizes[0] - began) / 1e9:.2f}{of} GB are here")


def say(line: str) -> None:
    """On stderr, since on stdout generate.py names its pictures and nothing else."""
    print(line, file=sys.stderr, flush=True)


def size_of(folder: str, pattern: str) -> int:
    """Bytes of the files there; one that goes in between is none."""
    size = 0
    for path in Path(folder).glob(pattern):
        with contextlib.suppress(OSError):
            size += path.lstat().st_size
    return size


def leave_anyway(code: int) -> None:
    """End the process some seconds after its last line: threads of the clients that hang, some in
    Rust, would keep it for ever.
    """
    threading.main_thread().join()
    time.sleep(5)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
