"""`python -m tinygn_dist.cli`."""

from tinygn_dist.cli.main import leave, main

if __name__ == "__main__":
    leave(main())
