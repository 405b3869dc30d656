"""`python -m hireconvert` is the console script `hireconvert`."""

from hireconvert.cli import main

if __name__ == "__main__":
    main()
