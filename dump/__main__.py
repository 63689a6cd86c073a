"""``python -m dspark.dump``: the command ``dspark-dump``."""

from dspark.dump.cli import main

if __name__ == "__main__":
    main()
