"""``python -m dspark.tools``: the command ``dspark-tools``."""

from dspark.tools.cli import main

if __name__ == "__main__":
    main()
