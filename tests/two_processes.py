"""Runs a function of test_distributed in each of torchrun's processes."""

import sys

import test_distributed

sys.exit(getattr(test_distributed, sys.argv[1])(*sys.argv[2:]))
