#!/usr/bin/env python3
"""Fill a volume before the launch: `modelstore seed` with the settings of a cheap CPU pod.

    python scripts/preseed.py org/name [org/other …] [--from models.toml] [--dry-run] …

The same options as `modelstore seed`; needs the base package alone, no torch. On a pod the volume is /workspace.
"""

import sys

from modelstore.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["seed"]
    main()
