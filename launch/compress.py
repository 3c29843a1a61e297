"""`accelerate launch launch/compress.py --model M ...` is `tinygn compress --model M ...` in a launched process."""

import sys

from tinygn_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["compress", *sys.argv[1:]]))
