"""Errors that a user can act on: what was wrong, where, what is allowed, what to do.

`UserError` carries those four parts. Workers write it to `error.txt` in the stage's directory and exit with
`EXIT_USER_ERROR`; the orchestrator reads it back, so that the screen shows one message and no traceback.
"""

from __future__ import annotations

EXIT_USER_ERROR = 2  # bad input: running the same thing again will fail again
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: SIGTERM, a checkpoint was saved; run again to resume
EXIT_OOM = 76  # a GPU is full, `oom.json` says where; `on_oom: retry` goes on at half the micro-batch


class UserError(Exception):
    """A mistake in the user's input.

    `what` is one sentence with the offending value; `where` a file with line, or a key; `allowed` what would have been
    accepted; `todo` the next action.
    """

    def __init__(self, what: str, *, where: str = "", allowed: str = "", todo: str = "") -> None:
        self.what, self.where, self.allowed, self.todo = what, where, allowed, todo
        super().__init__(self.render())

    def render(self) -> str:
        """The message as it is shown: one line a part, empty parts left out."""
        parts = [
            ("error", self.what),
            ("where", self.where),
            ("allowed", self.allowed),
            ("do", self.todo),
        ]
        return "\n".join(f"{label:>8}: {text}" for label, text in parts if text)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.what, self.where, self.allowed, self.todo))


def parse(text: str) -> UserError:
    """The error that `UserError.render` wrote: how one crosses from a worker to the orchestrator."""
    parts = dict.fromkeys(("error", "where", "allowed", "do"), "")
    current = "error"
    for line in text.rstrip("\n").split("\n"):
        label, colon, rest = line[:10].strip(), line[8:10], line[10:]
        if colon == ": " and label.removesuffix(":") in parts:
            current = label.removesuffix(":")
            parts[current] = rest
        else:
            parts[current] += f"\n{line}" if parts[current] else line
    return UserError(parts["error"], where=parts["where"], allowed=parts["allowed"], todo=parts["do"])


def _rebuild(what: str, where: str, allowed: str, todo: str) -> UserError:
    return UserError(what, where=where, allowed=allowed, todo=todo)
