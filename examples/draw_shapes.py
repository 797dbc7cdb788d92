"""Draw a visual-question dataset whose kinds of question need different features, in LLaVA's format.

A picture has four quadrants: one to three coloured shapes and one letter, no two shapes or colours alike, each a little
moved and of its own size and shade, on a noisy ground. Five kinds of question are asked about it:

    colour      What colour is the circle?
    shape       What shape is red?
    count       How many shapes are there?
    position    Where is the red shape?
    text        Which letter is written?

Train and held-out pictures differ in content: which shape, colour and letter is where. No arrangement is in both.
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 48
"""Pixels per side of a picture."""
COLOURS = {
    "red": (205, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 75, 210),
    "yellow": (230, 205, 40),
    "purple": (150, 50, 170),
    "orange": (240, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
LETTERS = "AEHKLOTX"
PLACES = ("top left", "top right", "bottom left", "bottom right")
KINDS = ("colour", "shape", "count", "position", "text")
QUESTIONS = {
    "colour": "What colour is the {shape}?",
    "shape": "What shape is {colour}?",
    "count": "How many shapes are there?",
    "position": "Where is the {colour} shape?",
    "text": "Which letter is written?",
}
CHANCE = {
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "count": 1 / 3,
    "position": 1 / len(PLACES),
    "text": 1 / len(LETTERS),
}
"""The share of guesses among the answers of a kind that are right; all answers of a kind are equally frequent."""


class Scene(NamedTuple):
    """What is in a picture."""

    things: tuple[tuple[int, str, str], ...]
    """(quadrant, shape, colour) of each shape."""
    letter: tuple[int, str]
    """(quadrant, letter)."""

    @property
    def is_held_out(self) -> bool:
        """Whether it belongs to a fixed tenth of all arrangements."""
        return zlib.crc32(repr((sorted(self.things), self.letter)).encode()) % 10 == 0


def draw_scene(rng: random.Random) -> Scene:
    """A random arrangement."""
    quadrants = rng.sample(range(4), 4)
    count = rng.randint(1, 3)
    shapes, colours = rng.sample(SHAPES, count), rng.sample(list(COLOURS), count)
    return Scene(tuple(zip(quadrants, shapes, colours, strict=False)), (quadrants[3], rng.choice(LETTERS)))


def draw_picture(scene: Scene, rng: random.Random) -> Image.Image:
    """A picture of the scene, with noise."""
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 6, (SIZE, SIZE, 3))
    ground = np.clip(rng.randint(215, 240) + noise, 0, 255).astype(np.uint8)
    picture = Image.fromarray(ground)
    pen = ImageDraw.Draw(picture)
    for quadrant, shape, colour in scene.things:
        shade = tuple(min(255, max(0, value + rng.randint(-15, 15))) for value in COLOURS[colour])
        radius = rng.uniform(6.5, 9.0)
        x, y = _centre(quadrant, rng)
        box = (x - radius, y - radius, x + radius, y + radius)
        if shape == "circle":
            pen.ellipse(box, fill=shade)
        elif shape == "square":
            pen.rectangle(box, fill=shade)
        elif shape == "triangle":
            pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=shade)
        else:
            arm = radius / 3
            pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=shade)
            pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=shade)
    quadrant, letter = scene.letter
    pen.text(_centre(quadrant, rng), letter, fill=(20, 20, 20), font=ImageFont.load_default(20), anchor="mm")
    return picture


def ask(scene: Scene, kind: str, rng: random.Random) -> tuple[str, str]:
    """A question of a kind about the scene, and the answer."""
    quadrant, shape, colour = rng.choice(scene.things)
    answer = {
        "colour": colour,
        "shape": shape,
        "count": str(len(scene.things)),
        "position": PLACES[quadrant],
        "text": scene.letter[1],
    }[kind]
    return QUESTIONS[kind].format(shape=shape, colour=colour), answer


def describe(scene: Scene) -> str:
    """What is in each quadrant."""
    found = {quadrant: f"{colour} {shape}" for quadrant, shape, colour in scene.things}
    found[scene.letter[0]] = f"letter {scene.letter[1]}"
    return " , ".join(f"{place} {found.get(quadrant, 'empty ground')}" for quadrant, place in enumerate(PLACES))


def write_dataset(folder: Path, pictures: int, held_out: int, seed: int = 0) -> None:
    """Writes ``captions.json``, ``train.json``, ``held_out.json`` and ``images/``.

    Every picture has a question of every kind; those for training have a caption too, which is in both of their files.
    """
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for name, number, wanted in (("train", pictures, False), ("held_out", held_out, True)):
        samples, captions = [], []
        for i in range(number):
            scene = draw_scene(rng)
            while scene.is_held_out != wanted:
                scene = draw_scene(rng)
            file = f"{name}_{i:05d}.png"
            draw_picture(scene, rng).save(images / file)
            captions.append(_sample(f"{name}_{i:05d}", file, "Describe the picture.", describe(scene)))
            for kind in KINDS:
                samples.append(_sample(f"{name}_{i:05d}_{kind}", file, *ask(scene, kind, rng)))
        if name == "train":
            samples += captions
            (folder / "captions.json").write_text(json.dumps(captions))
        (folder / f"{name}.json").write_text(json.dumps(samples))


def _sample(name: str, image: str, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}


def _centre(quadrant: int, rng: random.Random) -> tuple[float, float]:
    half = SIZE / 2
    x, y = (half / 2 + half * (quadrant % 2), half / 2 + half * (quadrant // 2))
    return x + rng.uniform(-2.5, 2.5), y + rng.uniform(-2.5, 2.5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=4000, help="in the training set (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=200, help="in the held-out set (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_dataset(args.folder, args.pictures, args.held_out, args.seed)
