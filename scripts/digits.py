"""What the demo does with images of digits: make a request of them, show them, score the answers.

    digits.py request TEST COUNT       the first COUNT images of TEST (or `all`) as an Open Inference Protocol request
    digits.py show TEST ANSWER         the images that were asked about, each with its answer
    digits.py score TEST ANSWER REPORT accuracy of the answers; exits 1 unless it is the one that REPORT holds

TEST and REPORT are the files that examples/digits/train.py leaves, ANSWER is what the server said.
"""

import json
import sys
from pathlib import Path
from typing import Any

SHADES = " .:-=+*#%@"
DARKEST = 16


def main() -> None:
    verb, *arguments = sys.argv[1:]
    if verb == "request":
        test, count = arguments
        print(json.dumps(request(read(test)["images"][: None if count == "all" else int(count)])))
    elif verb == "show":
        test, answer = map(read, arguments)
        show(test, output(answer, "label"), output(answer, "probabilities"))
    elif verb == "score":
        test, answer, report = map(read, arguments)
        score(test["labels"], output(answer, "label"), report["accuracy"])
    else:
        raise SystemExit(__doc__)


def request(images: list[list[float]]) -> dict[str, Any]:
    flat = [pixel for image in images for pixel in image]
    return {"inputs": [{"name": "image", "shape": [len(images), 64], "datatype": "FP32", "data": flat}]}


def show(test: dict[str, Any], labels: list[int], probabilities: list[float]) -> None:
    images = test["images"][: len(labels)]
    for row in range(8):
        print("   ".join(picture_row(image[8 * row : 8 * row + 8]) for image in images))
    for line in ("predicted {label} {sure:4.0%}", "true      {true}"):
        cells = [
            line.format(label=label, sure=probabilities[10 * index + label], true=test["labels"][index])
            for index, label in enumerate(labels)
        ]
        print("   ".join(f"{cell:16}" for cell in cells).rstrip())


def picture_row(pixels: list[float]) -> str:
    """Two characters a pixel, because a character is about twice as high as it is wide."""
    return "".join(2 * SHADES[round(pixel / DARKEST * (len(SHADES) - 1))] for pixel in pixels)


def score(truth: list[int], labels: list[int], reported: float) -> None:
    if len(labels) != len(truth):
        raise SystemExit(f"asked about {len(truth)} images, got {len(labels)} answers")
    right = sum(label == true for label, true in zip(labels, truth, strict=True))
    accuracy = right / len(truth)
    print(f"{right} of {len(truth)} right: {accuracy:.2%} through the server, {reported:.2%} at the end of training")
    if abs(accuracy - reported) > 1e-9:
        raise SystemExit("the server does not answer as the trained network did")


def read(path: str) -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def output(answer: dict[str, Any], name: str) -> list[Any]:
    """The values of one output, flat, row by row."""
    return next(tensor["data"] for tensor in answer["outputs"] if tensor["name"] == name)


if __name__ == "__main__":
    main()
