"""The log of Orbax: no tracebacks in it, and the error of a write as it comes."""

import logging
from collections.abc import Callable


class OrbaxLog(logging.Filter):
    """Filters what Orbax logs, and hears there which writes fail.

    Of several processes, Orbax raises the error of a write only once all of them have met, but the
    others wait for the write at another barrier, for up to 20 minutes. It logs the error at once.

    Attributes:
      failed: takes the error of a write while one goes on; None: nobody asks.
    """

    failed: Callable[[BaseException], None] | None = None

    def open(self) -> None:
        """Begins to filter; a second call does nothing."""
        log = logging.getLogger("absl")
        log.setLevel(logging.WARNING)  # at INFO, Orbax logs every file
        log.addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.exc_info:
            return True
        failed = self.failed
        if failed and record.levelno >= logging.ERROR and "orbax" in record.pathname:
            failed(record.exc_info[1])
        return False  # Orbax raises these errors, too


orbax_log = OrbaxLog()
