"""Trains on a Ray cluster; the arguments are those of `raydet train`.

ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/train.py coco2017_yolox_s \
    data.root=s3://bucket/coco storage=s3://bucket/runs

`ray job stop` ends it after the step, with a checkpoint; the same submission again goes on from there.
"""

import sys

from raydet.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
