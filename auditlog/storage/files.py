"""The only place that opens, writes, syncs, renames or removes a file.

A test replaces `Files` by a layer that fails (auditlog.testing.FailingFiles). Names are always
relative to an open directory, and no link is followed, so that swapping a path between a check
and its use gains an attacker nothing. A FIFO in a file's place does not block (O_NONBLOCK), and
no descriptor is inherited by a program that the server starts (Python opens with O_CLOEXEC).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from contextlib import suppress

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700

_APPEND = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


def is_full(error: BaseException | None) -> bool:
    """Is it that the disk, or the user's share of it, is full?"""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _give_owner_all(path: str, directory: int | None = None) -> None:
    """Undo what a umask took from a directory that was made just now."""
    found = os.stat(path, dir_fd=directory, follow_symlinks=False)
    # Else it is left alone: chmod would follow a link that was put in its place.
    if stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) != DIRECTORY_MODE:
        os.chmod(path, DIRECTORY_MODE, dir_fd=directory)


class Files:
    """The file operations of the storage layer, as the operating system offers them."""

    write = staticmethod(os.write)
    close = staticmethod(os.close)
    stat = staticmethod(os.fstat)
    seek = staticmethod(os.lseek)  # to the end: the size, for a quarter of what a stat costs

    def make_directory(self, path: str) -> None:
        """Create a directory with its parents, where they are missing; it is for its owner only.

        Their names are on the disk then, also those that were created by somebody who died
        before that.
        """
        parents = [os.path.dirname(path)]
        while not os.path.isdir(parents[-1]):
            parents.append(os.path.dirname(parents[-1]))
        os.makedirs(parents[0], exist_ok=True)
        try:
            os.mkdir(path, DIRECTORY_MODE)
            _give_owner_all(path)
        except FileExistsError:  # another process was faster, or it is no directory
            if not os.access(parents[0], os.R_OK):
                return  # whoever may not read it did not create this
        for parent in parents:
            fd = self.open_directory(parent)
            try:
                self.sync_directory(fd)
            finally:
                self.close(fd)

    def open_directory(self, path: str, directory: int | None = None) -> int:
        """Open a directory: `path` by itself may be a link, a name below `directory` may not."""
        flags = _DIRECTORY if directory is None else _DIRECTORY | os.O_NOFOLLOW
        return os.open(path, flags, dir_fd=directory)

    def open_subdirectory(self, directory: int, name: str) -> int:
        """Open a directory of ours below `directory`, and create it where it is missing."""
        with suppress(FileExistsError):
            os.mkdir(name, DIRECTORY_MODE, dir_fd=directory)
            _give_owner_all(name, directory)
        return self.open_directory(name, directory)

    def open_append(self, directory: int, name: str) -> int:
        """Open an existing file for appending."""
        return os.open(name, _APPEND, dir_fd=directory)

    def create_append(self, directory: int, name: str) -> int:
        """Create a file for appending; FileExistsError if there is one."""
        fd = os.open(name, _APPEND | os.O_CREAT | os.O_EXCL, FILE_MODE, dir_fd=directory)
        os.fchmod(fd, FILE_MODE)  # a umask may have taken the owner's bits
        return fd

    def names(self, directory: int) -> list[str]:
        """The names in an open directory."""
        return os.listdir(directory)

    def open_read(self, directory: int, name: str) -> int:
        """Open a file for reading."""
        return os.open(name, _READ, dir_fd=directory)

    def read(self, fd: int, count: int, offset: int) -> bytes:
        """Read up to `count` bytes at `offset`."""
        return os.pread(fd, count, offset)

    def sync_data(self, fd: int) -> None:
        """Bring a file's data and size to the disk (macOS: through the drive's own cache)."""
        if sys.platform == "darwin":
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fdatasync(fd)

    def sync_directory(self, fd: int) -> None:
        """Bring a directory's names to the disk."""
        os.fsync(fd)

    def replace(self, directory: int, name: str, content: bytes) -> None:
        """Replace a whole file durably: a reader sees the old content or the new, never a mix."""
        new = f"{name}.{os.getpid()}.new"
        with suppress(FileNotFoundError):  # of a process that died, or what somebody planted
            os.unlink(new, dir_fd=directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        fd = os.open(new, flags, FILE_MODE, dir_fd=directory)
        try:
            try:
                os.fchmod(fd, FILE_MODE)
                while content:
                    content = content[self.write(fd, content) :]
                self.sync_data(fd)
            finally:
                self.close(fd)
            os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with suppress(OSError):
                os.unlink(new, dir_fd=directory)
            raise
        self.sync_directory(directory)

    def remove(self, directory: int, name: str) -> None:
        """Remove a file's name; whoever has it open can still read it."""
        os.unlink(name, dir_fd=directory)
