"""Detects in any number of images on a Ray cluster; the arguments are those of `raydet batch-predict`.

ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/predict.py /shared/runs/mine \
    s3://bucket/photos s3://bucket/found
"""

import sys

from raydet.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "batch-predict")
    main()
