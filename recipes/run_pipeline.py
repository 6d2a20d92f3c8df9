"""The whole loop as one command: every stage in order, then the report."""

from pivotrl.pipeline import main

if __name__ == "__main__":
    main()
