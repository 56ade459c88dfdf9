"""The former name of `flows.recalibrate`, which stays as an alias."""

from flows.recalibrate import main

if __name__ == "__main__":
    main()
