"""Programs that the benchmark runs beside the tool, each in a process of its own."""

from helpers import ROOT

NETWORK = {"model_name": "Unet", "model_parameters": {"backbone_name": "resnet18", "activation": "sigmoid"}}
SIZE, CLASSES = 128, 3

# What people think of as the floor: load the model, read the images, predict once.
BARE_PREDICT = """
import os, sys
os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3")
sys.modules["pandas"] = None  # which the tests alone bring along: Keras would import it
from pathlib import Path
import numpy as np
from PIL import Image
import tensorflow as tf
network = tf.keras.models.load_model(sys.argv[2], compile=False)
paths = sorted(Path(sys.argv[1], "images").iterdir())
images = np.stack([np.asarray(Image.open(path)) for path in paths])
network.predict((images * (1 / 255)).astype("float32")[..., None], batch_size=16, verbose=0)
"""

# What a job cannot do without: TensorFlow, the network with its weights, and the forward passes.
FLOOR = f"""
import gc, os, sys
gc.disable()
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
import network as room
tf = room.import_tensorflow()
network = room.build_network(
    {{"segmentation_model": {NETWORK}}}, {CLASSES}, ({SIZE}, {SIZE}), sys.argv[1], lambda line: None
)
forward = tf.function(lambda x: network(x, training=False), jit_compile=False)
batch = np.random.default_rng(0).random((16, {SIZE}, {SIZE}, 1), np.float32)
for _ in range(int(sys.argv[2]) // 16):
    last = forward(batch)
last.numpy()
os._exit(0)
"""

# The memory of a pass that counts 100 classes, batch 2, with a network that takes next to none.
MANY_CLASSES = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
import inference, network
from counts import Counts
tf = network.import_tensorflow()
inputs = tf.keras.Input((None, None, 1))
network = tf.keras.Model(inputs, tf.keras.layers.Conv2D(100, 1, activation="sigmoid")(inputs))
rng = np.random.default_rng(0)
image, masks = rng.integers(0, 256, (512, 512), np.uint8), rng.integers(0, 2, (512, 512, 100), np.uint8)
counts = Counts.empty(100, 512, 512, 2)
samples = [(str(i), image, masks) for i in range(8)]
list(inference.count_probabilities(network, samples, [i % 2 for i in range(8)], counts, ["class"] * 100, 2, (), print))
"""

# The way that runs the network for every candidate threshold, as fast as that way can be: one model, compiled once,
# the threshold a variable of one compiled metric a class, all images in memory. It gets the candidates for free.
RE_EVALUATION = """
import os, sys, time
os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3")
sys.modules["pandas"] = None  # which the tests alone bring along: Keras would import it
from pathlib import Path
import numpy as np
from PIL import Image
import tensorflow as tf
network = tf.keras.models.load_model(sys.argv[2], compile=False)
split, thresholds = Path(sys.argv[1]), eval(sys.argv[3])
names = sorted(path.name for path in (split / "images").iterdir())
images = np.stack([np.asarray(Image.open(split / "images" / name)) for name in names])
images = (images * (1 / 255)).astype("float32")[..., None]
folders = sorted((split / "masks").iterdir())
masks = np.stack([np.stack([np.asarray(Image.open(folder / name)) for folder in folders], -1) for name in names])
threshold = tf.Variable(0.5)
class IoU(tf.keras.metrics.Metric):
    def __init__(self, i):
        super().__init__(name=f"class{i}_iou_score")
        self.i = i
        self.both, self.either = self.add_weight("both", dtype="int64"), self.add_weight("either", dtype="int64")
    def update_state(self, truth, probability, sample_weight=None):
        truth, predicted = truth[..., self.i] > 0, probability[..., self.i] > threshold
        self.both.assign_add(tf.math.count_nonzero(truth & predicted))
        self.either.assign_add(tf.math.count_nonzero(truth | predicted))
    def result(self):
        return self.both / self.either
for i, candidates in enumerate(thresholds):
    network.compile(metrics=[IoU(i)])
    for candidate in candidates:
        threshold.assign(candidate)
        network.evaluate(images, masks, batch_size=16, verbose=0)
"""

# A process begins with its parent's peak, so a small one stands between: this one may be large.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""
