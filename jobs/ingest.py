"""Writes a data set as shards on a Ray cluster; the arguments are those of `raydet ingest`.

ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/ingest.py coco2017_yolox_s \
    s3://bucket/coco data.root=s3://bucket/raw
"""

import sys

from raydet.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "ingest")
    main()
