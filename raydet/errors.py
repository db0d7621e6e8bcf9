"""Errors that are the user's to mend: the command line prints them as one line and exits with 2."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class RaydetError(Exception):
    """A setting, file or call that cannot work; the message names it and says what to do."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return '; did you mean …?' with the known word nearest to `word`, or '' when none is near."""
    by_letters = {entry.lower(): entry for entry in known}
    near = get_close_matches(word.lower(), by_letters, n=1, cutoff=0.5)
    return f"; did you mean {by_letters[near[0]]}?" if near else ""


def some(names: Sequence[str]) -> str:
    """Return the first four names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def first_line(error: BaseException) -> str:
    """Return the class of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def user_error(error: BaseException | None) -> RaydetError | None:
    """Find the RaydetError that an exception carries, however deep: Ray wraps what its tasks and workers raise."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        wraps = getattr(current, "cause", None) is not None  # Ray's error of a task is of its cause's class too
        if isinstance(current, RaydetError) and not wraps:
            message, advice, _ = str(current).partition("\nFailed to apply UDF")  # Ray Data's, on retries
            return RaydetError(message) if advice else current
        waiting += [current.__cause__, current.__context__, *getattr(current, "worker_failures", {}).values()]
        waiting += [getattr(current, name, None) for name in ("cause", "controller_failure")]
    return None
