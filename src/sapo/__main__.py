"""`python -m sapo` is the command line, as in `torchrun --nproc-per-node 2 -m sapo train RECIPE`."""

from sapo.cli import main

if __name__ == "__main__":
    main()
