"""A loss that asks, in the training's worker: are these the weights that the trial was given?"""

import json
from pathlib import Path

import ray.train

from raydet.losses import YoloXFastDetectionLoss


class Witness(YoloXFastDetectionLoss):
    seen = False

    def forward(self, outputs, targets):
        if not self.seen:
            self.seen = True
            run = Path(ray.train.get_context().get_storage().experiment_fs_path).parent
            mine = {"loss.iou_weight": self.iou_weight, "loss.cls_weight": self.cls_weight}
            (run / "witness.json").write_text(json.dumps(mine))
            if (run / "values.json").exists():
                assert json.loads((run / "values.json").read_text()) == mine
        return super().forward(outputs, targets)
