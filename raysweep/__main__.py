"""python -m raysweep: the command line."""

from raysweep.cli.main import main

if __name__ == "__main__":
    main()
