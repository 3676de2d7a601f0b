"""Runs in a virtual environment that holds only vlprune-edge: computes a job's answers, and tells what is loaded.

python edge_answers.py job.json answers.json
"""

import json
import sys

import vlprune_edge


with open(sys.argv[1], encoding="utf-8") as file:
    job = json.load(file)
answers = {}
for name, case in job.items():
    bundle = vlprune_edge.open(case["bundle"], threads=1)
    images, texts = case["images"], case["texts"]
    if case["task"] == "retrieval":
        matches = bundle.match(images, texts)
        answers[name] = {
            "image_embeds": bundle.embed_image(images).tolist(),
            "text_embeds": bundle.embed_text(texts).tolist(),
            "similarity": [match.similarity for match in matches],
            "probability": [match.probability for match in matches],
        }
    elif case["task"] == "captioning":
        answers[name] = {"captions": bundle.caption(images)}
    elif case["task"] == "vqa":
        answers[name] = {"answers": bundle.answer(images, texts)}
    elif case["task"] == "nlvr":
        pairs = zip(images, images[1:] + images[:1], texts, strict=True)
        answers[name] = {"answers": [bundle.judge(*pair) for pair in pairs]}
    else:
        labels = bundle.classify(images, top=3)
        answers[name] = {"classes": [[label.name for label in row] for row in labels]}
        answers[name]["scores"] = [[label.score for label in row] for row in labels]
loaded = sorted({module.partition(".")[0] for module in sys.modules})
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump({"answers": answers, "loaded": loaded}, file)
