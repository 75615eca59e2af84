"""Train: `deepspeed launcher/train.py --config FILE [key=value ...]`; `bpt-dist train` is the same program."""

import sys

from bpt_dist.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
