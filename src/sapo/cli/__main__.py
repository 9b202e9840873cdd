"""`python -m sapo.cli`: the command line without its script."""

from sapo.cli.app import main

if __name__ == "__main__":
    main()
