"""Sweeps settings on a Ray cluster; the arguments are those of `raydet tune`.

ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/tune.py coco2017_yolox_s \
    data.root=s3://bucket/coco storage=s3://bucket/runs tune.space.loss.iou_weight='{loguniform: [1, 10]}'
"""

import sys

from raydet.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "tune")
    main()
