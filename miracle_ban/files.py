"""Writing files whole or not at all. Leans on `errors` only."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import MiracleError


def write_whole(path: Path, data: bytes) -> int:
    """Write `data` to `path` and return its size: whoever looks sees the old file or the new one, never a part.

    Written beside it under another name, flushed to the disk, then renamed over it.

    Raises:
        MiracleError: the folder does not exist or is not writable, or the disk is full; an existing file is unchanged.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
        with open(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise MiracleError(f"cannot write {path}: {error.strerror or error}; an existing file there is unchanged") from None
        raise
    return len(data)
