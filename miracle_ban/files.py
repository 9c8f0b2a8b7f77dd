"""Writing files whole or not at all. Leans on `errors` only."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import secrets
import time
from pathlib import Path

from .errors import MiracleError

_ABANDONED = 3600.0  # seconds after which nobody writes a part any more
_REMEDY = {
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some of your quota, or choose another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or choose another disk",
    errno.ENOENT: "make the folder first",
    errno.ENOTDIR: "a part of this path is a file: choose another",
    errno.EISDIR: "this is a folder: give the name of a file in it",
    errno.EACCES: "choose a folder in which you may write",
    errno.EPERM: "choose a folder in which you may write",
    errno.EROFS: "choose a disk that is not read-only",
}


def write_whole(path: Path, data: bytes) -> int:
    """Write `data` to `path` and return its size: whoever looks sees the old file or the new one, never a part.

    Written beside it as ".<name>.<8 hex digits>.part", flushed to the disk, then renamed over it. A process that is killed meanwhile
    leaves its part behind; parts an hour old are removed by whoever writes the same path next.

    Raises:
        MiracleError: the folder does not exist or is not writable, or the disk is full; an existing file is unchanged.
    """
    temporary = path.absolute().parent / f".{path.name}.{secrets.token_hex(4)}.part"
    try:
        with open(temporary, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            remedy = _REMEDY.get(error.errno or 0, "choose another place")
            raise MiracleError(
                f"cannot write {path} ({len(data):,} bytes): {reason}; an existing file there is unchanged. Remedy: {remedy}"
            ) from None
        raise
    _sweep(path)
    return len(data)


def _sweep(path: Path) -> None:
    """Remove the parts of `path` that processes which were killed have left."""
    part = re.compile(re.escape(f".{path.name}.") + "[0-9a-f]{8}[.]part")
    with contextlib.suppress(OSError):
        for left in path.absolute().parent.glob(f".{glob.escape(path.name)}.*.part"):
            if part.fullmatch(left.name) and time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()
