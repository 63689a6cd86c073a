"""The process of ``dspark-dump``; also ``python -m dspark.dump``."""

# First: it leaves when all that was registered after it has run.
from dspark.cache.shared import leaving  # isort: split

from dspark.dump.cli import main


def script() -> None:
    """Run the command and end the process."""
    leaving.run(main)


if __name__ == "__main__":
    script()
