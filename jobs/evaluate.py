"""Measures a checkpoint on a Ray cluster; the arguments are those of `raydet evaluate`.

ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/evaluate.py /shared/runs/mine \
    --out /shared/evaluation
"""

import sys

from raydet.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    main()
