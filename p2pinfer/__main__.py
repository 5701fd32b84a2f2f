"""`python -m p2pinfer` and the `p2pinfer` command."""

from p2pinfer.cli.app import main

if __name__ == "__main__":
    main()
