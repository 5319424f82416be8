"""`accelerate launch -m train_t2i -c FILE`: the training stage under accelerate, on several GPUs or nodes."""

import sys

from recap.cli import main

main(["train", *sys.argv[1:]])
