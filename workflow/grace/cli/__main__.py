"""`python -m grace.cli`: what torchrun starts, which takes a module and no program."""

from grace.cli import main

if __name__ == "__main__":
    main()
