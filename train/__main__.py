"""``python -m dspark.train``, as ``torchrun -m dspark.train`` starts it."""

from dspark.train.cli import main

main()
