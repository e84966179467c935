"""`python -m fedpft.kernels`: checks every operator on this machine; exit code 0 if all agree with their references."""

import sys

from fedpft.kernels import build_info
from fedpft.kernels.check import check_operators, table


def main() -> int:
    """Prints what was built and the table of results."""
    for key, value in build_info().items():
        print(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    results = check_operators()
    print(table(results))
    failed = sum(not result.passed for result in results)
    print(f"{len(results) - failed} of {len(results)} passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
