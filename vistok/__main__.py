"""`python -m vistok`."""

from __future__ import annotations

from vistok.cli.main import main

if __name__ == "__main__":
    main()
