"""How good is a checkpoint? Retrieval in both directions, from files, and between two modalities."""

from lbfast.evaluation import Encoder, retrieve_files
from lbfast.mini.files import write_world

manifest = write_world("scenes", 24, senses=("audio",))
encoder = Encoder.open("lbfast-mini/audio")  # or "LanguageBind/LanguageBind_Audio_FT"
report = retrieve_files(encoder, manifest, media="audio", captions={"audio_caption": 1})
for name, ranking in report.rankings.items():
    print(f"{name}: {ranking}")
