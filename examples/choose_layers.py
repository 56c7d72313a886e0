"""Which layers of the demo's teacher to keep: how the list in smollm2.yaml was obtained.

Greedy pruning on training text only: the layer whose removal raises the loss least is dropped,
again and again. 345 forward passes of 1024 tokens; a quarter of an hour on two busy cores.

    kdkernels fetch smollm2 && python examples/choose_layers.py
"""

from kdkernels.commands.data import read_documents, token_blocks
from kdkernels.commands.fetch import TEACHER_FOLDER, TEXT_FOLDER, cache_folder
from kdkernels.training.models import ModelSource, choose_layers

KEEP = 15
TOKENS = 1024
SEQUENCE_LENGTH = 128

if __name__ == "__main__":
    teacher = ModelSource("teacher", str(cache_folder() / TEACHER_FOLDER))
    text = str(cache_folder() / TEXT_FOLDER / "train.txt")
    documents = read_documents("train_text", text, "text", "train")
    blocks = token_blocks("train_text", documents, teacher.tokenizer(), SEQUENCE_LENGTH)
    sample = blocks.evenly(TOKENS).blocks
    print(",".join(map(str, choose_layers(teacher.model("float32"), sample, KEEP))))
