"""`python -m modelstore`, the same as the `modelstore` command."""

from modelstore.cli import main

main()
