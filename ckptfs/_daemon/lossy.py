"""A log whose disk may be full: it is the cache's, and other programs fill it, too."""

import logging
import os


class LossyHandler(logging.Handler):
    """Writes to a descriptor. What cannot be written is lost, and counted; the next line that can
    be written says so."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._lost = 0
        self._why = ""
        self._is_torn = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, behind what was lost before it."""
        try:
            lines = [self.format(record)]
            if self._lost:
                text = f"{self._lost} lines of this log were lost: {self._why}"
                about = logging.makeLogRecord(
                    {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}
                    | {"msg": text}
                )
                lines.insert(0, self.format(about))
        except Exception:  # a mistake in who logs
            self.handleError(record)
            return
        before = "\n" if self._is_torn else ""
        data = (before + "".join(f"{line}\n" for line in lines)).encode("utf-8", "backslashreplace")
        try:
            self._write(data)
        except OSError as error:
            self._lost += 1
            self._why = error.strerror or str(error)
        else:
            self._lost = 0

    def _write(self, data: bytes) -> None:
        """Raises OSError where not all of it is written."""
        while data:
            done = os.write(self._fd, data)
            self._is_torn = done < len(data)
            data = data[done:]
