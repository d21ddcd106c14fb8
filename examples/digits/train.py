#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["scikit-learn~=1.9", "onnx~=1.23", "onnxruntime~=1.31"]
# ///
"""Train a small network on handwritten digits and leave it as ONNX, ready to be served.

Run it by hand (`uv run train.py`) or as an mlbox job; uv installs what the block above asks for. mlbox tells a job
where things go: files in $MLBOX_OUT are kept, JSON lines in $MLBOX_METRICS are charted. This script leaves

    digits.onnx   image: (n, 64) float32, an 8x8 image row by row, ink from 0 to 16 as in scikit-learn's digits
                  -> label: (n) int64, probabilities: (n, 10) float32
    test.json     images and labels of the test split, which the training has never seen
    report.json   accuracy on that split
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

OUT = Path(os.environ.get("MLBOX_OUT", "."))
METRICS = Path(os.environ.get("MLBOX_METRICS", os.devnull))
INK = 16.0  # the darkest pixel; the model divides by it, so that whoever asks sends pixels as they are

NETWORK = """
<ir_version: 10, opset_import: ["": 21]>
digits (float[n, 64] image) => (int64[n] label, float[n, 10] probabilities) {
    pixels = Div (image, ink)
    mixed_1 = Gemm (pixels, weights_1, bias_1)
    hidden_1 = Relu (mixed_1)
    mixed_2 = Gemm (hidden_1, weights_2, bias_2)
    hidden_2 = Relu (mixed_2)
    logits = Gemm (hidden_2, weights_3, bias_3)
    probabilities = Softmax <axis = 1> (logits)
    label = ArgMax <axis = 1, keepdims = 0> (probabilities)
}
"""


def main() -> None:
    options = arguments()
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32)
    rest, test, rest_labels, test_labels = train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=0
    )
    train, check, train_labels, check_labels = train_test_split(
        rest, rest_labels, test_size=180, stratify=rest_labels, random_state=0
    )
    print(f"{len(train)} images to learn from, {len(check)} to watch progress, {len(test)} for the test")
    print(f"device: {device()}")

    network = MLPClassifier(hidden_layer_sizes=(128, 64), batch_size=32, random_state=0)
    for epoch in range(1, options.epochs + 1):
        network.partial_fit(train / INK, train_labels, classes=range(10))
        progress(epoch, options.epochs, network.loss_, network.score(check / INK, check_labels))
        time.sleep(options.slow)

    predicted = network.predict(test / INK)
    accuracy = float(np.mean(predicted == test_labels))
    print(f"accuracy on the test split: {accuracy:.2%}")

    model = export(network)
    agree(model, test, predicted, network.predict_proba(test / INK))
    publish("test.json", json.dumps({"images": test.tolist(), "labels": test_labels.tolist()}).encode())
    publish("report.json", json.dumps({"accuracy": accuracy, "test_images": len(test)}).encode())
    publish("digits.onnx", model)
    print(f"exported digits.onnx, {len(model) / 1024:.0f} KiB; it agrees with the trained network on every test image")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small network on handwritten digits.")
    parser.add_argument(
        "--epochs", type=int, default=20, choices=range(1, 1001), metavar="1..1000", help="passes over the images (20)"
    )
    parser.add_argument(
        "--slow",
        type=float,
        default=os.environ.get("SLOW", "0"),
        metavar="SECONDS",
        help="pause after each epoch, for watching (0, or what $SLOW says)",
    )
    return parser.parse_args()


def device() -> str:
    """The device this trains on: scikit-learn uses the CPU, also where mlbox gave the job a GPU of its own."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"CPU (the GPU of this job, {given}, is for networks larger than this one)" if given else "CPU"


def progress(epoch: int, epochs: int, loss: float, accuracy: float) -> None:
    """Show an epoch to whoever reads the log, and record it for the charts."""
    done = "#" * (20 * epoch // epochs)
    print(f"epoch {epoch:3}/{epochs}  [{done:.<20}]  loss {loss:.4f}  accuracy {accuracy:.3f}", flush=True)
    with METRICS.open("a") as metrics:
        metrics.write(json.dumps({"step": epoch, "loss": loss, "accuracy": accuracy}) + "\n")


def export(network: MLPClassifier) -> bytes:
    """The trained network as an ONNX file."""
    model = onnx.parser.parse_model(NETWORK)
    tensors = {"ink": np.array(INK)}
    for layer, (weights, bias) in enumerate(zip(network.coefs_, network.intercepts_, strict=True), 1):
        tensors |= {f"weights_{layer}": weights, f"bias_{layer}": bias}
    for name, values in tensors.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def agree(model: bytes, images: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> None:
    """Ask onnxruntime, as the server will, and stop unless it says what the trained network says."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    served_labels, served = session.run(["label", "probabilities"], {"image": images})
    if not (np.array_equal(served_labels, labels) and np.allclose(served, probabilities, atol=1e-5)):
        raise SystemExit("the exported model does not say what the trained network says: nothing was exported")


def publish(name: str, content: bytes) -> None:
    """Write a file of $MLBOX_OUT so that it appears there whole or not at all."""
    unfinished = OUT / f".{name}.unfinished"
    unfinished.write_bytes(content)
    unfinished.replace(OUT / name)


if __name__ == "__main__":
    main()
