"""The process of ``dspark-dump``; also ``python -m dspark.dump``."""

# First: it ends the process when all that was registered after it has run.
from dspark.cache.shared import own_process  # isort: split

from dspark.dump.cli import main


def script() -> None:
    """Run the command and end the process."""
    own_process.run(main)


if __name__ == "__main__":
    script()
