"""`accelerate launch launch/compress.py --model M ...` is `tinygn compress --model M ...` in a launched process."""

import sys

from tinygn_dist.cli.main import leave, main

if __name__ == "__main__":
    leave(main(["compress", *sys.argv[1:]]))
