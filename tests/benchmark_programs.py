"""Programs that the benchmark runs beside the tool, each in a process of its own."""

from helpers import ROOT

SIZE, CLASSES = 128, 3


def network_of(backbone):
    return {"model_name": "Unet", "model_parameters": {"backbone_name": backbone, "activation": "sigmoid"}}


# Makes a model of random weights; its arguments are the backbone and the file.
MAKE_MODEL = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import network
tf = network.import_tensorflow()
import segmentation_models
tf.keras.utils.set_random_seed(1)
model = segmentation_models.Unet(sys.argv[1], encoder_weights=None, input_shape=(None, None, 1), classes={CLASSES})
model.compile("adam", "binary_crossentropy")
model.save(sys.argv[2])
"""

# What a job cannot do without: TensorFlow, the network with its weights, and the forward passes.
FLOOR = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
import network as room
tf = room.import_tensorflow()
config = {{"segmentation_model": {network_of("resnet18")}}}
network = room.build_network(config, {CLASSES}, ({SIZE}, {SIZE}), sys.argv[1], lambda line: None)
forward = tf.function(lambda x: network(x, training=False))
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
model = tf.keras.Model(inputs, tf.keras.layers.Conv2D(100, 1, activation="sigmoid")(inputs))
rng = np.random.default_rng(0)
image, masks = rng.integers(0, 256, (512, 512), np.uint8), rng.integers(0, 2, (512, 512, 100), np.uint8)
samples = [(str(i), image, masks, i % 2) for i in range(8)]
counter = inference.Counter(model, (512, 512), ["class"] * 100, 2, print)
list(counter.count(samples, Counts.empty(100, [0, 1])))
"""

# A process begins with its parent's peak, so a small one stands between: this one may be large.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""
