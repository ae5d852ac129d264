"""A folder to a Parquet file, resumable, and a search over it with nothing but NumPy."""

import numpy as np
import pyarrow.parquet as pq

from lbfast.embedding import embed_files
from lbfast.mini.files import write_world

if __name__ == "__main__":  # with workers > 0 this line is needed
    write_world("scenes", 8, senses=("image", "audio"))
    with open("captions.txt", "w", encoding="utf-8") as file:
        file.write("a large blue circle\na small red cross is heard\n")
    inputs = ["scenes/image", "scenes/audio", "captions.txt"]
    summary = embed_files(inputs, ["lbfast-mini/audio", "lbfast-mini/image"], "embeddings.parquet")
    print(summary.embedded)

    table = pq.read_table("embeddings.parquet")
    vectors = np.stack(table["embedding"].to_numpy())
    modality = np.array(table["modality"])
    files = np.array(table["path"])[modality != "language"]
    queries, found = vectors[modality == "language"], vectors[modality != "language"]
    for query in queries:
        best = np.argsort(-(found @ query))[:3]
        print([str(files[number]) for number in best])
