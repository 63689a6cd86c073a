"""What a dump says while it runs, and the log beside the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark.cache.errors import StoreWriteError
from dspark.dump.progress import log, log_file


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_log_on_a_full_disk_does_not_hide_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StoreWriteError, match="the disk is full"), log_file(Path("/dev/full")):
        log.info("a row was dropped")
        log.info("another row was dropped")
        raise StoreWriteError("the disk is full")
    said = capsys.readouterr().err.splitlines()
    assert said == ["note: /dev/full is incomplete: No space left on device"]
