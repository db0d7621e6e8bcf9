"""Measures a checkpoint on a Ray cluster; the arguments are those of `raydet evaluate`.

ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/evaluate.py s3://bucket/runs/mine \
    --out s3://bucket/evaluation
"""

import sys

from raydet.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    main()
