"""`python -m lookfar` is the command `lookfar`."""

from lookfar.cli import main

main()
