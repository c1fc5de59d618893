"""
Readers of captioned images (Aquila Sec. 4.1.1): RSICD and its kin, NWPU, CapERA, and WHU-RS19's scene classes.
"""
from corpora.prompts import SCENE_TEXT, choose_prompt
from corpora.reading import expect, get, listed, make_record, plain_name, published_file
from files.text import read_json


def caption_records(corpus, split, key, image, captions):
    """In train one record a caption, in val and test one of the image, answered by its first; no empty captions."""
    captions = [caption.strip() for caption in captions]
    image_id = f"{corpus.name}-{key}"
    if split == "train":
        for number, caption in enumerate(captions):
            if caption:
                record_id = f"{image_id}-{number}"
                yield make_record(record_id, corpus.images + image, choose_prompt("caption", record_id), caption)
    elif any(captions):
        references = [caption for caption in captions if caption]
        question = choose_prompt("caption", image_id)
        yield make_record(image_id, corpus.images + image, question, references[0], references=references)


def read_karpathy(corpus, root, split):
    """RSICD, UCM, Sydney, RSITMD: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}."""
    path = published_file(corpus, root, split)
    for where, row in listed(read_json(path), "images", path):
        if get(row, "split", str, where) == split:
            name = get(row, "filename", str, where)
            captions = [get(sentence, "raw", str, where) for sentence in get(row, "sentences", list, where)]
            yield from caption_records(corpus, split, name, name, captions)


def read_nwpu(corpus, root, split):
    """{class: [{"filename", "split", "raw", "raw_1", ..., "raw_4"}]}; images lie in a folder a class."""
    path = published_file(corpus, root, split)
    data = expect(read_json(path), dict, path)
    for scene in data:
        for where, row in listed(data, scene, path):
            if get(row, "split", str, where) == split:
                name = get(row, "filename", str, where)
                captions = [get(row, key, str, where) for key in ("raw", "raw_1", "raw_2", "raw_3", "raw_4")]
                yield from caption_records(corpus, split, name, f"{scene}/{name}", captions)


def read_capera(corpus, root, split):
    """
    {"ERA_caption": [{"video_id", "annotation": {"English_caption": [5 strings]}}]}, of clips Train/<Event>/
    <Event>_001.mp4; train and test use the same names. ASSUMPTION: the user saves a still of each, as .jpg.
    """
    path = published_file(corpus, root, split)
    for where, row in listed(read_json(path), "ERA_caption", path):
        clip = get(row, "video_id", str, where).removesuffix(".mp4")
        image = f"{split.capitalize()}/{clip.rpartition('_')[0]}/{clip}.jpg"
        captions = get(get(row, "annotation", dict, where), "English_caption", list, where)
        captions = [expect(caption, str, f"{where}: caption") for caption in captions]
        yield from caption_records(corpus, split, f"{split}-{clip}", image, captions)


def read_scene_folders(corpus, root, split):
    """WHU-RS19: a folder of images a class and no text, so the class name is put into SCENE_TEXT."""
    for path in sorted(root.glob("[!.]*/[!.]*")):
        if path.suffix.lower() in {".jpg", ".jpeg", ".png", ".tif", ".tiff"}:
            image = f"{path.parent.name}/{path.name}"
            record_id = f"{corpus.name}-{image}"
            answer = SCENE_TEXT.format(name=plain_name(path.parent.name))
            yield make_record(record_id, image, choose_prompt("scene", record_id), answer)
