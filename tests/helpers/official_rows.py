"""Rows of the paper's benchmarks in the columns of their official copies, with images of noise."""

import base64

from evaluate_models import make_image


def image(seed: int) -> dict:
    return {"bytes": make_image(seed), "path": f"{seed}.png"}


def encoded(seed: int) -> str:
    return base64.b64encode(make_image(seed)).decode()


CHOICES = {"A": "red", "B": "blue", "C": "dress", "D": "boot"}
OFFICIAL = {
    "gqa": lambda i: {"id": str(i), "imageId": "n1", "question": "what is it", "answer": "red", "image": image(i)},
    "vqav2": lambda i: {
        "question_id": i, "question": "what is it", "image": image(i), "question_type": "what is",
        "answers": [{"answer": ("red", "blue")[j > i], "answer_id": j} for j in range(10)],
    },
    "textvqa": lambda i: {
        "question_id": i, "question": "what is it", "answers": ["red"] * 6 + ["blue"] * 4, "image": image(i),
        "ocr_tokens": ["red"],
    },
    "vizwiz": lambda i: {"question_id": f"VizWiz_val_{i}", "question": "what", "answers": ["red"] * 10,
        "image": image(i)},
    "pope": lambda i: {
        "id": str(i), "question_id": str(i), "question": "is the dress red", "answer": ("yes", "no")[i % 2],
        "category": ("random", "popular", "adversarial")[i % 3], "image": image(i // 2),
    },
    "scienceqa-img": lambda i: {
        "question": "which", "choices": ["red", "blue"], "answer": i % 2, "hint": "the bag" if i % 2 else "",
        "image": image(i),
    },
    "mme": lambda i: {
        "question_id": f"{i // 2}.png", "question": "is it blue Please answer yes or no.",
        "answer": ("Yes", "No")[i % 2],
        "category": ("OCR", "code_reasoning")[i // 2 % 2], "image": image(i // 2),
    },
    "mmbench": lambda i: {
        "index": i // 2 + i % 2 * 1_000_000, "question": "which", "hint": "nan", **CHOICES, "D": "nan",
        "answer": "AB"[i % 2],
        "category": "c", "image": image(i // 2),
    },
    "mmstar": lambda i: {
        "index": i, "question": "which Options: A: red, B: blue", "answer": "AB"[i % 2], "category": "c",
        "l2_category": "xy"[i % 2], "image": image(i),
    },
    "mmmu": lambda i: {
        "id": f"validation_Art_{i}", "question": "what is <image 1>" + " or <image 2>" * (i == 1),
        "options": str(["red", "blue"] if i % 2 else []), "answer": "A" if i % 2 else "red", "image_1": image(i),
        "image_2": image(9) if i == 1 else None, "question_type": "multiple-choice" if i % 2 else "open",
    },
    "hallusionbench": lambda i: {
        "category": "VS", "subcategory": "chart", "visual_input": str(int(i < 4)), "set_id": str(i // 4),
        "figure_id": str(i // 2 % 2),
        "question_id": str(i % 2), "question": "is the bag red", "gt_answer": str(i % 2),
        "image": image(i // 2) if i < 4 else None,
    },
    "ai2d": lambda i: {"question": "which", "options": list(CHOICES.values()), "answer": str(i % 4), "image": image(i)},
    "ocrbench": lambda i: {
        "dataset": "d", "question": "what is it", "question_type": "Regular Text Recognition", "answer": ["red", "bag"],
        "image": image(i),
    },
    "seed-bench": lambda i: {
        "question_id": str(i), "question": "which", **{f"choice_{x.lower()}": CHOICES[x] for x in "ABCD"},
        "answer": "B",
        "data_type": "image", "image": [image(i)],
    },
}  # fmt: skip
"""By benchmark: its i-th row."""
